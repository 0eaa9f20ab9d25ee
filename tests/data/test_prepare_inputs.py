"""Inputs of every kind that people have: names, captions, footage and networks that are not as they should be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from storymem.config import ConfigError, build_settings
from storymem.data import encoding, steps
from storymem.data.cache import LatentCache
from storymem.data.prepare import prepare
from storymem.data.settings import PrepareSettings
from storymem.io import FileError
from tests.data.drawn_clips import FPS, scene, video
from tests.data.preparing import config, rejected, train_on


def finish(folder: Path, *overrides: str) -> LatentCache:
    cache = prepare(config(folder, *overrides))
    assert cache is not None
    train_on(folder / "set")
    return cache


def test_clips_of_like_names_are_never_taken_for_each_other(tmp_path: Path) -> None:
    """Folder, case, suffix, Unicode form, line separators: each is a video of its own, with its own caption."""
    names = [
        *("a.mp4", "A.mp4", "far/a.mp4", "a.mov", "caf\u00e9.mp4", "cafe\u0301.mp4"),
        *("x\u2028y.mp4", "x\x85y.mp4", "x\ny.mp4", "x y.mp4"),
    ]
    for number, name in enumerate(names):
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        video(tmp_path / "videos" / name, scene(number, 12))
    rows = [f'"{name}","The {number}th of all."' for number, name in enumerate(names)]
    (tmp_path / "videos" / "captions.csv").write_text("video,caption\n" + "\n".join(rows), encoding="utf-8")
    cache = finish(tmp_path)
    assert {clip.id: clip.caption for clip in cache.clips} == {
        f"{name}@0.000": f"The {number}th of all." for number, name in enumerate(names)
    }
    latents = [cache.video(index) for index in range(len(cache))]
    assert not any(torch.equal(one, other) for n, one in enumerate(latents) for other in latents[:n])
    assert finish(tmp_path).clips == cache.clips, "journals and index are read back"


def container(path: Path, codec: str, format: str, frames: np.ndarray) -> None:
    with av.open(str(path), "w", format=format) as written:
        stream = written.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            written.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        written.mux(stream.encode(None))


def test_other_containers_are_read(tmp_path: Path) -> None:
    kinds = {
        **{"a.mts": ("libx264", "mpegts"), "b.m2ts": ("libx264", "mpegts"), "c.flv": ("flv", "flv")},
        **{"d.wmv": ("wmv2", "asf"), "e.3gp": ("libx264", "3gp"), "f.ogv": ("libvpx", "ogg"), "g.qt": ("mpeg4", "mov")},
    }
    (tmp_path / "videos").mkdir()
    for number, (name, (codec, format)) in enumerate(kinds.items()):
        container(tmp_path / "videos" / name, codec, format, scene(number, 16, height=64, width=96))
        (tmp_path / "videos" / name).with_suffix(".txt").write_text("Tiles.")
    prepare(config(tmp_path, "steps=[split,check]"))
    assert rejected(tmp_path) == {}


def test_what_is_not_read_is_listed_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    videos = tmp_path / "videos"
    for number in range(2):
        video(videos / f"good{number}.mp4", scene(number, 12), caption="Tiles.")
    (videos / "captions.jsonl").write_text(
        '{"video": "long.mp4", "caption": "Morning.", "start": 0, "end": 1.5}\n'
        '{"video": "long.mp4", "caption": "Evening.", "start": 9, "end": 11}\n'
    )
    video(videos / "long.mp4", scene(5, 12))
    for name in ("c.gif", "c.txt", "._good0.mp4"):
        (videos / name).write_text("x")
    (videos / "dead.mp4").symlink_to("nowhere")
    with pytest.raises(FileError, match="is the folder of the videos: write another one, such as output=data"):
        prepare(config(tmp_path, f"output={videos}", "steps=[split,check]"))
    prepare(config(tmp_path, f"output={videos / 'set'}", "steps=[split,check]"))
    (tmp_path / "set").symlink_to(videos / "set")
    assert rejected(tmp_path) == {
        "c.gif": "not a video: GIF has at most 256 colours; convert it to .mp4 to train on it",
        "c.txt": "caption without a video: no video has its name",
        "._good0.mp4": "hidden: its name begins with a dot",
        "dead.mp4": "dead link: to nowhere",
        "long.mp4@9-11": "unused caption: no clip lies in these seconds",
    }
    printed = capsys.readouterr().err
    assert "left out: " in printed
    assert all(f"1 {kind}" in printed for kind in ("not a video", "caption without a video", "hidden", "dead link"))


def test_names_of_another_unicode_form_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number, name in enumerate(("cafe\u0301.mp4", "b.mp4")):
        video(tmp_path / "videos" / name, scene(number, 12))
    rows = '{"video": "caf\u00e9.mp4", "caption": "One."}\n{"video": "b.mp4", "caption": "Two."}\n'
    (tmp_path / "videos" / "captions.jsonl").write_text(rows, encoding="utf-8")
    finish(tmp_path)
    printed = capsys.readouterr().err
    assert "names in captions that are spelled differently than the videos (accents, spaces): 1, " in printed
    assert "such as 'caf\u00e9.mp4' for 'cafe\u0301.mp4'" in printed


def test_captions_that_are_cut_are_counted_at_every_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number, caption in enumerate(("ab " * 100, "Short.", "cd " * 30)):
        video(tmp_path / "videos" / f"{number}.mp4", scene(number, 12), caption=caption)
    for _ in range(2):
        finish(tmp_path)
        printed = capsys.readouterr().err
        assert printed.count("the captions of 2 clips are longer than the 16 tokens that the text encoder reads") == 1
        assert "the first is that of 0.mp4@0.000, with 300 tokens" in printed


def test_footage_that_the_quality_filter_does_not_know(tmp_path: Path) -> None:
    for number in range(3):
        video(tmp_path / "videos" / f"{number}.mp4", scene(number, 12), caption="Footage.")
    strict = "scorer.quality.threshold=99"
    with pytest.raises(ValueError, match=r"no clip of 3 could be cached; the first, 0\.mp4@0\.000: quality: no frame"):
        finish(tmp_path, "scorer/quality=tiny", strict)
    with pytest.raises(ValueError, match=r"3 of 3 clips have no .*\. scorer/quality=none lets every") as printed:
        finish(tmp_path, "scorer/quality=tiny", strict)
    (advice,) = (word for word in str(printed.value).split() if word.startswith("scorer/quality=none"))
    assert len(finish(tmp_path, advice)) == 3


def test_clips_whose_companions_are_refused_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        video(tmp_path / "videos" / f"{number // 2}/{number}.mp4", scene(number, 12), caption="Tiles.")
    calls: list[int] = []

    def refuse_first(frames: np.ndarray) -> list[int]:
        calls.append(0)
        if len(calls) == 1:
            raise ValueError("quality: too low")
        return [0]

    monkeypatch.setattr(encoding, "load_chooser", lambda _: refuse_first)
    cache = finish(tmp_path, "group.within=folder", "group.valid_fraction=0")
    kept, refused = ("1", "0") if cache.clips[0].id.startswith("1") else ("0", "1")
    assert [clip.id.partition("/")[0] for clip in cache.clips] == [kept, kept]
    assert {id.partition("/")[0] for id in rejected(tmp_path)} == {refused}
    assert sorted(rejected(tmp_path).values()) == [
        "alone: the other clips of its group were left out",
        "quality: too low",
    ]


def two_videos(folder: Path) -> None:
    for number in range(2):
        video(folder / "videos" / f"{number}.mp4", scene(number, 12), caption="Tiles.")


def broken_pipelines(monkeypatch: pytest.MonkeyPatch, harm: Callable[[Any], object]) -> None:
    """Every pipeline that a step loads is changed by ``harm`` first."""
    load = encoding.load_pipeline

    def loaded(*arguments: Any, **options: Any) -> Any:
        pipe = load(*arguments, **options)
        with torch.no_grad():
            harm(pipe)
        return pipe

    monkeypatch.setattr(encoding, "load_pipeline", loaded)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_networks_that_give_nan_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    def harm(pipe: Any) -> None:
        network = getattr(pipe, part)
        for parameter in () if network is None else network.parameters():
            parameter.fill_(float("nan"))

    two_videos(tmp_path)
    broken_pipelines(monkeypatch, harm)
    named = {"vae": "the latents of the blank video from the VAE", "text_encoder": "the caption ''"}[part]
    with pytest.raises(ValueError, match=named + ": NaN or infinite values; its weights are damaged"):
        prepare(config(tmp_path))
    stored = [name for path in tmp_path.rglob("shard-*") for name in load_file(path)]
    assert all(name.startswith("text ") for name in stored), "no NaN became a file"


def test_latents_that_a_narrow_dtype_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_videos(tmp_path)
    broken_pipelines(monkeypatch, lambda pipe: pipe.vae.register_to_config(latents_std=[1e-6] * 16))
    with pytest.raises(ValueError, match=r"in float16: NaN or infinite values; write cache\.dtype=float32") as error:
        prepare(config(tmp_path))
    advice = next(word for word in str(error.value).split() if word.startswith("cache.dtype=")).rstrip(",")
    assert len(finish(tmp_path, advice)) == 2


@pytest.mark.parametrize("step", ["embed", "cache"])
def test_scorers_that_give_nan_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    two_videos(tmp_path)
    if step == "cache":
        prepare(config(tmp_path, "steps=[split,check,embed,group]"))

    class Broken:
        threshold = 0.0

        def to(self, _: Any) -> Broken:
            return self

        def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.full((len(pixels), 4), float("nan"))

    instantiate = steps.instantiate
    for module in (encoding, steps):
        monkeypatch.setattr(
            module, "instantiate", lambda node: Broken() if "scorers" in node["_target_"] else instantiate(node)
        )
    with pytest.raises(ValueError, match=r"[01]\.mp4@0\.000: the embeddings by scorer\.clip: NaN or infinite values"):
        prepare(config(tmp_path))
    monkeypatch.undo()
    finish(tmp_path)


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A configuration that is right."""
    composed = config(tmp_path_factory.mktemp("settings"))
    build_settings(PrepareSettings, composed)
    return composed


@pytest.mark.parametrize(
    "setting",
    [
        *(
            "data.buckets=[{frames: 9, height: 100000, width: 32}]",
            "data.buckets=[{frames: 9, height: 4.5, width: 32}]",
        ),
        *(
            "data.buckets=[{frames: 1025, height: 8192, width: 8192}]",
            "data.fps=1.0e+6",
            "data.fps=.nan",
            "data.fps=.inf",
        ),
        *("split.threshold=.nan", "split.margin=1.0e+9", "split.clips_per_shot=1000000000", "split.margin=.nan"),
        *("check.frames=1000000", "check.black=.nan", "check.frozen=256", "group.frames=100000", "workers=1000000000"),
        *("group.similarity=.nan", "group.near_duplicate=.nan", "group.max_size=1000000000", "group.neighbours=10**9"),
        *(
            "group.valid_fraction=.nan",
            "cache.shard_mb=.nan",
            "cache.shard_mb=1.0e+12",
            "cache.given=[1, 1]",
            "videos=' '",
        ),
    ],
)
def test_settings_beyond_sense(values: dict[str, Any], setting: str) -> None:
    key, _, value = setting.partition("=")
    changed: Any = {name: dict(node) if isinstance(node, dict) else node for name, node in values.items()}
    *nodes, name = key.split(".")
    (changed[nodes[0]] if nodes else changed)[name] = yaml.safe_load(value)
    with pytest.raises(ConfigError, match=rf"\b{name}\b"):
        build_settings(PrepareSettings, changed)
