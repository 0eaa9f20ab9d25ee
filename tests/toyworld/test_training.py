"""The recipe: every stage runs, resumes exactly, and what comes out loads through the public pipeline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor, nn

from storymem.scorers.aesthetic import AestheticScorer
from storymem.scorers.viclip import ViclipScorer
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from toyworld.base import MEMORY, Kind, draw_batch, draw_kind, recalled
from toyworld.contrast import THRESHOLD, draw_images
from toyworld.damage import DAMAGES, damage
from toyworld.fitting import Fit, averaged
from toyworld.latents import LatentStories, encode_stories, load_cache
from toyworld.text import TEXT_TOKENS, TextEmbedder, build_text_encoder, load_tokenizer, train_tokenizer
from toyworld.text_reading import ABSENT, QUESTIONS, answers
from toyworld.train import main
from toyworld.vae import build_vae, reconstruct, to_frames, to_video
from toyworld.world import HELD_OUT, story


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """Accelerate's state belongs to a process, in which other tests train with another precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Line(nn.Module):
    """A matrix in `blocks`, for Muon, and a bias, for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])

    def loss(self, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        x = torch.randn(16, 4, generator=rng)
        return (self.blocks[0](x).float() - x.flip(1)).square().mean(), {}


def trained(folder: Path, *, steps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> Line:
    """A line after as many runs as `steps` has numbers, each stopped after so many steps."""
    model = Line()
    for until in steps:
        model = Line()
        fit = Fit(model, folder, rate=0.05, device="cpu")
        clock = iter(range(10**6))  # a second a look at the clock: the schedule depends on nothing else
        monkeypatch.setattr("toyworld.fitting.time.monotonic", lambda ticks=clock: float(next(ticks)))
        fit.run(model.loss, 10, until=until)
        assert fit.step == until
    return model


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(tmp_path / "whole", steps=(60,), monkeypatch=monkeypatch)
    parts = trained(tmp_path / "parts", steps=(25, 60), monkeypatch=monkeypatch)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]
    assert not averaged(tmp_path / "whole", Line()).training


def test_a_stage_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train the stage base first"):
        averaged(tmp_path / "base", Line())
    with pytest.raises(ValueError, match="run the stage `latents` first"):
        load_cache(tmp_path)


@pytest.fixture(scope="module")
def data() -> LatentStories:
    torch.manual_seed(0)
    return encode_stories(build_vae(), range(3))


def nothing(texts: list[str]) -> Tensor:
    return torch.zeros(len(texts), TEXT_TOKENS, 128)


@pytest.mark.parametrize("before", [0, 1, 4, 7])
@pytest.mark.parametrize("is_frame", [False, True])
def test_a_batch_holds_memory_then_the_shot(data: LatentStories, before: int, is_frame: bool) -> None:
    kind = Kind(before=before, is_frame=is_frame)
    batch, again = (draw_batch(data, nothing, torch.Generator().manual_seed(1), kind, 5) for _ in range(2))
    memory, frames = min(before, MEMORY), 1 if is_frame else 5
    assert batch.memory_frames == memory
    assert batch.x0.shape == (5, 16, memory + frames, 8, 12)
    assert batch.condition is not None
    assert torch.equal(batch.condition[:, 4:, :memory], batch.x0[:, :, :memory]), "memory is clean in its condition"
    assert (batch.condition[:, :4, :memory] == 1).all()
    assert (batch.condition[:, :4, memory + 1 :] == 0).all()
    for name in ("x0", "condition", "noise", "u", "mask"):
        assert torch.equal(getattr(batch, name), getattr(again, name))


def test_memory_is_of_the_first_shots_and_the_latest() -> None:
    assert (recalled(2), recalled(7)) == ([0, 1], [0, 1, 2, 4, 5, 6])


def test_batches_are_of_every_kind() -> None:
    kinds = {draw_kind(torch.Generator().manual_seed(seed)) for seed in range(200)}
    assert {kind.is_frame for kind in kinds} == {True, False}
    assert {kind.before for kind in kinds} == {0, 1, 2, 4, 7}


def test_shots_that_go_on_are_given_their_first_frame(data: LatentStories) -> None:
    joined = [not shot.cut for seed in range(3) for shot in story(seed).shots]
    assert [row >= 0 for row in data.first_of.tolist()] == joined
    assert len(data.firsts) == sum(joined)
    assert data.prompts[9] == story(1).shots[1].prompt
    assert data.described[9].startswith(data.prompts[9])


def test_reconstruct_is_the_vaes_own_encode_and_decode() -> None:
    torch.manual_seed(0)
    vae, video = build_vae().eval(), to_video(story(0).shots[0].frames[None, :9])
    with torch.no_grad():
        latents = vae.encode(video).latent_dist.mode()
        ours, kl = reconstruct(vae, video, sample=False)
        torch.testing.assert_close(ours.clamp(-1, 1), vae.decode(latents).sample, rtol=0, atol=1e-4)
    assert latents.shape == (1, 16, 3, 8, 12)
    assert kl > 0
    np.testing.assert_array_equal(to_frames(video)[0], story(0).shots[0].frames[:9])


def test_a_prompt_with_looks_answers_every_question_and_a_plain_one_no_look() -> None:
    shot = next(s for seed in range(40) for s in story(seed).shots if len(s.cast) == 2)
    plain, described = (dict(zip(QUESTIONS, answers(shot, looks=looks), strict=True)) for looks in (False, True))
    assert ABSENT not in described.values()
    silent = {name for name, value in plain.items() if value == ABSENT}
    assert silent == set(QUESTIONS) - {"place", "time", "framing", "action"}


def test_the_tokenizer_reads_every_prompt_whole(tmp_path: Path) -> None:
    train_tokenizer(tmp_path, stories=150)
    tokenizer = load_tokenizer(tmp_path)
    prompts = [shot.prompt for seed in range(10) for shot in story(HELD_OUT + seed, looks=True).shots]
    for prompt, ids in zip(prompts, tokenizer(prompts).input_ids, strict=True):
        assert len(ids) <= TEXT_TOKENS
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt
    hidden = TextEmbedder(tokenizer, build_text_encoder(len(tokenizer)))(["Ada waits.", ""])
    assert hidden.shape == (2, TEXT_TOKENS, 128)
    assert (hidden[1, 1:] == 0).all()


def test_damaged_frames_say_so_in_their_text() -> None:
    images, texts, clean = draw_images(torch.Generator().manual_seed(0), 24)
    assert images.shape == (24, 3, 64, 96)
    assert [text.split(".")[0].lower() not in DAMAGES for text in texts] == clean.bool().tolist()
    with pytest.raises(ValueError, match="blurred"):
        damage(np.random.default_rng(0), np.zeros((64, 96, 3), dtype=np.uint8), "bent")


@pytest.mark.slow
@pytest.mark.parametrize("start", [False, True])
def test_every_stage_runs_and_the_result_makes_a_shot(tmp_path: Path, start: bool) -> None:
    """In a process in which PyAV and a display do not exist, as on a bare machine with a GPU."""
    arguments = ["--quick", "--minutes", "0.2", "--device", "cpu", "--work", str(tmp_path)]
    arguments += ["--start", "toyworld/weights"] if start else []
    code = "import sys; sys.modules['av'] = None; from toyworld.train import main; main()"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "DISPLAY": ""}
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=root, env=environment)
    weights = tmp_path / "weights"
    pipe = WanMemoryToVideoPipeline.from_pretrained(weights, torch_dtype=torch.float32, memory_attention="cached")
    frames = pipe(
        "Ada waits on the moon at night. Medium shot.",
        negative_prompt="",
        height=64,
        width=96,
        num_frames=17,
        num_inference_steps=2,
        memory=[Image.new("RGB", (96, 64), (200, 120, 40))],
        max_sequence_length=TEXT_TOKENS,
    ).frames
    assert frames.shape == (1, 17, 64, 96, 3)
    high, low = (expert.blocks[0].ffn.net[2].weight for expert in (pipe.transformer, pipe.transformer_2))
    assert not torch.equal(high, low), "each expert has a stage of its own"
    quality = AestheticScorer.from_folder(weights / "clip", threshold=THRESHOLD)
    assert quality.score(torch.rand(1, 3, 64, 96)).shape == (1,)
    assert ViclipScorer.from_folder(weights / "viclip").embed_texts(["Ada waits."]).shape == (1, 64)
    assert sum(path.stat().st_size for path in weights.rglob("*") if path.is_file()) <= 24e6


def test_an_unknown_stage_is_refused_with_those_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "bass"])
    with pytest.raises(SystemExit):
        main()
    assert "no stage bass: write some of text, vae" in capsys.readouterr().err
