"""The toy text encoder learns to read prompts before a denoiser uses it, as Wan's UMT5 comes already trained.

From the denoiser's loss alone it hardly learns which adjective belongs to which noun.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import T5Tokenizer, UMT5EncoderModel

from toyworld.attributes import (
    ACTIONS,
    BODY_COLOURS,
    EYES,
    FRAMINGS,
    HATS,
    PLACES,
    PROP_COLOURS,
    SHAPES,
    SIDES,
    TIMES,
)
from toyworld.text import embed_tokens, tokens_of
from toyworld.world import HELD_OUT, ToyShot, story

_LOOK = {"shape": SHAPES, "colour": BODY_COLOURS, "hat": HATS, "eyes": EYES}
_PLAIN = {"place": PLACES, "time": TIMES, "framing": FRAMINGS, "action": ACTIONS}
_THINGS = {"landmark": PROP_COLOURS, "side": SIDES, "flag": PROP_COLOURS}
QUESTIONS: dict[str, tuple[str, ...]] = (
    _PLAIN | _THINGS | {f"{who} {part}": words for who in ("first", "second") for part, words in _LOOK.items()}
)
ABSENT = -100  # the class that cross entropy passes over


def answers(shot: ToyShot, *, looks: bool) -> list[int]:
    """The answer of a shot's prompt to each of `QUESTIONS`, by its number; `ABSENT` where it gives none."""
    labels = {name: getattr(shot, name) for name in _PLAIN}
    if looks:
        labels |= {name: getattr(shot.scenery, name) for name in _THINGS}
        for who, character in zip(("first", "second"), shot.cast, strict=False):
            labels |= {f"{who} {part}": getattr(character.look, part) for part in _LOOK}
    return [words.index(labels[name]) if name in labels else ABSENT for name, words in QUESTIONS.items()]


class Reader(nn.Module):
    """A text encoder under one cross-attention, as a denoiser's, with a learned query for every question."""

    def __init__(self, encoder: UMT5EncoderModel, *, heads: int = 4) -> None:
        super().__init__()
        width = encoder.config.d_model
        self.encoder, self.heads = encoder, heads
        self.queries = nn.Parameter(0.1 * torch.randn(len(QUESTIONS), width))
        self.keys_and_values = nn.Linear(width, 2 * width)
        self.answers = nn.ModuleList([nn.Linear(width, len(words)) for words in QUESTIONS.values()])

    def forward(self, tokenizer: T5Tokenizer, prompts: list[str]) -> list[Tensor]:
        """Logits [B, answers] for every question."""
        words = embed_tokens(self.encoder, tokens_of(tokenizer, prompts))
        keys, values = (self._split(part) for part in self.keys_and_values(words).chunk(2, dim=-1))
        queries = self._split(self.queries.expand(len(prompts), -1, -1))
        found = scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
        return [answer(found[:, i]) for i, answer in enumerate(self.answers)]

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


def draw_prompts(rng: torch.Generator, size: int, *, start: int = 0) -> tuple[list[str], Tensor]:
    """Prompts and their answers [B, questions].

    Half of them describe looks, and half of those are of two characters where the story has a shot of two.
    """
    seeds = start + torch.randint(20_000, (size,), generator=rng)
    prompts, labels = [], []
    for i, seed in enumerate(seeds.tolist()):
        looks, pair = i % 2 == 0, i % 4 == 0
        shots = story(seed, looks=looks).shots if pair else story(seed, shots=2, looks=looks).shots
        shot = next((shot for shot in shots if pair and len(shot.cast) == 2), shots[seed % 2])
        prompts.append(shot.prompt)
        labels.append(answers(shot, looks=looks))
    return prompts, torch.tensor(labels)


@torch.no_grad()
def read_right(reader: Reader, tokenizer: T5Tokenizer, *, size: int = 256) -> dict[str, float]:
    """The share of right answers to every question that held-out prompts answer."""
    prompts, labels = draw_prompts(torch.Generator().manual_seed(0), size, start=HELD_OUT)
    right = {}
    for name, logits, answer in zip(QUESTIONS, reader(tokenizer, prompts), labels.unbind(1), strict=True):
        present = answer != ABSENT
        if present.any():
            right[name] = float((logits.argmax(dim=1).cpu() == answer)[present].float().mean())
    return right


def reading_loss(
    reader: Reader, tokenizer: T5Tokenizer, rng: torch.Generator, size: int = 64
) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy of the answers, the mean over the questions that some prompt answers."""
    prompts, labels = draw_prompts(rng, size)
    pairs = zip(reader(tokenizer, prompts), labels.to(reader.queries.device).unbind(1), strict=True)
    asked = [cross_entropy(x.float(), answer, ignore_index=ABSENT) for x, answer in pairs if (answer >= 0).any()]
    return torch.stack(asked).mean(), {}
