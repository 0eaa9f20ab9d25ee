"""Every kind of file that is read, damaged in hundreds of ways: the result is the same, or a message names the file.

A third outcome is a folder that is repaired, which gives the same result as well. Never a traceback of some library, a
hang, or another result in silence.
"""

from __future__ import annotations

import io
import json
import logging
import random
import re
import shutil
import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from torch import Tensor

from storymem.data.cache import LatentCache
from storymem.film.folder import Film
from storymem.media.images import read_image
from storymem.media.video import probe, read_video
from storymem.memory import MemoryBank
from storymem.scorers.clip import ClipScorer
from storymem.scorers.scorer import as_images
from storymem.story import load_story
from storymem.wan.loading import load_pipeline
from storymem.wan.lora import AdapterInfo, Layout, memory_lora_config, read_memory_lora, write_memory_lora
from storymem.wan.sources import check_weights
from storymem.wan.spec import experts_of
from tests import stories
from tests.damage import damage, kinds_for
from tests.data.drawn_clips import scene, video
from tests.training import tiny as runs
from tests.wan import tiny
from tests.wan.test_gguf import gguf_file

SECONDS = 20  # of a case, where a tenth is usual: more is a hang
FILE_NAME = re.compile(r"[\w./-]+\.(?:mp4|png|safetensors|html|jsonl?)")


@dataclass(frozen=True, kw_only=True)
class Door:
    """One way in which files are read.

    Args:
        make: writes the files into a folder, and returns what else `use` needs.
        use: reads them as a program does; returns what must stay the same.
        files: patterns of those that are damaged.
        cases: how many.
        may_differ: for suffixes of files that no digest guards, kinds of damage that make other content of them.
    """

    make: Callable[[Path], Any]
    use: Callable[[Path, Any], Any]
    files: tuple[str, ...] = ("*",)
    cases: int
    may_differ: Mapping[str, Collection[str]] = field(default_factory=dict)


# --- stories, images, videos ----------------------------------------------------------------------------------------

STORY = """\
title: The keeper
overview: A short walk.
characters:
  - {name: Tam, references: [tam.png]}
scenes:
  - shots:
      - {prompt: "Tam walks out of a door.", characters: [Tam], frames: 9, seed: 5}
      - {prompt: "Tam looks at a tree.", cut: false, negative_prompt: "rain"}
  - shots:
      - {prompt: "A cat sits on a wall.", references: [tam.png]}
"""
BENCH = {
    "story_name": "The keeper",
    "story_overview": "A short walk.",
    "scenes": [
        {
            "scene_num": 1,
            "video_prompts": ["Tam walks.", "Tam sits."],
            "first_frame_prompt": ["", ""],
            "cut": [True, "False"],
        },
        {"scene_num": 2, "video_prompts": ["A cat."], "first_frame_prompt": [""], "cut": ["True"]},
    ],
}


def make_story(folder: Path) -> None:
    make_image(folder)
    (folder / "story.yaml").write_text(STORY, encoding="utf-8")
    (folder / "bench.json").write_text(json.dumps(BENCH, indent=1), encoding="utf-8")


def make_image(folder: Path) -> None:
    """Noise, and an image that compresses to a few bytes."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Title", "Tam" * 20)
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png", pnginfo=notes)
    Image.linear_gradient("L").resize((48, 32)).convert("RGB").save(folder / "tam.png", pnginfo=notes)


def make_video(folder: Path) -> None:
    video(folder / "a.mp4", scene(0, 12))


def use_video(folder: Path, _: Any) -> Any:
    frames, info = read_video(folder / "a.mp4"), probe(folder / "a.mp4")
    assert (len(frames), *frames.shape[1:]) == (info.frames, info.height, info.width, 3)
    return info.times.tolist(), frames.tobytes()


# --- films ----------------------------------------------------------------------------------------------------------


def make_film(folder: Path) -> None:
    stories.storyteller().tell(stories.story(folder, stories.TWO_SHOTS), folder / "film")


def use_film(folder: Path, _: Any, resume: str = "auto") -> Any:
    film = stories.storyteller().tell(load_story(folder / "story.yaml"), folder / "film", resume=resume)
    assert film.video is not None
    assert (film.folder / "storyboard.html").is_file()
    Film.open(film.folder).check()
    shots = [read_video(film.folder / shot.file).tobytes() for shot in film.shots]
    return (
        read_video(film.video).tobytes(),
        shots,
        [film.last_frames(shot.index, 5).tobytes() for shot in film.shots],
    )


def use_memory(folder: Path, _: Any) -> Any:
    bank = MemoryBank.load(folder / "film", embed=lambda frames: encoder().embed_images(as_images(frames)).numpy())
    for done in bank.edited.values():
        print(done)
    latents = [None if keyframe.latent is None else keyframe.latent.numpy().tobytes() for keyframe in bank]
    return [(k.sha256, k.embedding.tobytes(), k.shot, k.frame) for k in bank], latents


@cache
def encoder() -> ClipScorer:
    return ClipScorer.from_config(stories.CLIP, seed=0)


# --- weights --------------------------------------------------------------------------------------------------------


def make_base(folder: Path) -> None:
    load_pipeline(tiny.settings(), runtime=tiny.CPU).save_pretrained(folder / "base")


def use_base(folder: Path, _: Any) -> Any:
    weights = {"name": "base", "source": str(folder / "base")}
    pipe = load_pipeline(tiny.settings(weights=weights, has_text_to_video=False), runtime=tiny.CPU)
    networks = (pipe.transformer, pipe.transformer_2, pipe.vae, pipe.text_encoder)
    return [digest(network.state_dict()) for network in networks], pipe.tokenizer("a fox").input_ids


def make_lora(folder: Path) -> Any:
    """One adapter in several layouts: with a description in its metadata, in a pickle, and in a file beside it."""
    experts = experts_of(load_pipeline(tiny.settings(), runtime=tiny.CPU, text_encoder=False))
    states = {}
    for expert, transformer in experts.items():
        transformer.add_adapter(memory_lora_config(rank=4, alpha=8.0), adapter_name="memory")
        weights = transformer.named_parameters()
        states[expert] = {n.replace(".memory.", "."): w.detach().clone() for n, w in weights if ".memory." in n}
        transformer.delete_adapters("memory")
    for layout in get_args(Layout):
        write_memory_lora(states, folder / layout, info=AdapterInfo(rank=4, alpha=8.0), layout=layout)
    (folder / "peft").mkdir()
    (folder / "peft" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8.0}')
    for path in sorted((folder / "released").glob("*.safetensors")):
        save_file(load_file(path), folder / "peft" / path.name)
        path.unlink()
    return experts


def use_lora(folder: Path, experts: Any) -> Any:
    found = []
    for layout in (*get_args(Layout), "peft"):
        for adapter in read_memory_lora(experts, folder / layout).values():
            print(adapter.file.path, adapter.report)
            found.append((digest(adapter.tensors()), adapter.config))
    return found


def make_gguf(folder: Path) -> Any:
    pipe = load_pipeline(tiny.settings(), runtime=tiny.CPU)
    for name, expert in zip(("high", "low"), pipe.experts.values(), strict=True):
        gguf_file(folder / f"{name}.gguf", expert.state_dict())
    pipe.transformer = pipe.transformer_2 = None
    pipe.save_pretrained(folder / "others")


def use_gguf(folder: Path, _: Any) -> None:
    """By header alone, which holds the place of each tensor; no reader of the format is needed."""
    files = {f"{name}_noise": {"name": name, "source": str(folder / f"{name}.gguf")} for name in ("high", "low")}
    weights = {"name": "others", "source": str(folder / "others")}
    check_weights(tiny.settings(weights=weights, gguf=files, has_text_to_video=False), text_to_video=False)


def digest(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


# --- training -------------------------------------------------------------------------------------------------------


def make_set(folder: Path) -> None:
    from storymem.data.prepare import prepare
    from tests.data.preparing import config

    for number in range(4):
        video(folder / "videos" / f"clip{number}.mp4", scene(number, 12), caption=f"Tiles {number % 3}.")
    prepare(config(folder, "cache.shard_mb=0.001"))


def use_set(folder: Path, _: Any) -> Any:
    from tests.data.preparing import contents

    found = contents(LatentCache.open(folder / "set"))
    return {name: digest_of(value) for name, value in found.items()}


def digest_of(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: digest_of(inner) for name, inner in value.items()}
    return value.numpy().tobytes() if isinstance(value, Tensor) else value


def use_prepare(folder: Path, _: Any) -> Any:
    from storymem.data.prepare import prepare
    from tests.data.preparing import config

    prepare(config(folder, "cache.shard_mb=0.001"))
    return use_set(folder, None)


TRAINED: dict[str, Any] = {
    "expert": "high",
    "steps": 2,
    "optimizer": {"lr": 0.01, "warmup_steps": 0},
    "checkpoint": {"every": 1, "keep": 2},
}


def make_run(folder: Path) -> None:
    runs.run(folder / "run", **TRAINED).trainer.run()


def use_run(folder: Path, _: Any) -> Any:
    from storymem.config import build_settings
    from storymem.training.resume import check_run_folder
    from storymem.training.settings import TrainSettings

    values = runs.config(folder / "run", **TRAINED)
    check_run_folder(folder / "run", build_settings(TrainSettings, values), values)
    run = runs.run(folder / "run", **TRAINED)
    run.trainer.run()
    return digest({name: weight.detach() for name, weight in run.trainer.parameters.items()})


# --- all of them ----------------------------------------------------------------------------------------------------

NUMBERS = ("flipped", "zeros")  # of weights, and of pixels
TEXT = ("cut", "flipped", "inserted", "value", "key")  # that people write and edit
DOORS = {
    "story": Door(
        make=make_story,
        use=lambda folder, _: [load_story(folder / name).to_dict() for name in ("story.yaml", "bench.json")],
        cases=30,
        may_differ={".yaml": TEXT, ".json": TEXT},
    ),
    "image": Door(
        make=make_image,
        use=lambda folder, _: [read_image(folder / name).tobytes() for name in ("noise.png", "tam.png")],
        cases=45,
        may_differ={".png": ["checked header"]},
    ),
    "video": Door(make=make_video, use=use_video, cases=30, may_differ={".mp4": [*NUMBERS, "header"]}),
    "film": Door(make=make_film, use=use_film, files=("film/**/*",), cases=25),
    "film from shot 2": Door(
        make=make_film,
        use=lambda folder, _: use_film(folder, _, "from_shot:2"),
        files=("film/*.json", "film/keyframes/*", "film/shots/**/*"),
        cases=10,
        may_differ={".json": TEXT},
    ),
    "memory": Door(
        make=make_film,
        use=use_memory,
        files=("film/memory.json", "film/keyframes/*"),
        cases=25,
        may_differ={".json": TEXT},
    ),
    "base model": Door(
        make=make_base, use=use_base, files=("base/**/*",), cases=30, may_differ={".safetensors": NUMBERS}
    ),
    "LoRA": Door(
        make=make_lora,
        use=use_lora,
        files=("*/*",),
        cases=40,
        may_differ={".safetensors": NUMBERS, ".pth": NUMBERS, ".json": TEXT},
    ),
    "GGUF": Door(make=make_gguf, use=use_gguf, files=("*.gguf",), cases=20),
    "data set": Door(make=make_set, use=use_set, files=("set/cache/**/*",), cases=25),
    "prepare": Door(make=make_set, use=use_prepare, files=("set/**/*",), cases=8),
    "run": Door(make=make_run, use=use_run, files=("run/**/*",), cases=15),
}


def targets(door: Door, folder: Path, draw: random.Random) -> Iterator[tuple[Path, str]]:
    """What is damaged in each case, and how: files of each suffix take turns, as do the kinds that suit them."""
    by_suffix: dict[str, list[Path]] = {}
    for path in sorted({path for pattern in door.files for path in folder.glob(pattern)}):
        if path.is_file() and path.stat().st_size:
            by_suffix.setdefault(path.suffix, []).append(path.relative_to(folder))
    groups = [(paths, kinds_for(paths[0])) for paths in by_suffix.values()]
    for _, kinds in groups:
        draw.shuffle(kinds)
    for number in range(door.cases):
        paths, kinds = groups[number % len(groups)]
        yield draw.choice(paths), kinds[number // len(groups) % len(kinds)]


class Hang(BaseException):
    """No code takes this for an error of its own."""


@contextmanager
def bounded() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def use(door: Door, folder: Path, given: Any) -> tuple[Any, list[str]]:
    """The result, and lines that were printed, with paths as if in the folder."""
    printed = io.StringIO()
    handler, logger = logging.StreamHandler(printed), logging.getLogger("storymem")
    logger.addHandler(handler)
    try:
        with bounded(), redirect_stdout(printed), redirect_stderr(printed):
            result = door.use(folder, given)
    finally:
        logger.removeHandler(handler)
    return result, printed.getvalue().replace(str(folder), "").splitlines()


def outcome(door: Door, folder: Path, given: Any, whole: tuple[Any, list[str]], names: list[str]) -> str:
    """ "same", "reported" or "another"; else what is wrong with it.

    Args:
        door: what is used.
        folder: of its damaged files.
        given: what `door.make` returned.
        whole: what :func:`use` returns for files that are not damaged.
        names: of which one must be reported if the result is another.
    """
    try:
        result, lines = use(door, folder, given)
    except Hang:
        return "hangs"
    except (ValueError, FileNotFoundError) as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        raised_in = "" if trace is None else trace.tb_frame.f_globals["__name__"]
        if not any(name.startswith("storymem.") for name in (type(error).__module__, raised_in)):
            return f"{type(error).__name__} of {raised_in}: {error}"
        return "reported" if any(name in str(error) for name in names) else f"does not name the file: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if any(name in line for line in set(lines) - set(whole[1]) for name in names):
        return "reported"
    return "same" if result == whole[0] else "another"


def names_of(path: Path, original: Path, *, gone: bool) -> list[str]:
    """What may stand for a file in a message: its name, its folder, or of a manifest the files that it describes.

    Of a file that is gone, any folder above it.
    """
    described = FILE_NAME.findall((original / path).read_text()) if path.suffix == ".json" else []
    folders = path.parents if gone else [path.parent]
    return [path.name, *(f"/{folder}" for folder in folders if folder.name), *described]


@pytest.mark.timeout(600, method="thread")  # the other method uses the alarm that is used here
@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", DOORS)
def test_damage_is_repaired_or_named(name: str, times: int, tmp_path: Path) -> None:
    draw = random.Random(f"{name} {times}")
    door = replace(DOORS[name], cases=DOORS[name].cases * times)
    original = tmp_path / "original"
    original.mkdir()
    given = door.make(original)
    whole = use(door, Path(shutil.copytree(original, tmp_path / "whole")), given)
    outcomes = []
    for number, (target, kind) in enumerate(targets(door, original, draw)):
        folder = Path(shutil.copytree(original, tmp_path / str(number)))
        damage(folder / target, kind, draw)
        names = names_of(target, original, gone=not (folder / target).exists())
        ended = outcome(door, folder, given, whole, names)
        if ended not in ("same", "reported") and not (
            ended == "another" and kind in door.may_differ.get(target.suffix, ())
        ):
            ended = f"{number} {target}, {kind}: {ended[:600]}"
        outcomes.append(ended)
        shutil.rmtree(folder)
    faults = [ended for ended in outcomes if ended not in ("same", "reported", "another")]
    assert not faults, "\n".join(faults)
    assert "reported" in outcomes, "these files are read"


def test_a_last_frame_of_another_size_is_named(tmp_path: Path) -> None:
    make_film(tmp_path)
    Image.new("RGB", (6, 4)).save(tmp_path / "film" / "shots" / "01_01" / "take_001_end" / "3.png")
    with pytest.raises(ValueError, match=r"take_001_end/3\.png has another size than shots/01_01/take_001_end/1\.png"):
        Film.open(tmp_path / "film").last_frames(0, 5)


@pytest.mark.parametrize("kind", ["link to itself", "FIFO"])
def test_a_shard_whose_name_leads_nowhere_is_made_again(tmp_path: Path, kind: str) -> None:
    make_set(tmp_path)
    whole = use_set(tmp_path, None)
    damage(next(tmp_path.glob("set/cache/*/shard-*.safetensors")), kind, random.Random(0))
    assert use_prepare(tmp_path, None) == whole
    assert all(path.is_file() and not path.is_symlink() for path in tmp_path.glob("set/cache/*/texts-*"))
