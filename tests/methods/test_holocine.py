"""HoloCine: agreement with the published code, and its networks as a method.

``STORYMEM_REFERENCE=/some/folder`` runs every case of this format below that folder; see ``tests/reference``.
"""

from __future__ import annotations

import json
import shutil
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from storymem.evaluation.films import find_films
from storymem.film.folder import Film
from storymem.media.video import read_video
from storymem.methods.holocine import (
    HoloCine,
    TokenRanges,
    captions_of,
    film_prompt,
    plan_film,
    token_ranges,
    window_texts,
)
from storymem.methods.joint import FilmRequest, film_inputs
from storymem.story import Story, load_story
from storymem.wan.loading import load_pipeline
from storymem.wan.segments import Keys, Layout, Text, holocine
from storymem.weights import MissingWeights
from tests.composing import composed
from tests.references import folders_with, label
from tests.wan.tiny import CPU, settings

TOLERANCE = 1e-4
CASES = [folder for folder in folders_with("case.json") if "shot_ranges" in (folder / "case.json").read_text()]
each_case = pytest.mark.parametrize("folder", CASES, ids=label)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "case.json").read_text()), load_file(folder / "tensors.safetensors")


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def request_of(folder: Path, *, sparse: bool) -> FilmRequest:
    """A case as the method would make it from its prompt and cuts."""
    case, _ = read(folder)
    length = case["text_len"]
    plan = plan_film(len(case["shot_ranges"]), case["requested_frames"], case["requested_cuts"])
    windows = window_texts(token_ranges(case["prompt"], tokenizer_of(folder), length), len(plan.shots), length)
    return FilmRequest(
        layout=holocine(plan.latent_frames, windows, sparse=sparse),
        negative_layout=holocine(plan.latent_frames, [Text()] * len(windows), sparse=sparse),
        texts=(case["prompt"],),
        videos=(plan.frames,),
        shots=plan.shots,
        seed=case["seed"],
    )


def method_of(folder: Path, others: Path, *overrides: str, name: str = "holocine") -> HoloCine:
    """The method with the networks of a case as the published ones, and ``others`` as the folder of VAE and texts."""
    case, _ = read(folder)
    base = ("model=wan2.2-a14b", "runtime=cpu", "model.dtype=float32", "scorer/quality=none")
    text = (f"model.network.text_tokens={case['text_len']}", f"model.weights.source={others}")
    node = composed(f"method={name}", *base, *text, *overrides, name="eval_stbench")["method"]
    transformer = {key: value for key, value in case["config"].items() if key != "in_channels"}
    node["generate"]["model"]["network"]["transformer"] = transformer
    released = node["released"]
    released["sampler"]["steps"] = case["steps"]
    released["video"] = {"height": case["height"], "width": case["width"], "frames": case["num_frames"], "fps": 15}
    for expert, weights in released["experts"].items():
        weights |= {"source": str(folder), "file": f"{expert}.safetensors"}
    return instantiate(node, _convert_="all")


def others_for(folder: Path, target: Path) -> Path:
    """A folder in diffusers' layout with a VAE, a text encoder and the tokenizer of a case, and no transformers."""
    case, _ = read(folder)
    pipe = load_pipeline(settings(), runtime=CPU)
    network = dict(pipe.text_encoder.config.to_dict(), d_model=case["config"]["text_dim"], vocab_size=1024)
    pipe.text_encoder = type(pipe.text_encoder)(type(pipe.text_encoder.config)(**network))
    pipe.transformer = pipe.transformer_2 = None
    pipe.save_pretrained(target)
    shutil.rmtree(target / "tokenizer")
    shutil.copytree(folder / "tokenizer", target / "tokenizer")
    index = json.loads((target / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    (target / "model_index.json").write_text(json.dumps(index))
    return target


# Agreement


@each_case
def test_captions_are_found_and_cuts_rounded_as_by_the_published_code(folder: Path) -> None:
    case, given = read(folder)
    tokenizer = tokenizer_of(folder)
    for text in (case, *case["text_cases"]):
        found = token_ranges(text["prompt"], tokenizer, case["text_len"])
        assert (found.whole and list(found.whole)) == text["global_range"], text["prompt"]
        assert list(map(list, found.shots)) == text["shot_ranges"], text["prompt"]
    own = {"shots": len(case["shot_ranges"]), "shot_index": given["shot_index"].tolist()}
    for asked in (case | own, *case["plan_cases"]):
        plan = plan_film(asked["shots"], asked["requested_frames"], asked["requested_cuts"])
        assert (plan.frames, list(plan.cuts)) == (asked["num_frames"], asked["cut_frames"])
        assert list(plan.shot_index) == asked["shot_index"]
        assert sum(plan.shots) == plan.frames
    if "global_caption" in case:
        assert film_prompt(case["global_caption"], case["shot_captions"]) == case["prompt"]


def text_mask(layout: Layout, frame: int, length: int) -> Tensor:
    """Which text tokens each video token may read."""
    rows = []
    for segment in layout.segments:
        row = torch.zeros(length, dtype=torch.bool)
        assert segment.text is not None
        for first, end in segment.text.spans or ((0, length),):
            row[first:end] = True
        rows += [row] * (segment.frames * frame)
    return torch.stack(rows)


def multiplicity(layout: Layout, frame: int) -> Tensor:
    """How often each key counts for each query."""
    counts = torch.zeros(layout.frames * frame, layout.frames * frame, dtype=torch.uint8)
    for segment in layout.segments:
        span = layout.span(segment.name)
        for keys in segment.reads[0]:
            read = layout.span(keys.segment if isinstance(keys, Keys) else keys)
            end = read.start + keys.frames if isinstance(keys, Keys) else read.stop
            counts[span.start * frame : span.stop * frame, read.start * frame : end * frame] += 1
    return counts


@each_case
def test_masks_are_equal(folder: Path) -> None:
    case, given = read(folder)
    layout, frame = request_of(folder, sparse=True).layout, case["height"] * case["width"] // 256
    assert torch.equal(text_mask(layout, frame, case["text_len"]), given["cross_mask"])
    assert torch.equal(multiplicity(layout, frame), given["self_multiplicity"])


@each_case
@pytest.mark.parametrize("sparse", [False, True], ids=["full", "sparse"])
def test_a_whole_sampling_agrees(folder: Path, sparse: bool, tmp_path: Path) -> None:
    case, given = read(folder)
    method = method_of(folder, others_for(folder, tmp_path / "others"), f"method.sparse={sparse}")
    pipe = load_pipeline(method.model, runtime=CPU, sampler=method.sampler, text_encoder=False)
    used = []
    for name, expert in zip(("high", "low"), pipe.experts.values(), strict=True):
        expert.register_forward_pre_hook(lambda *_, name=name: used.append(name))
    request = request_of(folder, sparse=sparse)
    text, negative = (given[name][None] for name in ("prompt_embeds", "negative_prompt_embeds"))
    noise, inputs = film_inputs(request, pipe, [text], negative, case["height"], case["width"])
    assert torch.equal(noise[0], given["noise"])
    pipe.set_progress_bar_config(disable=True)
    latents = pipe.denoise(
        noise,
        inputs,
        num_inference_steps=method.sampler.steps,
        guidance_scale=method.sampler.guidance,
    )
    assert used[::2] == case["experts"]
    torch.testing.assert_close(pipe.scheduler.timesteps, given["timesteps"])
    theirs = given[f"{'sparse' if sparse else 'full'}.latents_final"]
    assert ((latents[0] - theirs).norm() / theirs.norm()).item() <= TOLERANCE


# The published networks as a method


STORY = """\
title: The Bridge
overview: Nia bakes bread and Nia's boy rides away.
style: Film still
characters:
  - {name: Nia, description: a young baker in a white apron.}
  - {name: Bo}
scenes:
  - shots:
      - {prompt: "Nia opens the shop.", characters: [Nia]}
      - {prompt: "Bo, Niall and Nia wave."}
"""


@pytest.fixture
def story(tmp_path: Path) -> Story:
    (tmp_path / "s.yaml").write_text(STORY)
    return load_story(tmp_path / "s.yaml")


def test_characters_with_descriptions_are_numbered(story: Story) -> None:
    whole, shots = captions_of(story)
    assert whole == (
        "Film still: [character1] bakes bread and [character1]'s boy rides away. "
        "[character1] is a young baker in a white apron."
    )
    assert shots == ["[character1] opens the shop.", "Bo, Niall and [character1] wave."]


def with_lengths(story: Story, *frames: int | None, seed: int | None = None) -> Story:
    from dataclasses import replace

    shots = [replace(shot, frames=n, seed=seed) for shot, n in zip(story.shots, frames, strict=True)]
    return replace(story, scenes=(replace(story.scenes[0], shots=tuple(shots)),))


def test_the_published_networks_make_a_film_in_one_denoising(story: Story, tmp_path: Path) -> None:
    folder = CASES[0]
    case, _ = read(folder)
    roomy = "model.network.text_tokens=160"
    method = method_of(folder, others_for(folder, tmp_path / "others"), roomy, name="holocine_sparse")
    assert method.sparse
    method.check(story)
    request = method.request(story)
    assert request.videos == (case["num_frames"],)
    assert list(accumulate(request.shots))[:-1] == list(plan_film(2, case["num_frames"]).cuts)
    method.run(story, tmp_path / "film")
    film = Film.open(tmp_path / "film")
    assert tuple(take.frames for take in film.shots) == request.shots
    assert {take.seed for take in film.shots} == {0}
    assert film.video is not None
    assert len(read_video(film.video)) == case["num_frames"]
    assert film.config["method"] == {"name": "HoloCine", "sparse": True, "one_video": True}
    assert find_films(tmp_path / "film", [story]).films[0].one_video, "its cuts are the model's own"
    assert method.request(with_lengths(story, 5, 12, seed=7)).shots == (5, 12)
    assert method.request(with_lengths(story, 5, 12, seed=7)).seed == 7
    with pytest.raises(ValueError, match=rf"do not fit a film of {case['num_frames']} frames at most"):
        method.request(with_lengths(story, 81, None))
    few = method_of(folder, tmp_path / "others", "model.network.text_tokens=40")
    with pytest.raises(ValueError, match=r"40 tokens hold the captions of \d of 2 shots: shorten the prompts"):
        few.check(story)


def test_networks_that_are_missing_or_do_not_fit_are_named(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    absent = composed("method=holocine_sparse", "model=wan2.2-a14b", "runtime=cpu", name="eval_stbench")["method"]
    with pytest.raises(MissingWeights) as error:
        instantiate(absent, _convert_="all").check(story)
    for part in ("hlwang06/HoloCine", "sparse_high_noise.safetensors", "sparse_low_noise.safetensors", "28.6 GB"):
        assert part in str(error.value)
    assert "CC BY-NC-SA" in str(error.value)
    assert "StoryMem memory adapter" not in str(error.value)

    folder = shutil.copytree(CASES[0], tmp_path / "case")
    weights = load_file(folder / "low_noise.safetensors")
    del weights["blocks.1.ffn.2.weight"]
    save_file(weights, folder / "low_noise.safetensors")
    with pytest.raises(ValueError, match=r"low_noise.safetensors does not contain .*\n *missing \(1\):\n *blocks\.1"):
        method_of(folder, others_for(folder, tmp_path / "others")).check(story)


def test_a_prompt_without_windows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the prompt has no \[global caption\]"):
        window_texts(TokenRanges(None, ((0, 4),)), 1, 16)
    with pytest.raises(ValueError, match=r"16 tokens hold the captions of 1 of 2 shots"):
        window_texts(TokenRanges((0, 4), ((4, 15),)), 2, 16)
    with pytest.raises(ValueError, match=r"\[shot cut\] separates the captions"):
        film_prompt("A town.", ["One. [shot cut] Two."])
    assert "contains" not in film_prompt("This scene contains a dog.", ["It runs."]).replace("This scene contains", "")
