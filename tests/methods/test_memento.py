"""Memento's films: texts, the pool of each expert, resuming, and adapters that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from storymem.config import build_settings
from storymem.film.folder import Film
from storymem.film.manifest import Slot
from storymem.methods.memento import Memento, MementoModel, captions_of
from storymem.story import Story
from storymem.wan.keyframe_query import KeyframeQuery
from storymem.wan.loading import load_pipeline
from storymem.wan.lora import adapted_linears
from storymem.wan.lora_files import AdapterInfo, write_memory_lora
from storymem.wan.settings import ModelSettings, RuntimeSettings
from storymem.wan.spec import experts_of
from storymem.weights import Weights
from tests.composing import TINY, composed
from tests.stories import content, story

FOUR = """\
title: The Red Boat
overview: Ada rows out and comes home.
characters:
  - {name: Ada, description: a woman in a red coat.}
  - {name: Ben}
scenes:
  - shots:
      - {prompt: "Ada pushes a boat.", characters: [Ada]}
      - {prompt: "Ada rows. Ben waves.", characters: [Ada, Ben], cut: false}
  - shots:
      - {prompt: "Ben waits.", characters: [Ben]}
      - {prompt: "Ada lands.", characters: [Ada]}
"""
PUBLISHED = MementoModel(weights=Weights(name="w", source="x"))


def write_adapter(folder: Path, *, query: bool = True, objective: str = "memento") -> Path:
    """An adapter in the published layout for the networks of ``TINY``."""
    values = composed("method=storymem", *TINY, name="eval_stbench")["model"]
    pipe = load_pipeline(build_settings(ModelSettings, values), runtime=RuntimeSettings(device="cpu"))
    states: dict[Any, dict[str, torch.Tensor]] = {}
    for number, (expert, transformer) in enumerate(experts_of(pipe).items()):
        torch.manual_seed(number)
        state = states[expert] = {}
        for name in adapted_linears(transformer):
            out, inside = transformer.get_submodule(name).weight.shape
            state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = torch.randn(2, inside), torch.zeros(out, 2)
        if query:
            network = KeyframeQuery.of(transformer).state_dict()
            state |= {f"keyframe_query.{name}": tensor for name, tensor in network.items()}
    info = AdapterInfo(rank=2, alpha=2.0, objective=objective)
    write_memory_lora(states, folder, info=info, layout="released")
    return folder


def method(adapter: Path, *overrides: str) -> Memento:
    models = f"method.models.tiny.weights={{name: tiny, source: {adapter}}}"
    run = composed("method=memento", *TINY, models, *overrides, name="eval_stbench")
    return instantiate(run["method"], _convert_="all")


def test_texts_have_the_published_form(tmp_path: Path) -> None:
    loaded = story(tmp_path, FOUR)
    texts = captions_of(loaded, loaded.shots[1], PUBLISHED)
    look = "a woman in a red coat"
    whole = f"[Person A]: {look}"
    assert texts.prompt == f"global caption: {whole}; shot caption: [Person A] rows. [Person B] waves."
    assert (texts.whole, texts.subject) == (whole, f"[Person A] {look}")
    written = story(
        tmp_path,
        FOUR.replace("Ada pushes a boat.", "global caption: X: y; shot caption: z").replace(
            "title: ", 'reconstruct_target: "one\\ntwo"\ntitle: '
        ),
    )
    texts = captions_of(written, written.shots[0], PUBLISHED)
    assert (texts.whole, texts.subject) == ("X: y", "one\ntwo")
    assert texts.prompt == "global caption: X: y; shot caption: z"
    bare = story(tmp_path, FOUR.replace(", description: a woman in a red coat.", ""))
    plain = MementoModel(weights=PUBLISHED.weights, persons=False, subject="earlier_shot")
    texts = captions_of(bare, bare.shots[3], plain)
    assert (texts.prompt, texts.whole, texts.subject) == ("Ada lands.", "Ada lands.", "Ada pushes a boat.")
    assert captions_of(bare, bare.shots[3], PUBLISHED).subject is None
    titled = story(tmp_path, FOUR.replace("Ada", "Dr. A."))
    assert captions_of(titled, titled.shots[0], PUBLISHED).prompt.endswith("shot caption: [Person A] pushes a boat.")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"))


def test_each_expert_has_its_pool_and_a_film_is_resumed(adapter: Path, tmp_path: Path) -> None:
    loaded: Story = story(tmp_path, FOUR)
    memento = method(adapter)
    memento.check(loaded)
    memento.run(loaded, tmp_path / "film")
    film = Film.open(tmp_path / "film")
    assert [shot.mode for shot in film.shots] == ["t2v", "mi2v", "m2v", "m2v"]
    assert [len(shot.keyframes) for shot in film.shots] == [8, 8, 8, 8]
    assert [k.frame for k in film.shots[0].keyframes] == [1, 2, 3, 4, 6, 7, 8, 9]
    left = [{k.id for k in shot.keyframes} for shot in film.shots]
    assert film.shots[0].memory_of == {}
    assert {expert: set(ids) for expert, ids in film.shots[1].memory_of.items()} == dict.fromkeys(
        ("high_noise", "low_noise"), left[0]
    )
    for before, shot in zip(film.shots[1:], film.shots[2:], strict=False):
        for expert, ids in shot.memory_of.items():
            assert len(ids) == 8
            assert set(ids) <= set(before.memory_of[expert]) | left[before.index], "what was left out is forgotten"
        assert set(shot.memory) == {id for ids in shot.memory_of.values() for id in ids}
    assert film.shots[3].memory_of["high_noise"] != film.shots[3].memory_of["low_noise"]

    whole = content(tmp_path / "film")
    film.slots[3] = Slot(folder=film.slots[3].folder)  # a film that was interrupted
    film.save()
    method(adapter).run(loaded, tmp_path / "film")
    assert content(tmp_path / "film") == whole


def test_a_story_without_descriptions_has_no_subject(adapter: Path, tmp_path: Path) -> None:
    bare = story(tmp_path, FOUR.replace(", description: a woman in a red coat.", ""))
    memento = method(adapter, "sampler.guidance=2")
    assert memento.settings.sampler.negative_prompt, "else the text of a missing subject would be encoded anyhow"
    memento.run(bare, tmp_path / "film")
    assert [len(shot.memory) > 0 for shot in Film.open(tmp_path / "film").shots] == [False, True, True, True]


def test_what_does_not_fit_is_reported_first(adapter: Path, tmp_path: Path) -> None:
    loaded = story(tmp_path, FOUR)
    with pytest.raises(InstantiationException, match=r"runtime\.experts=in_turn loads one expert.*learned recall"):
        method(adapter, "runtime.experts=in_turn")
    with pytest.raises(ValueError, match="holds no KeyframeQuery"):
        method(write_adapter(tmp_path / "plain", query=False)).check(loaded)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        method(tmp_path / "nothing").check(loaded)
    plain = f"model.adapter={{weights: {{name: x, source: {adapter}}}}}"
    run = composed("method=storymem", *TINY, plain, name="eval_stbench")["method"]
    with pytest.raises(ValueError, match=r"objective=memento, not\s+memory"):
        instantiate(run, _convert_="all").check(loaded)
    run = composed("method=memento", *TINY, "model.name=tony", name="eval_stbench")["method"]
    with pytest.raises(InstantiationException, match=r"no weights for model 'tony'.*did you mean 'toy'"):
        instantiate(run, _convert_="all")


def test_missing_published_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    run = composed("method=memento", "model=wan2.2-a14b", "runtime=cpu", name="eval_stbench")["method"]
    with pytest.raises(FileNotFoundError, match=r"(?s)backbone_\*_noise.*3.3 GB.*Apache-2.0"):
        instantiate(run, _convert_="all").check(story(tmp_path, FOUR))


def test_storymem_recalls_by_the_query_of_its_adapter(tmp_path: Path) -> None:
    loaded = story(tmp_path, FOUR)
    learned = ["memory/recall=learned", "memory.recall={capacity: 4, sink: 1, whole: 1}", "memory/selector=uniform"]

    def storymem(adapter: Path) -> Any:
        model = f"model.adapter={{weights: {{name: x, source: {adapter}}}}}"
        run = composed("method=storymem", *TINY, model, *learned, name="eval_stbench")["method"]
        return instantiate(run, _convert_="all")

    with pytest.raises(ValueError, match="holds no KeyframeQuery, with which keyframes are recalled"):
        storymem(write_adapter(tmp_path / "plain", query=False, objective="memory")).check(loaded)
    method = storymem(write_adapter(tmp_path / "adapter", objective="memory"))
    method.check(loaded)
    method.run(loaded, tmp_path / "film")
    shots = Film.open(tmp_path / "film").shots
    assert [len(shot.memory) for shot in shots] == [0, 3, 4, 4]
    assert all(shot.memory[0] == shots[0].keyframes[0].id for shot in shots[1:]), "the sink"
    assert shots[3].memory_of == {}
