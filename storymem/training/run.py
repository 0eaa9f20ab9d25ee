"""From a composed configuration to a trained adapter: the settings of ``train.yaml`` and what is built from them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storymem.config import build_settings
from storymem.film.modes import check_lengths
from storymem.io import FileError, check_room, folder_lock, read_yaml, replacing_folder, write_text
from storymem.story import load_story
from storymem.training.checkpoints import Checkpoint, Checkpoints, read_checkpoint
from storymem.training.run_settings import CONTINUITY, TrainSettings
from storymem.training.settings import GIVEN_FRAMES, OptimizerSettings
from storymem.wan.layout import Launch
from storymem.wan.settings import RuntimeSettings

if TYPE_CHECKING:
    from storymem.training.callbacks import Validation
    from storymem.training.dataset import Latents
    from storymem.training.experts import Experts
    from storymem.training.method import MemoryTraining
    from storymem.training.run_log import RunLog
    from storymem.training.trainer import Callback, Trainer

CONFIG = "config.yaml"
CHECKPOINTS, SAMPLES = "checkpoints", "samples"
#: What may differ when a run is taken up: where it runs, how long, and what is told of it.
_BESIDES = (
    *("output", "resume", "steps", "runtime", "export", "dataset"),
    *("parallel", "checkpoint", "validation", "samples", "log", "scorer", "memory", "sampler"),
)
#: Likewise of the batch; the samples of a step are compared for themselves.
_BESIDES_OF_BATCH = ("size", "accumulation", "workers")


def train(config: Mapping[str, Any]) -> Path:
    """Train the adapter that a composed configuration (plain containers) describes; returns the run's folder.

    Settings are checked first, before torch is imported; then everything else that can be wrong, before the first
    step. One process at a time trains in a folder, with those that were started together with it.

    Raises:
        ValueError: for what cannot work.
        Stopped: after SIGINT, SIGTERM or SIGUSR1, saved; the same command goes on.
    """
    settings = build_settings(TrainSettings, config)
    folder = Path(settings.output)
    begun = check_run_folder(folder, settings, config)
    if settings.samples.every:
        story = load_story(settings.samples.story or "")
        continuity = CONTINUITY[settings.conditioning]
        check_lengths(story, frames=settings.model.video.frames, continuity=continuity, first_shot="m2v")
    from storymem.training.experts import check_start
    from storymem.wan.sources import check_weights

    trained = settings.trained
    experts = settings.model.spec.experts if settings.samples.every else trained
    model, texts = replace(settings.model, adapter=None), bool(settings.samples.every)
    check_weights(model, text_to_video=False, text_encoder=texts, experts=experts)
    if not begun:
        check_start(settings.adapter, settings.model, trained)
    latents = open_cache(settings)
    alone = folder_lock(folder, "training in") if Launch.of_environment().is_first else nullcontext()
    with alone:
        run = Run(settings, config, latents)
        try:
            run.trainer.run()
            run.finish()
        finally:
            if run.log is not None:
                run.log.close()
    return folder


def check_run_folder(folder: Path, settings: TrainSettings, config: Mapping[str, Any]) -> bool:
    """Whether ``folder`` holds a checkpoint of this run; ``ValueError`` if it holds another run, or anything else."""
    for name in ("", CHECKPOINTS, SAMPLES, *settings.export):
        if (folder / name).exists() and not (folder / name).is_dir():
            raise FileError(f"{folder / name} is not a folder, as it must be for a training: choose another output")
    if not folder.exists():
        return False
    newest = Checkpoints(folder / CHECKPOINTS, keep=settings.checkpoint.keep).newest_readable()
    before = _recorded(folder, required=newest is None)
    if newest is None and before is None:
        return False
    if settings.resume == "never":
        raise ValueError(f"{folder} holds a run: choose another output, or go on with it by resume=auto")
    if newest is not None:
        check_same_run(newest, settings, config, processes=Launch.of_environment().world)
    elif changed := _essential_changes(before or {}, config):
        raise ValueError(_refusal(folder, changed))
    return newest is not None


def _recorded(folder: Path, *, required: bool) -> dict[str, Any] | None:
    """The settings that the run in ``folder`` was last started with; None if it is empty, or they are not required.

    Raises:
        ValueError: if they are required, and the folder holds something else or its ``config.yaml`` is damaged.
    """
    path = folder / CONFIG
    names = sorted(name for entry in folder.iterdir() if not (name := entry.name).startswith("."))
    if not path.exists():
        if names and required:
            shown = ", ".join(names[:4]) + (" ..." if names[4:] else "")
            raise FileError(f"{folder} is not empty and holds no training run ({shown}): choose another output")
        return None
    try:
        found = read_yaml(path)
        if isinstance(found, dict) and {"dataset", "output", "adapter", "optimizer"} <= found.keys():
            return found
        reason = f"{path} does not hold the settings of a training run"
    except FileError as error:
        reason = str(error)
    if required:
        raise FileError(f"{reason}. No checkpoint says what was trained in {folder}: choose another output")
    print(f"{reason}; it is written again", file=sys.stderr)
    return None


def check_same_run(
    checkpoint: Checkpoint, settings: TrainSettings, config: Mapping[str, Any], *, processes: int
) -> None:
    """Raise ``ValueError`` if these settings cannot go on from a checkpoint, saying what can."""
    about, folder = checkpoint.about, Path(settings.output)
    if changed := _essential_changes(about["config"], config):
        start = f"adapter.start={checkpoint.path / 'adapter'}"
        raise ValueError(f"{_refusal(folder, changed)}; to begin from what it has learnt, write {start} as well")
    if checkpoint.step > settings.steps:
        raise ValueError(
            f"{folder} is at step {checkpoint.step} already: write steps={checkpoint.step} or more, or choose another "
            "output"
        )
    samples, batch = about["samples_per_step"], settings.batch
    if samples == batch.size * batch.accumulation * processes:
        return
    found = f"{batch.size * batch.accumulation * processes} (batch.size={batch.size} times batch.accumulation="
    found += f"{batch.accumulation} times {processes} processes)"
    if samples % processes:
        equal = "start a number of processes that divides that"
    else:
        size = next(
            size for size in range(min(batch.size, samples // processes), 0, -1) if samples // processes % size == 0
        )
        equal = f"write batch.size={size} batch.accumulation={samples // processes // size}"
    raise ValueError(
        f"a step of the run in {folder} has {samples} samples, and now it would have {found}: {equal}, or choose "
        "another output"
    )


def _essential_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each setting without which it would be another run."""
    from storymem.film.folder import differences

    def essence(config: Mapping[str, Any]) -> dict[str, Any]:
        config = json.loads(json.dumps(config))
        optimizer, batch = config.get("optimizer") or {}, config.get("batch") or {}
        average = "none" if optimizer.get("ema_decay") is None else "kept"
        return {key: value for key, value in config.items() if key not in _BESIDES} | {
            "batch": {key: value for key, value in batch.items() if key not in _BESIDES_OF_BATCH},
            "optimizer": {"name": optimizer.get("name"), "ema_decay": average},
        }

    return differences(essence(before), essence(now))


def _refusal(folder: Path, changed: list[str]) -> str:
    lines = "\n".join(f"  {line}" for line in changed[:12])
    return (
        f"{folder} holds a run with other settings, which cannot be gone on with:\n{lines}\n"
        "write the settings as they were, or choose another output"
    )


def _told_changes(checkpoint: Checkpoint, about: Mapping[str, Any], settings: TrainSettings) -> list[str]:
    """A line for each thing that changes what later steps do, and may."""
    from storymem.film.folder import differences
    from storymem.training.optimizers import learning_rate

    before, now = checkpoint.about["config"], about["config"]
    planned = before.get("steps", settings.steps)

    def told(config: Mapping[str, Any]) -> dict[str, Any]:
        turns = (config.get("parallel") or {}).get("alternate_every")
        return {"optimizer": config.get("optimizer"), "parallel": {"alternate_every": turns}}

    lines = differences(told(before), told(now))
    if checkpoint.about["clips"] != about["clips"]:
        lines.append("the training set is not the one of the steps before: later steps draw other samples")
    if (split := checkpoint.about["processes"]) != about["processes"]:
        lines.append(f"processes: {split} before, {about['processes']} now, with as many samples a step")
    old = learning_rate(build_settings(OptimizerSettings, before.get("optimizer") or {}), planned)
    new = learning_rate(settings.optimizer, settings.steps)
    was, rate = old(checkpoint.step), new(checkpoint.step)
    if checkpoint.step < settings.steps and abs(was - rate) > 1e-9 * max(was, rate):
        line = f"the learning rate of step {checkpoint.step + 1} is {rate:.3g}, and was to be {was:.3g}"
        if settings.optimizer.schedule != "constant_with_warmup":
            line += f" (schedule={settings.optimizer.schedule}, steps: {planned} before, {settings.steps} now)"
        if was and rate:
            line += f"; to go on at the old rate, write optimizer.lr={settings.optimizer.lr * was / rate:.3g}"
        elif rate:
            line += "; if that is too much, write a lower optimizer.lr"
        lines.append(line)
    return lines


def open_cache(settings: TrainSettings) -> Latents:
    """The cache of the training set, which the model's own VAE and text encoder must have made."""
    from storymem.data.cache import LatentCache
    from storymem.data.fingerprint import cache_fingerprint
    from storymem.data.settings import Bucket, DataSettings

    video = settings.model.video
    bucket = Bucket(frames=video.frames, height=video.height, width=video.width)
    wanted = cache_fingerprint(settings.model, DataSettings(buckets=(bucket,), fps=video.fps))
    # A cache may hold more sizes than the model's own, which check_sizes looks for.
    cache = LatentCache.open(settings.dataset, fingerprint={name: wanted[name] for name in ("vae", "text_encoder")})
    check_sizes(cache, settings)
    check_masks(cache, settings)
    cache.given(0, GIVEN_FRAMES[settings.conditioning])  # or it says how to prepare them
    return cache


def check_masks(latents: Latents, settings: TrainSettings) -> None:
    """Raise ``ValueError`` if masks shall count and no clip that is trained on has one."""
    train = (index for members in latents.groups("train").values() for index in members)
    if settings.objective.mask_weight != 1 and not any(latents.clips[index].mask for index in train):
        raise ValueError(
            f"objective.mask_weight={settings.objective.mask_weight:g}, but {settings.dataset} has no masks: run "
            "prepare_data with masks=FOLDER, or leave mask_weight at 1"
        )


def check_sizes(latents: Latents, settings: TrainSettings) -> None:
    """Raise ``ValueError`` if no clip has the size and length of the model's shots."""
    video = settings.model.video
    own = (video.frames, video.height, video.width)
    found = {tuple(clip.bucket) for clip in latents.clips}
    if own not in found:
        sizes = ", ".join("x".join(map(str, bucket)) for bucket in sorted(found)) or "nothing"
        raise ValueError(
            f"{settings.dataset} holds clips of {sizes} (frames x height x width), none of them of the model's "
            f"{'x'.join(map(str, own))}: prepare the data at that size, or set model.video to one of these"
        )


class Run:
    """A run that is ready to go: everything is checked, loaded and taken up from the newest checkpoint.

    Args:
        settings: checked.
        config: what they were built from, for the run's folder.
        latents: the training set.
    """

    def __init__(self, settings: TrainSettings, config: Mapping[str, Any], latents: Latents) -> None:
        from storymem.training.callbacks import LogMetrics
        from storymem.training.dataset import train_batches, train_planner, training_set_digest
        from storymem.training.experts import check_parallel, make_accelerator
        from storymem.training.optimizers import check_optimizer
        from storymem.training.run_log import RunLog, check_log
        from storymem.training.trainer import Trainer

        self.settings, self.folder = settings, Path(settings.output)
        self.accelerator = accelerator = make_accelerator(_device(settings))
        check_parallel(settings.parallel, accelerator)
        check_optimizer(settings.optimizer, settings.parallel, accelerator.device)
        check_log(settings.log)
        world = accelerator.num_processes
        planner = train_planner(
            latents, settings.batch, conditioning=settings.conditioning, seed=settings.seed, world=world
        )
        about = {
            "config": json.loads(json.dumps(config)),
            "processes": world,
            "samples_per_step": planner.samples,
            "clips": training_set_digest(latents),
        }
        checkpoints = Checkpoints(self.folder / CHECKPOINTS, keep=settings.checkpoint.keep, about=about)
        self.taken_up = self._newest(checkpoints)
        if self.taken_up is not None:
            check_same_run(self.taken_up, settings, config, processes=world)
        self.log = RunLog(self.folder, settings.log) if accelerator.is_main_process else None
        self.method, sampling = self._build_method(config)
        callbacks: list[Callback] = [LogMetrics(self.log, every=settings.log.every, watch=accelerator.is_main_process)]
        callbacks += self._validation(latents)
        callbacks += sampling
        self.trainer: Trainer = Trainer(
            self.method,
            lambda start: train_batches(
                latents,
                planner,
                size=settings.batch.size,
                workers=settings.batch.workers,
                rank=accelerator.process_index,
                world=world,
                start=start,
            ),
            accelerator=accelerator,
            optimizer=settings.optimizer,
            steps=settings.steps,
            accumulation=settings.batch.accumulation,
            seed=settings.seed,
            checkpoints=checkpoints,
            checkpoint_every=settings.checkpoint.every,
            callbacks=callbacks,
        )
        if self.taken_up is not None:
            self.trainer.load(self.taken_up.path)
        if self.log is not None:
            self._begin(self.log, checkpoints)

    def _newest(self, checkpoints: Checkpoints) -> Checkpoint | None:
        """The checkpoint to go on from, the same at all processes."""
        from accelerate.utils import broadcast_object_list

        step, fault = None, None
        if self.accelerator.is_main_process:
            checkpoints.remove_unfinished()
            try:
                found = checkpoints.newest()
                step = None if found is None else found.step
            except FileError as error:
                fault = str(error)
        step, fault = broadcast_object_list([step, fault])
        if fault is not None:
            raise FileError(fault)
        return None if step is None else read_checkpoint(checkpoints.path(step))

    def _begin(self, log: RunLog, checkpoints: Checkpoints) -> None:
        """Say what is gone on with, and write the run's settings and the beginning of its log: it can begin."""
        import yaml

        settings, step = self.settings, self.trainer.step
        one = sum(4 * parameter.numel() for parameter in self.trainer.parameters.values())
        # Of each parameter a checkpoint has the value, two moments and perhaps the average.
        checkpoint = one * (3 if settings.optimizer.ema_decay is None else 4)
        more = max(1, settings.checkpoint.keep + 1 - len(checkpoints.steps()))
        check_room(self.folder, checkpoint * more + one * len(settings.export), "this run")
        if self.taken_up is not None:
            changes = _told_changes(self.taken_up, checkpoints.about, settings)
            lines = "".join(f"\n  {line}" for line in changes)
            print(f"going on after step {step}{', with changes:' if changes else ''}{lines}", file=sys.stderr)
        config = checkpoints.about["config"]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / CONFIG, yaml.safe_dump(config, allow_unicode=True))
        log.begin(config, step=step)

    def finish(self) -> None:
        """Write the finished adapter, averaged if an average is kept, in every layout that is asked for.

        Each layout's folder is whole or absent.

        Raises:
            NotFiniteError: before anything is written, if a number of it is NaN or infinite.
        """
        from storymem.training.experts import write_adapters

        with self.trainer.averaged():
            tensors = self.trainer.whole_parameters()
        self.trainer.check_finite(tensors)
        if self.accelerator.is_main_process:
            for layout in self.settings.export:
                with replacing_folder(self.folder / layout) as partial:
                    write_adapters(tensors, partial, info=self.method.info, layout=layout)
                print(self.folder / layout)
        if self.log is not None:
            self.log.close()
        self.accelerator.end_training()

    def _build_method(self, config: Mapping[str, Any]) -> tuple[MemoryTraining, list[Callback]]:
        """The method, and what tells stories with it: the text encoder is done before the experts take the room."""
        from storymem.training.experts import adapter_info
        from storymem.training.method import MemoryTraining
        from storymem.training.objective import MemoryObjective

        settings = self.settings
        rehearsal = None
        if settings.samples.every:
            from storymem.training.rehearsal import Rehearsal

            rehearsal = Rehearsal.build(settings, config, self.log, device=self.accelerator.device)
        experts = self._load_experts()
        objective = MemoryObjective(
            settings=settings.objective,
            boundary=settings.model.boundary,
            rope_stride=settings.model.rope_stride,
            memory_attention=settings.model.memory_attention,
        )
        notes = {
            "base": settings.model.name,
            "expert": settings.expert,
            "steps": settings.steps,
            "seed": settings.seed,
            "max_memory": settings.batch.max_memory,
            "samples_per_step": settings.batch.size * settings.batch.accumulation * self.accelerator.num_processes,
            "objective": asdict(settings.objective),
            "optimizer": asdict(settings.optimizer),
        }
        info = adapter_info(
            settings.adapter,
            rope_stride=settings.model.rope_stride,
            memory_attention=settings.model.memory_attention,
            conditioning=settings.conditioning,
            training=notes,
        )
        import torch

        method = MemoryTraining(
            experts,
            objective,
            info=info,
            alternate_every=settings.parallel.alternate_every,
            dtype=getattr(torch, settings.model.dtype),
        )
        if rehearsal is None:
            return method, []
        rehearsal.use(experts)
        return method, [rehearsal]

    def _load_experts(self) -> Experts:
        """The experts that are needed: those that train, and for sampling the other too."""
        from storymem.training.experts import Experts, add_adapter
        from storymem.wan.loading import load_pipeline
        from storymem.wan.spec import experts_of

        settings = self.settings
        trained = settings.trained
        pipe = load_pipeline(
            replace(settings.model, adapter=None),
            runtime=RuntimeSettings(device="cpu"),
            text_encoder=False,
            experts=settings.model.spec.experts if settings.samples.every else trained,
        )
        needed = experts_of(pipe)
        del pipe
        for transformer in needed.values():
            transformer.requires_grad_(False)
        # A checkpoint holds the whole adapter.
        adapter = settings.adapter if self.taken_up is None else replace(settings.adapter, start=None)
        for number, name in enumerate(trained):
            add_adapter(needed[name], name, adapter, seed=settings.seed + number)
        return Experts(needed, trained=trained, accelerator=self.accelerator, parallel=settings.parallel)

    def _validation(self, latents: Latents) -> list[Validation]:
        from storymem.training.callbacks import Validation
        from storymem.training.dataset import valid_planner

        settings = self.settings
        if not settings.validation.every:
            return []
        planner = valid_planner(latents, settings.batch, conditioning=settings.conditioning, seed=settings.seed)
        validation = Validation(
            self.method,
            latents,
            planner,
            samples=settings.validation.samples,
            every=settings.validation.every,
            log=self.log,
        )
        return [validation]


def _device(settings: TrainSettings) -> Any:
    """The device of the settings, or None to leave it to the launcher."""
    from storymem.wan.runtime import check_runtime

    return None if settings.runtime.device == "auto" else check_runtime(settings.runtime)
