"""The plan of a film: what a dry run prints, and that it does nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from storymem.film.folder import Film
from storymem.film.generate import generate_films as generate
from storymem.film.plan import make_plan
from storymem.film.settings import estimated_bytes
from storymem.scorers import scorer_bytes
from storymem.story import Story
from storymem.wan.estimate import estimate_shot, forward_flops
from storymem.wan.segments import memory_joint
from tests.composing import composed, generate_settings
from tests.stories import plain_image, story

FIVE_SHOTS = """\
title: Five
overview: A long walk.
scenes:
  - shots:
      - {prompt: "A dog walks out of a door."}
      - {prompt: "The dog looks at a tree.", cut: false}
      - {prompt: "The dog barks.", frames: 9}
  - shots:
      - {prompt: "A cat sits on a wall."}
      - {prompt: "The cat jumps.", cut: false}
"""
# shot, scene.shot, mode, frames, memory, tokens, PFLOP per forward, PFLOP
Row = list[str]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def five(tmp_path: Path) -> Story:
    return story(tmp_path, FIVE_SHOTS)


def rows(plan: str) -> list[Row]:
    return [line.split() for line in plan.splitlines() if line.split()[:1] and line.split()[0].isdigit()]


def column(plan: str, number: int) -> list[str]:
    return [row[number] for row in rows(plan)]


def planned(loaded: Story, *overrides: str, folder: str = "film") -> str:
    model = [] if any(override.startswith("model=") for override in overrides) else ["model=tiny"]
    return make_plan(loaded, generate_settings(*model, *overrides), Path(folder))[0]


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    tmp_path: Path, five: Story, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(composed(f"story={five.source}", "dry_run=true", "output=out/film")) == []
    printed = capsys.readouterr().out
    assert printed.startswith("Five: 5 shots in 2 scenes, ")
    assert "out/film" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["story.yaml"]


@pytest.mark.parametrize("problem", ["model.weights={name: i2v, source: ./absent}", "model.video.frames=2501"])
def test_a_dry_run_of_what_cannot_be_made_fails_after_the_plan(
    five: Story, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed(f"story={five.source}", "dry_run=true", "model=wan2.2-a14b", "runtime.device=cpu", problem)
    with pytest.raises(ValueError, match=r"^not ready: \d+ marked MISSING, UNFIT or TOO SMALL in the plan$"):
        generate(config)
    assert capsys.readouterr().out.startswith("Five: 5 shots in 2 scenes, ")


def test_modes_and_frames(five: Story) -> None:
    plan = planned(five, "model.video.frames=17")
    assert column(plan, 1) == ["1.1", "1.2", "1.3", "2.1", "2.2"]
    assert column(plan, 2) == ["t2v", "mi2v", "m2v", "m2v", "mi2v"]
    assert column(plan, 3) == ["17", "16", "9", "17", "16"]
    mm2v = planned(five, "model.video.frames=17", "continuity=mm2v", "first_shot=m2v")
    assert column(mm2v, 2) == ["m2v", "mm2v", "m2v", "m2v", "mm2v"]
    assert column(mm2v, 3) == ["17", "12", "9", "17", "12"]


def test_memory_grows_to_its_capacity(five: Story) -> None:
    assert column(planned(five), 4) == ["0", "3", "6", "9", "10"]
    assert column(planned(five, "memory.recall.capacity=4"), 4) == ["0", "3", "4", "4", "4"]
    assert column(planned(five, "memory.selector.max_keyframes=1"), 4) == ["0", "1", "2", "3", "4"]
    assert column(planned(five, "memory/recall=none"), 4) == ["0"] * 5


def test_references_are_memory_from_the_beginning(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        plain_image(tmp_path / name, (9, 9, 9))
    text = FIVE_SHOTS.replace("scenes:", "characters:\n  - {name: Dog, references: [a.png, b.png]}\nscenes:", 1)
    loaded = story(tmp_path, text.replace("frames: 9", "references: [c.png]"))
    plan = planned(loaded)
    assert column(plan, 2)[0] == "m2v"
    assert column(plan, 4) == ["2", "5", "9", "10", "10"]
    assert column(planned(loaded, "first_shot=t2v"), 4) == ["0", "5", "9", "10", "10"]


def test_tokens_and_operations_are_those_of_the_denoiser(five: Story) -> None:
    settings = generate_settings("model=tiny", "model.video.frames=17", "sampler.steps=4")
    plan, problems = make_plan(five, settings, Path("film"))
    assert not problems
    video = settings.model.video
    per_slot = video.height // 16 * (video.width // 16)
    assert column(plan, 5) == [str(slots * per_slot) for slots in (5, 3 + 5, 6 + 3, 9 + 5, 10 + 5)]
    last = forward_flops(
        settings.model.transformer,
        memory_joint(10, 5),
        height=video.height // 8,
        width=video.width // 8,
        text_tokens=settings.model.network.text_tokens,
    )
    assert float(rows(plan)[-1][6]) == pytest.approx(last.total / 1e15, rel=1e-2)
    assert float(rows(plan)[-1][7]) == pytest.approx(8 * last.total / 1e15, rel=1e-2)
    total = sum(float(value) for value in column(plan, 7))
    (line,) = [line for line in plan.splitlines() if line.startswith("total ")]
    assert float(line.split()[1]) == pytest.approx(total, rel=2e-2)
    assert "8 forwards a shot (4 steps)" in line


def test_cached_memory_is_computed_once_and_its_size_is_reported(five: Story) -> None:
    chosen = ("model=wan2.2-a14b", "model.memory_attention=cached", "model.adapter=null", "runtime=cpu")
    plan = planned(five, *chosen)
    without, *_, last = rows(planned(five, *chosen, "memory/recall=none")), *rows(plan)
    assert last[4:6] == ["10", "32760"]
    assert float(last[6]) / float(without[-1][6]) == pytest.approx(1.25, abs=0.01)
    assert float(last[7]) == pytest.approx(80 * float(last[6]) + 2 * 0.507, rel=5e-3)
    cached = "keys and values of 10 memory frames, 12.8 GB an expert, {} (runtime.memory_cache={})"
    assert cached.format("on the device", "device") in plan
    assert cached.format("in RAM", "cpu") in planned(five, *chosen, "runtime.memory_cache=cpu")
    again = planned(five, *chosen, "runtime.memory_cache=recompute")
    assert cached.format("not stored: recomputed in every step", "recompute") in again
    assert float(rows(again)[-1][7]) > 1.2 * float(last[7])
    assert "keys and values" not in planned(five, "model=wan2.2-a14b", "runtime=cpu")


@pytest.mark.parametrize("mode", ["joint", "cached"])
def test_every_second_pass_without_memory_counts_only_the_shot(five: Story, mode: str) -> None:
    chosen = ("model=wan2.2-a14b", f"model.memory_attention={mode}", "model.adapter=null", "runtime=cpu")
    shots, plain = (
        rows(planned(five, *chosen, f"sampler.negative_sees_memory={value}")) for value in ("false", "true")
    )
    without = rows(planned(five, *chosen, "memory/recall=none"))
    for shot, seeing, alone in zip(shots, plain, without, strict=True):
        mean = (float(seeing[7]) + float(alone[7])) / 2  # but the memory of the cached mode is computed as before
        assert float(shot[7]) == pytest.approx(mean, rel=4e-2), shot


def test_without_guidance_there_is_half_the_work(five: Story) -> None:
    assert "4 forwards a shot (4 steps)" in planned(five, "sampler.steps=4", "sampler.guidance=1")


def test_disk_is_the_sum_of_the_shots(five: Story) -> None:
    plan = planned(five, "model.video={height: 480, width: 832, frames: 81, fps: 16}")
    expected = 4 * estimated_bytes(81, 480, 832) + estimated_bytes(9, 480, 832)
    assert f"disk     at most {expected / 1e6:.0f} MB in film" in plan
    assert f"{81 + 80 + 9 + 81 + 80} frames at 16 fps: 20.7 s of film" in plan


def test_the_published_model_and_what_is_missing(five: Story) -> None:
    plan = planned(five, "model=wan2.2-a14b", "continuity=mm2v")
    assert column(plan, 5)[0] == "32760"
    assert column(plan, 5)[-1] == "48360"
    assert float(rows(plan)[-1][6]) == pytest.approx(3.1, abs=0.1)
    missing = [line for line in plan.splitlines() if line.startswith("weights  MISSING")]
    assert len(missing) == 3
    assert re.search(r"fetch    148 GB in all: 69 GB Wan2.2-I2V-A14B, 4.9 GB .*, 57 GB Wan2.2-T2V-A14B", plan)
    cards = [line for line in plan.splitlines() if line.startswith("time ")]
    bases = [line.partition("(")[2].partition(":")[0] for line in cards]
    assert bases == ["published", "measured"] + ["derived"] * 3
    total = float(next(line for line in plan.splitlines() if line.startswith("total ")).split()[1])
    hours = total * 327.8 / (80 * 1.68) / 3600  # by the published time of an H100
    assert f"{hours:.1f} h on H100" in cards[0] or f"{hours * 60:.0f} min on H100" in cards[0]
    larger = planned(five, "model=wan2.2-a14b", "model.video={height: 720, width: 1280}")
    assert re.search(r"^total    \d,\d{3} PFLOP", larger, re.MULTILINE), "a readable number"
    for command in (
        "hf download Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        'hf download Wan-AI/Wan2.2-T2V-A14B-Diffusers --include "transformer*/*"',
        'hf download Kevin-thu/StoryMem --include "Wan2.2-MM2V-A14B/*"',
    ):
        assert command in plan


def test_the_scorers_weights_are_listed_too(five: Story) -> None:
    plan = planned(five, "model=wan2.2-a14b")
    missing = [line for line in plan.splitlines() if line.startswith("scorer   MISSING")]
    assert [line.split("MISSING ")[1].split(":")[0] for line in missing] == [
        "CLIP ViT-B-32-quickgelu (openai)",
        "HPSv3",
        "Qwen2-VL tokenizer (for HPSv3)",
    ]
    light = planned(five, "model=wan2.2-a14b", "scorer/quality=laion-v1")
    assert "LAION aesthetic head v1" in light
    assert "HPSv3" not in light
    assert "scorer " not in planned(five, "model=tiny")


def test_vram_is_estimated_for_each_stage(five: Story) -> None:
    plan = planned(five, "model=wan2.2-a14b", "runtime=cpu", "memory.recall.capacity=4")
    (line,) = [line for line in plan.splitlines() if line.startswith("RAM ")]
    assert "VRAM" not in plan, "stages take place in RAM"
    assert "for 4 memory frames" in line
    for stage in ("texts 11.5 GB", "encode ", "denoise ", "decode ", "score "):
        assert stage in line
    settings = generate_settings("model=wan2.2-a14b", "runtime=cpu")
    scorers = scorer_bytes(settings.scorer.clip, settings.scorer.quality)
    expected = estimate_shot(settings.model, settings.runtime, memory_frames=4, scorers=scorers)
    assert line.startswith(f"RAM      {expected.shared_ram / 1e9:.1f} GB with idle scorers, at the peak")


def test_a_machine_that_is_too_small_is_marked(five: Story) -> None:
    plan = planned(five, "model=wan2.2-a14b", "model.video.frames=2501", "runtime.device=cpu")
    (line,) = [line for line in plan.splitlines() if line.startswith("machine")]
    assert line.startswith("machine  TOO SMALL: the CPU with ")
    assert "TOO SMALL" not in planned(five, "model=tiny", "runtime.device=cpu")


def test_the_cost_of_text_to_video_is_reported(five: Story) -> None:
    plan = planned(five, "model=wan2.2-a14b")
    assert "first_shot=m2v needs no Wan2.2-T2V-A14B (transformers): 57 GB of weights less" in plan
    assert "first_shot=m2v" not in planned(five, "model=wan2.2-a14b", "first_shot=m2v")
    assert "first_shot=m2v" not in planned(five, "model=tiny")


def test_weights_that_are_there_are_named(tmp_path: Path, five: Story) -> None:
    (tmp_path / "i2v").mkdir()
    plan = planned(five, "model.weights={name: mine, source: ./i2v}", "model.has_text_to_video=false", "first_shot=m2v")
    assert "weights  mine: i2v" in plan
    assert "MISSING" not in plan


def test_random_weights_are_reported(five: Story) -> None:
    assert "weights  random, from seed 3: the film will be noise" in planned(five, "model=tiny", "model.seed=3")


def test_an_unfinished_film_is_mentioned(tmp_path: Path, five: Story) -> None:
    assert "finished" not in planned(five)
    (tmp_path / "film").mkdir()
    Film(tmp_path / "film", story=five.to_dict(), config={}).save()
    assert "film     holds 0 takes; to make: shots 1, 2, 3, 4, 5\n" in planned(five)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+scorer.clip.folder=/nowhere", r"unknown key scorer\.clip\.folder"),
        ("scorer.clip._target_=mine.Clip", r"scorer\.clip\._target_=mine\.Clip cannot be imported: No module named"),
        ("+scorer.clip.batch_size=0", r"scorer\.clip: batch_size=0: must be 1 or more"),
        ("+scorer.clip.dtype=half", r"scorer\.clip: unknown dtype 'half'"),
        ("+scorer.clip.device=cpu", r"scorer\.clip\.device=cpu: it runs where runtime\.device says"),
        ("~scorer.clip.config", r"scorer\.clip\.config is missing"),
        ("scorer.quality.threshold=high", r"scorer\.quality: threshold='high': write a number"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_scorers_that_cannot_be_built_are_refused_before_anything_is_made(
    five: Story, tmp_path: Path, override: str, message: str, dry_run: bool
) -> None:
    config = composed(f"story={tmp_path / 'story.yaml'}", "model=tiny", override, f"dry_run={dry_run}")
    with pytest.raises(ValueError, match=message):
        generate(config)
    assert not Path("films").exists()
