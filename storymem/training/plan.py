"""The plan of a training run (``dry_run=true``), before a network is loaded or anything is written."""

from __future__ import annotations

from pathlib import Path

from storymem.config import first_of
from storymem.data.cache import LatentCache
from storymem.film.tables import counted
from storymem.training.resume import CHECKPOINTS, CONFIG, MODEL, SAMPLES
from storymem.training.run_log import METRICS
from storymem.training.settings import TrainSettings
from storymem.wan.estimate import SIZES, expert_bytes


def make_plan(settings: TrainSettings, latents: LatentCache, *, processes: int, done: int) -> str:
    """What is trained on what, how long, in how much VRAM, and what is written where.

    Args:
        latents: the training set, which was checked.
        processes: that train together.
        done: steps of the checkpoint from which the run resumes.
    """
    batch, folder = settings.batch, Path(settings.output)
    samples = batch.size * batch.accumulation * processes
    clips = {split: [clip for clip in latents.clips if clip.split == split] for split in ("train", "valid")}
    sizes = sorted({"x".join(map(str, clip.bucket)) for clip in clips["train"]})
    held_out = f", {len(clips['valid'])} held out" if "valid" in settings.splits else ""
    frozen, trained = parameters(settings)
    adapter = settings.adapter
    what = "all parameters" if adapter is None else f"an adapter of rank {adapter.rank}"
    done_text = f", of which {done} are done" if done else ""
    return "\n".join(
        [
            f"trains   {what} ({trained:,} parameters) of {settings.model.name}, "
            f"{' and '.join(settings.trained)}, for {settings.objective.system}",
            f"data     {counted(len(clips['train']), 'clip')} in {counted(len(latents.groups('train')), 'group')}"
            f"{held_out}, {first_of(sizes, 4)} (frames x height x width), in {settings.dataset}",
            f"steps    {settings.steps}{done_text}, each of {counted(samples, 'sample')} (batch.size={batch.size} x "
            f"batch.accumulation={batch.accumulation} x {processes} process{'' if processes == 1 else 'es'})",
            *_vram(settings, frozen, trained, processes),
            f"disk     {disk_bytes(settings, trained) / 1e9:.2g} GB in {folder}",
            *(f"writes   {folder / name}{when}" for name, when in _written(settings)),
        ]
    )


def parameters(settings: TrainSettings) -> tuple[int, int]:
    """How many parameters an expert has, and how many train in all, without a KeyframeQuery."""
    model, adapter = settings.model, settings.adapter
    ranks = () if adapter is None else (adapter.rank,)
    plain, adapted = (
        expert_bytes(model.transformer, dtype="float32", ranks=each).total // SIZES["float32"] for each in ((), ranks)
    )
    return plain, len(settings.trained) * (plain if adapter is None else adapted - plain)


def disk_bytes(settings: TrainSettings, trained: int, *, checkpoints: int = 0) -> int:
    """Upper estimate of the disk space of a run that trains so many parameters and has so many checkpoints already.

    A checkpoint has values, two moments and, if there is one, the average, in float32.
    """
    checkpoint = 4 * trained * (3 if settings.optimizer.ema_decay is None else 4)
    more = max(1, settings.checkpoint.keep + 1 - checkpoints)
    return checkpoint * more + 4 * trained * len(settings.export)


def _vram(settings: TrainSettings, plain: int, trained: int, processes: int) -> list[str]:
    """The VRAM of weights, gradients of an expert, and optimizer of a process; activations are not estimated."""
    model, sharded = settings.model, settings.parallel.strategy == "fsdp"
    if model.gguf is not None:
        return []
    loaded = len(model.spec.experts if settings.samples.every else settings.trained)
    whole = loaded if sharded else 1  # experts take turns
    frozen = 0 if settings.adapter is None else whole * plain * SIZES[model.dtype]
    state = 4 * trained * (3 if settings.optimizer.ema_decay is None else 4) + 4 * trained // len(settings.trained)
    share = 1e9 * (processes if sharded else 1)
    weights, trains = (f"{each / share:.3g} GB" for each in (frozen, state))
    total = f"{(frozen + state) / share:.3g} GB"
    return [
        f"VRAM     {total} a process, and activations: {weights} frozen weights, {trains} trained ones with gradients "
        "and optimizer"
    ]


def _written(settings: TrainSettings) -> list[tuple[str, str]]:
    """Names in the run's folder, and when they are written."""
    checkpoint, samples = settings.checkpoint, settings.samples
    return [
        (CONFIG, " at the start"),
        (METRICS, _every(settings.log.every)),
        (CHECKPOINTS, f"{_every(checkpoint.every)}, the last {checkpoint.keep}"),
        *([(SAMPLES, _every(samples.every))] if samples.every else []),
        *((name, " at the end") for name in (settings.export if settings.adapter else (MODEL,))),
    ]


def _every(steps: int) -> str:
    return " every step" if steps == 1 else f" every {steps} steps"
