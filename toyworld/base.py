"""The toy base model: `WanTransformer3DModel` experts, trained from text, first frames and memory.

Unlike Wan, this base has seen memory: in most of its samples earlier frames of the story stand before the shot, as the
`cached` layout has them. A network this small would otherwise need hours to learn what an adapter is to add.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from storymem.training.objectives.memory import MemoryBatch, MemoryObjective
from storymem.training.objectives.settings import MemoryObjectiveSettings
from storymem.wan.conditioning import condition_channels
from storymem.wan.segments import DEFAULT_STRIDE
from storymem.wan.spec import Expert
from toyworld.latents import KEYFRAMES, LatentStories
from toyworld.text import TextEmbedder

BOUNDARY = 0.9
MEMORY, SINK = 6, 3  # memory frames of a sample: one a shot, the first three shots and the latest
PEOPLE = 4.0  # how often the loss counts where characters are
NO_MEMORY, NO_TEXT, ONE_FRAME = 0.35, 0.1, 0.3  # shares of batches, of texts, of batches of single frames
# Shares of texts with looks. Without memory and looks the network invents somebody, as in a film's first shot.
LOOKS_TOLD = {"with memory": 0.15, "without": 0.4}
# Share of samples with memory from stories of several characters, who are told apart last. Memory of fewer shots than
# ALL_SHOWN is of stories of one: in the others it may show somebody else.
SEVERAL, ALL_SHOWN = 0.8, 4
# How many shots before may give memory: few numbers, for every shape is compiled once.
SHOT_BEFORE, FRAME_BEFORE = (1, 2, 4, 7), (4, 7)
SIZES = {False: 24, True: 48}  # samples of a batch of shots, and of single frames
TWICE = 0.3  # how often few shots give two memory frames each


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


#: Flow matching on the video's frames, at all noise levels.
LOSS = MemoryObjective(
    settings=MemoryObjectiveSettings(shift=3.0, memory_weight=0.0, mask_weight=PEOPLE),
    boundary=None,
    rope_stride=DEFAULT_STRIDE,
    memory_attention="cached",
)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What all samples of a batch have in common: memory frames of how many shots before, and how many of each;
    whether the target is a shot or a single frame."""

    before: int
    each: int = 1
    is_frame: bool = False


def draw_kind(rng: torch.Generator) -> Kind:
    """The kind of a batch, at random."""
    chance = torch.rand(4, generator=rng).tolist()
    is_frame = chance[3] < ONE_FRAME
    choices = FRAME_BEFORE if is_frame else SHOT_BEFORE
    before = 0 if chance[0] < NO_MEMORY else choices[int(len(choices) * chance[1])]
    return Kind(
        before=before,
        each=KEYFRAMES if before in (1, 2) and chance[2] < TWICE else 1,
        is_frame=is_frame,
    )


def recalled(before: int) -> list[int]:
    """Which of the shots before give memory frames, from the first on."""
    return list(range(before)) if before <= MEMORY else [*range(SINK), *range(before - MEMORY + SINK, before)]


def _draw_rows(data: LatentStories, rng: torch.Generator, kind: Kind, size: int) -> Tensor:
    """Shots for a batch: any, or with memory those after so many others."""
    if not kind.before:
        return torch.randint(len(data.number), (size,), generator=rng)
    fits, several = data.number == kind.before, data.characters > 1
    weights = 1e-9 * fits  # of a few stories none may be of one character
    share_of_several = SEVERAL if kind.before >= ALL_SHOWN else 0.0
    for share, group in ((share_of_several, fits & several), (1 - share_of_several, fits & ~several)):
        weights[group] += share / max(1, int(group.sum()))
    return torch.multinomial(weights, size, replacement=True, generator=rng)


def draw_batch(data: LatentStories, embed: TextEmbedder, rng: torch.Generator, kind: Kind, size: int) -> MemoryBatch:
    """Samples of a kind on the device of the latents: shots (or frames of them) with memory, condition, text, noise."""
    device = data.shots.device
    rows = _draw_rows(data, rng, kind, size)
    chance, at = torch.rand(2, size, generator=rng), rows.to(device)
    if kind.is_frame:
        which = torch.randint(KEYFRAMES, (size,), generator=rng).to(device)
        x0, people = data.keyframes[at, which][:, :, None].float(), data.key_people[at, which][:, None].float()
        video = data.blank[None, :, :1].float().expand_as(x0)
        condition = condition_channels(None, video, 0)
    else:
        x0, people, first = data.shots[at].float(), data.people[at].float(), data.first_of[at]
        given = first >= 0
        video = torch.where(given[:, None, None, None, None], data.firsts[first].float(), data.blank.float())
        condition = condition_channels(None, video, 0)
        condition[:, :4, 0] = given[:, None, None, None].float()
    if kind.before:
        shots = (rows[:, None] - kind.before + torch.tensor(recalled(kind.before))).to(device)
        memory = data.keyframes[shots, : kind.each].float().flatten(1, 2).transpose(1, 2)
        if kind.each == 1:  # either of the two
            which = torch.randint(KEYFRAMES, shots.shape, generator=rng).to(device)
            memory = data.keyframes[shots, which].float().transpose(1, 2)
        x0 = torch.cat([memory, x0], dim=2)
        condition = torch.cat([condition_channels(memory, memory[:, :, :0], 0), condition], dim=2)
    looks = LOOKS_TOLD["with memory" if kind.before else "without"]
    texts = [data.described[i] if c < looks else data.prompts[i] for i, c in zip(rows.tolist(), chance[0], strict=True)]
    texts = ["" if c < NO_TEXT else text for text, c in zip(texts, chance[1], strict=True)]
    of_noise = torch.Generator(device).manual_seed(int(torch.randint(2**31, (1,), generator=rng)))
    return MemoryBatch(
        x0=x0,
        noise=torch.randn(x0.shape, generator=of_noise, device=device),
        u=torch.rand(size, generator=rng).to(device),
        condition=condition,
        mask=people,
        text=embed(texts),
        memory_frames=x0.shape[2] - people.shape[1],
        ids=tuple(texts),
    )


def base_loss(
    network: WanTransformer3DModel,
    data: LatentStories,
    embed: TextEmbedder,
    rng: torch.Generator,
    expert: Expert | None = None,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch drawn at random, `scale` times as large as usual, and figures to log.

    Args:
        expert: whose noise levels are drawn; None: all.
    """
    kind = draw_kind(rng)
    batch = draw_batch(data, embed, rng, kind, max(1, round(scale * SIZES[kind.is_frame])))
    loss = LOSS if expert is None else replace(LOSS, boundary=BOUNDARY)
    losses = loss(network, expert or "low_noise", batch)
    names = ("loss_video", "loss_subject", "memory_frames")
    return losses.total, {name: losses.sums[name][0] / losses.sums[name][1] for name in names}
