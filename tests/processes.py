"""What several gloo processes do for ``test_processes``: ``python -m tests.processes FOLDER``."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers.hooks import context_parallel
from diffusers.models import attention_dispatch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from storymem.film.processes import among_processes
from storymem.wan.loading import load_pipeline
from storymem.wan.parallel import join, leave
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.processes import Launch
from storymem.wan.segments import Text, holocine, memento, memory_cached, memory_joint, single_shot, with_given
from storymem.wan.settings import MemoryMode, RuntimeSettings
from storymem.wan.shots import OnStep, ShotRequest
from storymem.wan.transformer import SegmentCache
from tests import stories
from tests.forking import fork
from tests.wan import tiny

MEMORY = (0, 3, 10)
HEIGHTS = (32, 16)  # 6 tokens a slot, which two processes share evenly, and 3, which they do not
CPU = torch.device("cpu")

_ULYSSES = RuntimeSettings(device="cpu", context_parallel="ulysses")
_RING = RuntimeSettings(device="cpu", context_parallel="ring")
_GUIDANCE = RuntimeSettings(device="cpu", guidance_parallel=True)


_TEXTS = [Text(spans=((0, 3), (5, 9), (12, 16))), Text(spans=((0, 3), (9, 16)))]
LAYOUTS = {
    "single shot": single_shot(3),
    **{f"joint {memory}": memory_joint(memory, 3) for memory in MEMORY},
    **{f"cached {memory}": memory_cached(memory, 3) for memory in MEMORY},
    "cached, given": with_given(memory_cached(3, 3), 1),
    "full": holocine([2, 3], _TEXTS, sparse=False),
    "sparse": holocine([2, 3], _TEXTS, sparse=True),
    "memento": memento([-40, -9, -3], 2, subject=False),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shots that several processes make together, to be compared with those of one.

    Args:
        runtime: what is shared, and what else is to go together with that.
        world: how many processes.
        memory: joint or cached.
        negative_sees_memory: whether the second pass of guidance sees the memory.
    """

    runtime: RuntimeSettings
    world: int = 2
    memory: MemoryMode = "joint"
    negative_sees_memory: bool = True

    @property
    def alone(self) -> Case:
        """The same by one process."""
        runtime = replace(self.runtime, context_parallel="none", guidance_parallel=False, shard_weights=False)
        return replace(self, runtime=runtime, world=1)

    def load(self) -> WanMemoryToVideoPipeline:
        model = tiny.settings(memory_attention=self.memory)
        model.network.transformer["num_layers"] = 2  # caches need a first block and others
        return load_pipeline(model, runtime=self.runtime)


CASES = {
    "ulysses": Case(runtime=_ULYSSES),
    "ulysses_sharded": Case(runtime=replace(_ULYSSES, shard_weights=True)),
    "ulysses_taylor": Case(runtime=replace(_ULYSSES, cache="taylor", cache_threshold=1)),
    "ulysses_cached": Case(runtime=_ULYSSES, memory="cached"),
    "ulysses_unseen": Case(runtime=_ULYSSES, negative_sees_memory=False),
    "ulysses_recompute": Case(runtime=replace(_ULYSSES, memory_cache="recompute"), memory="cached"),
    "ring": Case(runtime=_RING),
    "ring_cached": Case(runtime=_RING, memory="cached"),
    "guidance": Case(runtime=_GUIDANCE),
    "guidance_sharded": Case(runtime=replace(_GUIDANCE, shard_weights=True)),
    "guidance_first_block": Case(runtime=replace(_GUIDANCE, cache="first_block", cache_threshold=0.5)),
    "guidance_cached": Case(runtime=_GUIDANCE, memory="cached"),
    "guidance_unseen": Case(runtime=_GUIDANCE, memory="cached", negative_sees_memory=False),
    "both": Case(runtime=replace(_ULYSSES, guidance_parallel=True), world=4),
}


def shots(case: Case, pipe: WanMemoryToVideoPipeline, heights: Sequence[int] = HEIGHTS) -> dict[str, Tensor]:
    """Latents of shots of every memory size and height, through the public call.

    Beside each, under ``work_...``, how many tokens this process computed for it, over all steps and passes.
    """
    found, tokens = {}, [0]

    def count(_module: object, inputs: tuple[Tensor]) -> None:
        tokens[0] += inputs[0].shape[0] * inputs[0].shape[1]

    for expert in pipe.experts.values():
        expert.blocks[0].ffn.register_forward_pre_hook(count)
    for height in heights:
        for frames in MEMORY:
            tokens[0] = 0
            memory = tiny.images(frames, size=(tiny.WIDTH, height)) or None
            shot = tiny.generate(pipe, height=height, memory=memory, negative_sees_memory=case.negative_sees_memory)
            found[f"{height}_{frames}"] = shot.contiguous()
            found[f"work_{height}_{frames}"] = torch.tensor(tokens)
    return found


def shots_together(folder: Path, world: int) -> None:
    """The shots of all cases for ``world`` processes, as each of them has them at the end."""
    _cpu_as_accelerator()
    launch = Launch.of_environment()
    join(launch, CPU)
    for name, case in CASES.items():
        if case.world == world:
            pipe = case.load()
            heights = HEIGHTS[:1] if case.runtime.context_parallel == "none" else HEIGHTS
            save_file(shots(case, pipe, heights), folder / f"{name}_{launch.rank}.safetensors")
            if name == "guidance":
                (folder / f"unguided_{launch.rank}").write_text(unguided(pipe))
            if case.runtime.shard_weights:
                weight = pipe.transformer.blocks[0].ffn.net[2].weight
                assert isinstance(weight, DTensor)
                assert weight.to_local().numel() * world == weight.numel()
    leave()


def layouts_together(folder: Path, method: str) -> None:
    """What a transformer predicts in every layout, with tokens shared among the processes."""
    _cpu_as_accelerator()
    launch = Launch.of_environment()
    join(launch, CPU)
    runtime = _ULYSSES if method == "ulysses" else _RING
    save_file(layout_predictions(runtime), folder / f"layouts_{method}_{launch.rank}.safetensors")
    leave()


def layout_predictions(runtime: RuntimeSettings | None = None) -> dict[str, Tensor]:
    """By layout and height; constant segments are cached first, where there are some."""
    model, found = tiny.settings(), {}
    model.network.transformer["num_layers"] = 2
    expert: Any = load_pipeline(model, runtime=runtime or tiny.CPU, text_encoder=False).transformer
    for height in (4, 2):  # 6 tokens a frame, which two processes share evenly, and 3
        for name, layout in LAYOUTS.items():
            generator, cache = torch.Generator().manual_seed(0), SegmentCache()
            latents = torch.randn(1, 36, layout.frames, height, 6, generator=generator)
            text = torch.randn(1, 16, 32, generator=generator)
            n = sum(segment.frames for segment in layout.segments if segment.name in layout.constant)
            with torch.no_grad():
                if n:
                    given = {"layout": layout.only(layout.constant), "cache": cache}
                    expert(
                        hidden_states=latents[:, :, :n], timestep=torch.zeros(1), encoder_hidden_states=text, **given
                    )
                found[f"{name} {height}"] = expert(
                    hidden_states=latents[:, :, n:],
                    timestep=torch.tensor([700.0]),
                    encoder_hidden_states=text,
                    layout=layout,
                    cache=cache,
                    return_dict=False,
                )[0].contiguous()
    return found


def unguided(pipe: WanMemoryToVideoPipeline) -> str:
    """The error message of a call that needs only one of the two passes."""
    try:
        tiny.generate(pipe, guidance_scale=1.0)
    except ValueError as error:
        return str(error)
    return ""


class KilledGenerator(stories.CountingGenerator):
    """The real generator, in a process that is killed in the middle of its second shot with memory."""

    def generate(self, request: ShotRequest, on_step: OnStep | None = None) -> np.ndarray:
        if len([by_text for by_text in self.by_text if not by_text]) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(request, on_step)


def make_film(folder: Path, runtime: RuntimeSettings, *, killed: int | None = None) -> None:
    """A film of a few shots in ``folder``, by all processes."""
    launch = Launch.of_environment()
    kind = KilledGenerator if launch.rank == killed else stories.CountingGenerator
    generator = kind(model=stories.MODEL, sampler=stories.SAMPLER, runtime=runtime, continuity="mi2v")
    with among_processes(generator, launch, CPU) as shared:
        if shared is not None:
            story = stories.story(folder.parent, stories.FOUR_SHOTS)
            replace(stories.storyteller(), generator=shared).tell(story, folder)


def unfit(folder: Path) -> None:
    """The first process finds a mistake of the user before anything is generated."""
    generator = stories.storyteller().generator
    with among_processes(generator, Launch.of_environment(), CPU) as shared:
        if shared is not None:
            raise ValueError("found by the first process")
    (folder / f"dismissed_{Launch.of_environment().rank}").touch()


def _cpu_as_accelerator() -> None:
    """Let diffusers take the CPU for an accelerator.

    Two things that it misses there are made up for: attention with log-sum-exp, and gathering of unequal parts, which
    NCCL can and gloo cannot.
    """
    torch.accelerator.device_count = lambda: 1
    torch._C._get_accelerator = lambda: CPU

    def gather_unequal(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        lengths = context_parallel.gather_size_by_comm(tensor.shape[dim], group)
        padded = torch.zeros(*tensor.shape[:dim], max(lengths), *tensor.shape[dim + 1 :])
        padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part.narrow(dim, 0, n) for part, n in zip(parts, lengths, strict=True)], dim)

    context_parallel._all_gather_anything = gather_unequal
    native = attention_dispatch._native_attention_forward_op

    def with_logsumexp(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return_lse = args[5] if len(args) > 5 else kwargs.get("return_lse", False)
        if not return_lse:
            return native(ctx, query, key, value, *args, **kwargs)
        scores = torch.einsum("bqhd,bkhd->bqhk", query, key) / query.shape[-1] ** 0.5
        return torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), value), scores.logsumexp(-1)

    attention_dispatch._native_attention_forward_op = with_logsumexp


def main(arguments: Sequence[str]) -> int:
    torch.set_num_threads(1)
    folder = Path(arguments[0])
    statuses = {
        "two": fork(2, partial(shots_together, folder, 2)),
        "four": fork(4, partial(shots_together, folder, 4)),
        "ulysses": fork(2, partial(layouts_together, folder, "ulysses")),
        "ring": fork(2, partial(layouts_together, folder, "ring")),
        "film": fork(2, partial(make_film, folder / "whole" / "film", _GUIDANCE)),
        "unfit": fork(2, partial(unfit, folder)),
    }
    for rank in range(2):
        film = folder / f"killed_{rank}" / "film"
        statuses[f"killed_{rank}"] = fork(2, partial(make_film, film, _GUIDANCE, killed=rank))
        statuses[f"resumed_{rank}"] = fork(2, partial(make_film, film, _GUIDANCE))
    (folder / "statuses.json").write_text(json.dumps(statuses))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
