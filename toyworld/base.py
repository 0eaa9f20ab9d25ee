"""The toy base model: two `WanTransformer3DModel` experts, trained from text and first frames.

First one network learns all noise levels; then each expert goes on from it in its own range. The text encoder is
frozen, and no memory is ever shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5Tokenizer, UMT5EncoderModel

from storymem.wan.conditioning import condition_channels
from storymem.wan.schedule import shifted, unshifted
from toyworld.fitting import Run, Schedule, fit
from toyworld.latents import LatentShots
from toyworld.text import embed

BOUNDARY = 0.9
SHIFT = 3.0
FIRST_FRAME, NO_TEXT, LOOKS = 0.5, 0.1, 0.5  # how often a sample has a first frame, no text, looks in its text
PEOPLE = 5.0  # they reach into a third of the latents, and are what must be told apart
RANGES = {"base": (0.0, 1.0), "high": (BOUNDARY, 1.0), "low": (0.0, BOUNDARY)}


def build_transformer() -> WanTransformer3DModel:
    """A fresh expert: 6 layers of width 192, 36 input channels as in Wan2.2-I2V-A14B."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=36,
        out_channels=16,
        text_dim=128,
        freq_dim=128,
        ffn_dim=512,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=1024,
    )


class Denoiser(nn.Module):
    """An expert and the frozen text encoder that it reads."""

    def __init__(self, transformer: WanTransformer3DModel, text_encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder.requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step is made of: clean latents x0 [B, 16, T, h, w], their condition [B, 20, T, h, w], where people are
    [B, T, h, w], the texts, noise and levels [B]."""

    x0: Tensor
    condition: Tensor
    people: Tensor
    texts: list[str]
    noise: Tensor
    levels: Tensor


def draw_batch(data: LatentShots, step: int, size: int, span: tuple[float, float], *, plain: bool = False) -> Batch:
    """The batch of a step: it depends on the step alone. With `plain`: always text with looks, no first frame."""
    rng = torch.Generator().manual_seed(1000 + step)
    index = torch.randint(len(data.prompts), (size,), generator=rng)
    chance = torch.rand(3, size, generator=rng)
    given = (chance[0] < FIRST_FRAME) & (not plain)
    x0 = data.shots[index].float()
    latents = torch.where(given[:, None, None, None, None], data.firsts[index].float(), data.blank.float())
    condition = [condition_channels(None, each[None], int(g)) for each, g in zip(latents, given, strict=True)]
    texts = []
    for i, silent, looks in zip(index.tolist(), chance[1] < NO_TEXT, chance[2] < LOOKS, strict=True):
        text = data.described[i] if looks or plain else data.prompts[i]
        texts.append("" if silent and not plain else text)
    low, high = (unshifted(s, SHIFT) for s in span)
    levels = shifted(low + (high - low) * torch.rand(size, generator=rng), SHIFT)
    noise = torch.randn(x0.shape, generator=rng)
    return Batch(
        x0=x0,
        condition=torch.cat(condition),
        people=data.people[index].float(),
        texts=texts,
        noise=noise,
        levels=levels,
    )


def flow_errors(model: Denoiser, tokenizer: T5Tokenizer, batch: Batch) -> Tensor:
    """Squared errors [B, T, h, w] of the predicted velocity e - x0 at x = (1 - s) x0 + s e, means over channels."""
    s = batch.levels.view(-1, 1, 1, 1, 1)
    noisy = (1 - s) * batch.x0 + s * batch.noise
    # On CPUs the fused attention's backward pass takes ten times as long as the plain one at this size.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        words = embed(tokenizer, model.text_encoder, batch.texts)
        predicted = model.transformer(
            torch.cat([noisy, batch.condition], dim=1), 1000 * batch.levels, words, return_dict=False
        )[0]
    return (predicted.float() - (batch.noise - batch.x0)).square().mean(dim=1)


def flow_loss(model: Denoiser, tokenizer: T5Tokenizer, batch: Batch) -> Tensor:
    """The mean of `flow_errors`, in which people count `PEOPLE` times as much as the place."""
    weights = 1 + (PEOPLE - 1) * batch.people
    return (weights * flow_errors(model, tokenizer, batch)).mean() / weights.mean()


@torch.no_grad()
def held_out_loss(
    model: Denoiser, tokenizer: T5Tokenizer, data: LatentShots, span: tuple[float, float], batches: int = 4
) -> tuple[float, float]:
    """The plain loss on held-out shots with fixed noise: of the whole picture, and of where people are."""
    drawn = [draw_batch(data, -1 - k, 16, span) for k in range(batches)]
    errors = torch.stack([flow_errors(model, tokenizer, batch) for batch in drawn])
    people = torch.stack([batch.people for batch in drawn])
    return float(errors.mean()), float((errors * people).sum() / people.sum())


def train_denoiser(
    run: Run,
    schedule: Schedule,
    model: Denoiser,
    tokenizer: T5Tokenizer,
    data: LatentShots,
    held_out: LatentShots,
    *,
    expert: str,
    size: int = 16,
    compiled: bool = False,
    draw: Callable[[Denoiser, int], None] | None = None,
) -> None:
    """Train on one range of noise levels: "base" (all), "high" or "low".

    compiled: a third faster, after a minute of compiling.
    """
    span = RANGES[expert]
    if compiled:
        model.transformer.compile_repeated_blocks(fullgraph=True)

    def loss(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        return flow_loss(model, tokenizer, draw_batch(data, step, size, span)), {}

    def report(step: int) -> None:
        whole, people = held_out_loss(model, tokenizer, held_out, span)
        run.log(step=step, held_out_loss=whole, held_out_loss_people=people)
        if draw is not None:
            draw(model, step)

    fit(model, run, schedule, loss, report=report)
