"""From a composed configuration to a trained adapter: the settings of ``train.yaml`` and what is built from them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storymem.config import build_settings
from storymem.modes import check_lengths
from storymem.settings import CONTINUITY, TrainSettings
from storymem.story import load_story
from storymem.training.settings import GIVEN_FRAMES
from storymem.wan.settings import RuntimeSettings

if TYPE_CHECKING:
    from storymem.training.callbacks import Validation
    from storymem.training.dataset import Latents
    from storymem.training.experts import Experts
    from storymem.training.method import MemoryTraining
    from storymem.training.run_log import RunLog
    from storymem.training.trainer import Callback, Trainer


CONFIG = "config.yaml"
#: What may differ when a run is taken up: where it runs, how long, and what is told of it.
_BESIDES = (
    *("output", "resume", "steps", "runtime", "export", "dataset"),
    *("parallel", "checkpoint", "validation", "samples", "log", "scorer", "memory", "sampler"),
)


def train(config: Mapping[str, Any]) -> Path:
    """Train the adapter that a composed configuration (plain containers) describes; returns the run's folder.

    Settings are checked first, before torch is imported; then everything else that can be wrong, before the first
    step.

    Raises:
        ValueError: for what cannot work.
        Stopped: after a signal, saved; the same command goes on.
    """
    settings = build_settings(TrainSettings, config)
    folder = Path(settings.output)
    check_run_folder(folder, settings, config)
    if settings.samples.every:
        story = load_story(settings.samples.story or "")
        continuity = CONTINUITY[settings.conditioning]
        check_lengths(story, frames=settings.model.video.frames, continuity=continuity, first_shot="m2v")
    from storymem.wan.sources import check_weights

    check_weights(replace(settings.model, adapter=None), text_to_video=False)
    run = Run(settings, config, open_cache(settings))
    try:
        run.trainer.run()
        run.finish()
    finally:
        if run.log is not None:
            run.log.close()
    return folder


def check_run_folder(folder: Path, settings: TrainSettings, config: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if ``folder`` holds a run that this one is not."""
    import yaml

    if not (folder / CONFIG).exists():
        return
    if settings.resume == "never":
        raise ValueError(f"{folder} holds a run: choose another output, or go on with it by resume=auto")
    from storymem.film import differences

    def essence(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key not in _BESIDES}

    before = yaml.safe_load((folder / CONFIG).read_text())
    changed = differences(essence(before), essence(json.loads(json.dumps(config))))
    if changed:
        lines = "\n".join(f"  {line}" for line in changed[:12])
        raise ValueError(
            f"{folder} holds a run with other settings, which cannot be gone on with:\n{lines}\n"
            "write the settings as they were, or choose another output"
        )


def open_cache(settings: TrainSettings) -> Latents:
    """The cache of the training set, which the model's own VAE and text encoder must have made."""
    from storymem.training.cache import LatentCache
    from storymem.training.data_settings import Bucket, DataSettings
    from storymem.training.fingerprint import cache_fingerprint

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
        from storymem.training.checkpoints import Checkpoints
        from storymem.training.dataset import train_batches, train_planner
        from storymem.training.experts import check_parallel, make_accelerator
        from storymem.training.optimizers import check_optimizer
        from storymem.training.run_log import check_log
        from storymem.training.trainer import Trainer

        self.settings, self.folder = settings, Path(settings.output)
        self.accelerator = accelerator = make_accelerator(_device(settings))
        check_parallel(settings.parallel, accelerator)
        check_optimizer(settings.optimizer, settings.parallel, accelerator.device)
        check_log(settings.log)
        planner = train_planner(
            latents,
            settings.batch,
            conditioning=settings.conditioning,
            seed=settings.seed,
            world=accelerator.num_processes,
        )
        checkpoints = Checkpoints(self.folder / "checkpoints", keep=settings.checkpoint.keep)
        begun = max(checkpoints.steps(), default=0)
        _check_checkpoint(checkpoints.path(begun) if begun else None, settings)
        self.log = self._open_log(config, begun)
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
                world=accelerator.num_processes,
                start=start,
                pin_memory=accelerator.device.type == "cuda",
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
        if begun:
            self.trainer.load(checkpoints.path(begun))
            if accelerator.is_main_process:
                print(f"going on after step {begun}", file=sys.stderr)

    def finish(self) -> None:
        """Write the finished adapter, averaged if an average is kept, in every layout that is asked for."""
        from storymem.training.experts import write_adapters

        with self.trainer.averaged():
            tensors = self.trainer.whole_parameters()
        if self.accelerator.is_main_process:
            for layout in self.settings.export:
                write_adapters(tensors, self.folder / layout, info=self.method.info, layout=layout)
                print(self.folder / layout)
        if self.log is not None:
            self.log.close()
        self.accelerator.end_training()

    def _open_log(self, config: Mapping[str, Any], begun: int) -> RunLog | None:
        import yaml

        from storymem.io import write_atomically
        from storymem.training.run_log import RunLog

        if not self.accelerator.is_main_process:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / CONFIG, yaml.safe_dump(dict(config), allow_unicode=True).encode())
        return RunLog(self.folder, self.settings.log, config=config, step=begun)

    def _build_method(self, config: Mapping[str, Any]) -> tuple[MemoryTraining, list[Callback]]:
        """The method, and what tells stories with it: the text encoder is done before the experts take the room."""
        from storymem.training.experts import adapter_info
        from storymem.training.method import MemoryTraining
        from storymem.training.objective import MemoryObjective

        settings = self.settings
        rehearsal = None
        if settings.samples.every:
            from storymem.rehearsal import Rehearsal

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
        from storymem.training.experts import EXPERTS, Experts, add_adapter
        from storymem.wan.loading import load_pipeline
        from storymem.wan.lora_layouts import experts_of

        settings = self.settings
        trained = EXPERTS[settings.expert]
        pipe = load_pipeline(
            replace(settings.model, adapter=None),
            runtime=RuntimeSettings(device="cpu"),
            text_encoder=False,
            experts=EXPERTS["both"] if settings.samples.every else trained,
        )
        needed = experts_of(pipe)
        del pipe
        for number, name in enumerate(trained):
            add_adapter(needed[name], name, settings.adapter, seed=settings.seed + number)
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


def _check_checkpoint(folder: Path | None, settings: TrainSettings) -> None:
    """Raise ``ValueError`` if the checkpoint to go on from holds an adapter of another rank or scale."""
    if folder is None:
        return
    from storymem.training.experts import check_same_adapter
    from storymem.wan.lora_files import open_adapter_file
    from storymem.wan.lora_info import AdapterInfo

    for path in sorted((folder / "adapter").glob("*.safetensors")):
        info = AdapterInfo.from_file(open_adapter_file(path))
        assert info is not None, "checkpoints hold adapters in our own layout"
        check_same_adapter(info, settings.adapter, str(path))
