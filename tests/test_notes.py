"""The plan and the start of a run report what a model does not read of a story."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import pytest

from storymem.film.generate import generate_films
from storymem.story import Story, load_story
from storymem.story.notes import text_notes
from storymem.wan.settings import SamplerSettings
from storymem.wan.texts import KNOWN_WORDS, TextReader
from tests.composing import composed, generate_settings
from tests.stories import story
from toyworld import WEIGHTS
from toyworld.text import write_known_words

ROOT = Path(__file__).parents[1]
LONG = "Ada waits in the desert at noon. " * 20
TWO_PROMPTS = """\
title: Two
overview: A walk.
scenes:
  - shots:
      - {{prompt: "{0}"}}
      - {{prompt: "{1}"}}
"""


@cache
def reading(model: str, *overrides: str) -> tuple[TextReader | None, SamplerSettings]:
    """How a model reads texts, and its sampler."""
    settings = generate_settings(f"model={model}", *overrides)
    return TextReader.of(settings.model), settings.sampler


def notes_of(loaded: Story, model: str = "toy", overrides: tuple[str, ...] = ()) -> list[str]:
    return text_notes(loaded, *reading(model, *overrides), model=model)


def notes(folder: Path, *prompts: str, model: str = "toy", overrides: tuple[str, ...] = ()) -> list[str]:
    return notes_of(story(folder, TWO_PROMPTS.format(*prompts)), model, overrides)


def test_prompts_that_are_read_whole_give_no_notes(tmp_path: Path) -> None:
    assert notes(tmp_path, "Ada waits in the desert at noon. Medium shot.", "Close-up. Ada turns.") == []


@pytest.mark.parametrize("model", ["toy", "tiny"])
def test_the_truncated_end_of_a_prompt_is_reported_with_its_shot(tmp_path: Path, model: str) -> None:
    overrides = ("sampler.negative_prompt=''",)
    (cut,) = notes(tmp_path, "Ada waits.", f"{LONG}Ada turns to the left.", model=model, overrides=overrides)
    assert cut.startswith("shot 2 (scene 1, shot 2): the prompt has ")
    assert f"and {model} reads {80 if model == 'toy' else 128}; it does not read " in cut
    assert "Ada turns to the left." in cut


def test_the_words_beyond_the_limit_are_truncated(tmp_path: Path) -> None:
    reader, _ = reading("toy")
    assert reader is not None
    words = ["Ada", "waits", "in", "the", "desert", "at", "noon."]
    count = next(n for n in range(1, 200) if reader.read(" ".join(words[k % 7] for k in range(n))).cut)
    whole, cut = (" ".join(words[k % 7] for k in range(n)) for n in (count - 1, count))
    assert (reader.read(whole).cut, reader.read(whole).tokens <= 80) == ("", True)
    assert reader.read(cut).cut == cut.split()[-1]


def test_texts_without_spaces_are_truncated_at_characters() -> None:
    reader, _ = reading("tiny")
    assert reader is not None
    text = "林黛玉在花园里走路" * 9  # three bytes a character, each a token
    assert reader.read(text).cut == text[-38:]


def test_negative_prompts_are_checked_if_guidance_is_used(tmp_path: Path) -> None:
    negative = f"sampler.negative_prompt={LONG}"
    (cut,) = notes(tmp_path, "Ada waits.", "Ada turns.", overrides=(negative,))
    assert cut.startswith("sampler.negative_prompt has ")
    assert (
        notes(
            tmp_path,
            "Ada waits.",
            "Ada turns.",
            overrides=(negative, "sampler.guidance=1", "sampler.negative_sees_memory=true"),
        )
        == []
    )
    own = TWO_PROMPTS.replace('"{1}"', f'"Ada.", negative_prompt: "{LONG}"')
    (cut,) = notes_of(story(tmp_path, own.format("Ada waits.")), overrides=("sampler.negative_prompt=''",))
    assert cut.startswith("shot 2 (scene 1, shot 2): the negative prompt has ")


def test_unknown_words_are_reported_with_similar_ones(tmp_path: Path) -> None:
    unknown, known = notes(tmp_path, "A woman in a red coat walked.", "Ada jumped over 3 tents; é!")
    assert unknown.startswith("words that toy does not know: woman, coat, walked (walks?), jumped (jump?), over")
    assert unknown.endswith("; in shot 1 (scene 1, shot 1), shot 2 (scene 1, shot 2)")
    for sign in ("3", ";", "é", "!", "tents (tent?)"):
        assert f", {sign}" in unknown
    assert "model=wan2.2-a14b knows all words" in known
    listed = known.partition("listed in ")[2].partition(";")[0]
    assert "Ada" in Path(listed).read_text().splitlines()
    assert not any("does not know" in line for line in notes(tmp_path, "A woman.", "3 tents", model="tiny"))


def test_long_lists_of_notes_are_shortened_and_counted(tmp_path: Path) -> None:
    shots = "".join(f'      - {{prompt: "{LONG}"}}\n' for _ in range(30))
    lines = notes_of(story(tmp_path, f"title: T\noverview: O\nscenes:\n  - shots:\n{shots}"))
    assert (len(lines), lines[-1]) == (21, "10 more texts are truncated")


def test_the_known_words_are_those_of_the_training_captions(tmp_path: Path) -> None:
    write_known_words(tmp_path)
    assert (tmp_path / KNOWN_WORDS).read_text() == (WEIGHTS / "tokenizer" / KNOWN_WORDS).read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_is_for_the_embedded_model_or_names_its_model(path: Path) -> None:
    lines = notes_of(load_story(path))
    for_another = path.read_text().startswith("# For model=wan2.2-a14b")
    assert bool(lines) == for_another, lines
    (row,) = [line for line in (ROOT / "examples" / "README.md").read_text().splitlines() if f"`{path.name}`" in line]
    assert ("`model=wan2.2-a14b`" in row) == for_another


@pytest.mark.parametrize("path", sorted((ROOT / "st_bench" / "toy").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_toy_stories_give_no_notes(path: Path) -> None:
    assert notes_of(load_story(path)) == []


def test_the_plan_and_the_run_print_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = story(tmp_path, TWO_PROMPTS.format(f"{LONG}THE END", "A woman waits."))
    config = composed(f"story={loaded.source}", "model=tiny", "sampler.steps=1", "model.video.frames=5", "output=film")
    generate_films(config | {"dry_run": True})
    plan = capsys.readouterr()
    (line,) = [line for line in plan.out.splitlines() if line.startswith("note     shot 1 (scene 1, shot 1): ")]
    assert line.endswith('THE END" (541 characters)')
    monkeypatch.setattr("storymem.film.generate.build_generator", lambda settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate_films(config)
    assert line.removeprefix("note     ") in capsys.readouterr().err.splitlines(), (
        "printed before anything is generated"
    )


def test_a_plan_without_weights_notes_that_tokens_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = story(tmp_path, TWO_PROMPTS.format("Ada waits.", "Ada turns."))
    with pytest.raises(ValueError, match="not ready"):
        generate_films(composed(f"story={loaded.source}", "model=wan2.2-a14b", "runtime=cpu", "dry_run=true"))
    assert "prompts are not counted: no readable tokenizer of wan2.2-a14b is on this machine" in capsys.readouterr().out


def test_a_damaged_tokenizer_is_named_by_the_plan_with_all_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(WEIGHTS, tmp_path / "weights")
    (tmp_path / "weights" / "tokenizer" / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    loaded = story(tmp_path, TWO_PROMPTS.format("Ada waits.", "Ada turns."))
    with pytest.raises(ValueError, match="not ready: 1 marked"):
        generate_films(
            composed(f"story={loaded.source}", f"model.weights.source={tmp_path / 'weights'}", "dry_run=true")
        )
    plan = capsys.readouterr().out
    assert f"UNFIT: {tmp_path / 'weights' / 'tokenizer'} contains no readable" in plan
    assert "prompts are not counted: no readable tokenizer of toy is on this machine" in plan
