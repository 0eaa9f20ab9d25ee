"""Consistent self-attention (StoryDiffusion, arXiv 2405.01434): shots of a batch read tokens of each other.

A batch has a row for each shot. Some rows are id rows: they show a character first. With Q, K and V of one
self-attention layer, row i reads

    Attention(Q_i, [K_i, K_j of kept tokens, ...], [V_i, V_j of kept tokens, ...])

for the id rows j of its characters (other than itself). A token is kept with probability ``rate``; the choice is one
for each id row, step and resolution, and all layers share it. The published code makes the id images first and stores
their tokens for the others, 3.8 GB of an id image at 1344x768; here all rows are in one batch, in lock step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor2_0
from pydantic.dataclasses import dataclass
from torch import Tensor

from storymem.config import STRICT, check_bounds
from storymem.story import Story
from storymem.wan.transformer import SegmentAttnProcessor, SelfReads

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of queries, keys and values [B, tokens, heads, head_dim]."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SharingSettings:
    """Which tokens are read, and when; the defaults are those of the published low-VRAM app.

    Args:
        rate: probability that a token of an id row is kept for the others.
        plain_steps: first steps in which each row reads itself alone.
        probability: that a layer shares in a later step.
        late_probability: the same from step ``late_from`` on.
        late_from: see there; steps count from 0.
        id_images: id rows of a character.
        choose: "solo": the first shots that show the character alone, or, if there is none, its first shot;
            "first": the story's first shots, for all characters.
    """

    rate: float = 0.5
    plain_steps: int = 1
    probability: float = 0.7
    late_probability: float = 0.9
    late_from: int = 20
    id_images: int = 2
    choose: Literal["solo", "first"] = "solo"

    def __post_init__(self) -> None:
        check_bounds(self, rate=(0, 1), probability=(0, 1), late_probability=(0, 1), id_images=(1, 4))
        check_bounds(self, plain_steps=(0, 1000), late_from=(0, 1000))


def id_shots(story: Story, settings: SharingSettings) -> dict[str, tuple[int, ...]]:
    """The id shots of each character (places in the film, from 0).

    With ``choose: first`` they are the same for all, also for shots without characters, which have the name "".
    """
    names = [character.name for character in story.characters]
    if settings.choose == "first":
        return dict.fromkeys([*names, ""], tuple(range(min(settings.id_images, len(story.shots)))))
    found = {}
    for name in names:
        alone = [shot.index for shot in story.shots if shot.characters == (name,)]
        shown = [shot.index for shot in story.shots if name in shot.characters]
        found[name] = tuple(alone[: settings.id_images] or shown[:1])
    return found


def shots_read(story: Story, settings: SharingSettings) -> list[tuple[int, ...]]:
    """For each shot the id shots that it reads: those of all its characters, without itself."""
    of = id_shots(story, settings)
    return [
        tuple(sorted({one for name in (shot.characters or ("",)) for one in of.get(name, ())} - {shot.index}))
        for shot in story.shots
    ]


class Sharing:
    """The state of one sampling loop over a batch.

    Args:
        settings: which tokens are read, and when.
        reads: for each row the rows that it reads.
        seed: of the choice of tokens and of layers.

    Attributes:
        step: the current one, from 0.
    """

    def __init__(self, settings: SharingSettings, reads: Sequence[Sequence[int]], seed: int) -> None:
        self.settings, self.reads, self.seed = settings, [tuple(row) for row in reads], seed
        self.step = 0

    def applies(self, layer: str) -> bool:
        """Whether a layer shares in the current step."""
        if self.step < self.settings.plain_steps or not any(self.reads):
            return False
        late = self.step >= self.settings.late_from
        chance = self.settings.late_probability if late else self.settings.probability
        return random.Random(f"{self.seed} {self.step} {layer}").random() < chance

    def kept(self, row: int, tokens: int) -> Tensor:
        """Indices of the kept tokens of a row that has so many."""
        seed = random.Random(f"{self.seed} {self.step} {row} {tokens}").getrandbits(63)
        source = torch.Generator().manual_seed(seed)
        return (torch.rand(tokens, generator=source) < self.settings.rate).nonzero()[:, 0]

    def attention(self, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> Tensor:
        """The attention of all rows, [B, tokens, heads, head_dim]; B is a multiple of the rows: passes of guidance."""
        rows, tokens = len(self.reads), key.shape[1]
        if query.shape[0] % rows:
            raise ValueError(f"a batch of {query.shape[0]} is not one of {rows} shots")
        query, key, value = (one.unflatten(0, (-1, rows)) for one in (query, key, value))
        kept = {row: self.kept(row, tokens).to(key.device) for row in {one for row in self.reads for one in row}}
        outputs = []
        for row, others in enumerate(self.reads):
            keys, values = (
                torch.cat([one[:, row], *(one[:, other][:, kept[other]] for other in others)], dim=1)
                for one in (key, value)
            )
            outputs.append(kernel(query[:, row], keys, values))
        return torch.stack(outputs, dim=1).flatten(0, 1)


class SharedAttnProcessor(AttnProcessor2_0):
    """Self-attention of a UNet in which rows share tokens."""

    def __init__(self, sharing: Sharing, layer: str) -> None:
        super().__init__()
        self.sharing, self.layer = sharing, layer

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, tokens, dim] -> the same shape."""
        if not self.sharing.applies(self.layer):
            return super().__call__(attn, hidden_states, *args, **kwargs)
        query, key, value = (
            projection(hidden_states).unflatten(2, (attn.heads, -1)) for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        output = self.sharing.attention(query, key, value, dispatch_attention_fn).flatten(2)
        return attn.to_out[1](attn.to_out[0](output))


class SharedSegmentAttnProcessor(SegmentAttnProcessor):
    """Self-attention of Wan in which rows share tokens."""

    def __init__(self, sharing: Sharing, layer: str, instead_of: SegmentAttnProcessor) -> None:
        super().__init__()
        self.sharing, self.layer = sharing, layer
        self._attention_backend, self._parallel_config = instead_of._attention_backend, instead_of._parallel_config

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, tokens, dim] -> the same shape."""
        reads = args[2] if len(args) > 2 else kwargs.get("rotary_emb")
        if not (isinstance(reads, SelfReads) and self.sharing.applies(self.layer)):
            return super().__call__(attn, hidden_states, *args, **kwargs)
        query, key, value = self.projected(attn, hidden_states, reads)
        output = self.sharing.attention(query, key, value, self._kernel).flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](output))

    def _kernel(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dispatch_attention_fn(query, key, value, backend=self._attention_backend)


@contextmanager
def _processors(layers: Mapping[Any, Any], processor_of: Callable[[Any, Any], Any]) -> Iterator[None]:
    """Inside the block each attention layer has the processor that is made of its key and its own processor."""
    plain = {name: layer.processor for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.set_processor(processor_of(name, plain[name]))
        yield
    finally:
        for name, layer in layers.items():
            layer.set_processor(plain[name])


def sharing_in_unet(unet: Any, sharing: Sharing, *, everywhere: bool = False) -> AbstractContextManager[None]:
    """Inside the block the self-attention of a UNet shares tokens.

    Args:
        unet: of SDXL.
        sharing: the state of a sampling loop; the caller counts its steps.
        everywhere: in all layers, not in those of ``up_blocks`` alone.
    """
    layers = {
        f"{name}.processor": layer
        for name, layer in unet.named_modules()
        if name.endswith(".attn1") and (everywhere or name.startswith("up_blocks."))
    }
    return _processors(layers, lambda name, _: SharedAttnProcessor(sharing, name))


def sharing_in_video(experts: Sequence[Any], sharing: Sharing, *, blocks: int) -> AbstractContextManager[None]:
    """Inside the block the self-attention of the last ``blocks`` blocks of Wan's transformers shares tokens."""
    layers = {
        (number, f"blocks.{place}"): block.attn1
        for number, expert in enumerate(experts)
        for place, block in list(enumerate(expert.blocks))[-blocks:]
    }
    return _processors(layers, lambda name, plain: SharedSegmentAttnProcessor(sharing, name[1], plain))
