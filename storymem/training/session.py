"""A training run that is ready to start: everything checked, loaded, and resumed from the newest checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import broadcast_object_list

from storymem.data.cache import LatentCache, cache_fingerprint
from storymem.data.settings import Bucket, DataSettings
from storymem.io import FileError, check_room, replacing_folder, write_text
from storymem.training.callbacks import LogMetrics, Validation
from storymem.training.checkpoints import Checkpoint, Checkpoints
from storymem.training.dataset import SamplePlanner, train_batches, training_set_digest
from storymem.training.experts import (
    Experts,
    check_parallel,
    make_accelerator,
    prepare_expert,
    save_model,
    save_parameters,
)
from storymem.training.method import MemoryTraining
from storymem.training.objective import MemoryObjective
from storymem.training.optimization import check_optimizer
from storymem.training.resume import CHECKPOINTS, CONFIG, MODEL, changes_of_later_steps, check_same_run
from storymem.training.run_log import RunLog, check_log
from storymem.training.settings import GIVEN_FRAMES, TrainSettings
from storymem.training.trainer import Callback, Trainer
from storymem.wan.loading import load_pipeline
from storymem.wan.lora import AdapterInfo
from storymem.wan.runtime import check_runtime
from storymem.wan.settings import RuntimeSettings
from storymem.wan.spec import experts_of


def open_cache(settings: TrainSettings) -> LatentCache:
    """The cache of the training set, which the model's own VAE and text encoder must have made.

    Raises:
        ValueError: if there is none, or it lacks the model's size, the conditioning or masks.
    """
    video = settings.model.video
    own = Bucket(frames=video.frames, height=video.height, width=video.width)
    wanted = cache_fingerprint(settings.model, DataSettings(buckets=(own,), fps=video.fps))
    del wanted["size"]  # it may hold more sizes than the model's own
    cache = LatentCache.open(settings.dataset, fingerprint=wanted)
    found = {clip.bucket for clip in cache.clips}
    if own.shape not in found:
        sizes = ", ".join("x".join(map(str, bucket)) for bucket in sorted(found))
        raise ValueError(
            f"{settings.dataset} holds clips of {sizes} (frames x height x width), none of them of the model's "
            f"{own}: prepare the data at that size, or set model.video to one of these"
        )
    check_masks(cache, settings)
    cache.given(0, GIVEN_FRAMES[settings.conditioning])  # raises if the cache lacks them
    return cache


def check_masks(latents: LatentCache, settings: TrainSettings) -> None:
    """Raise ``ValueError`` if masks have a weight and no clip of the training split has one."""
    train = (index for members in latents.groups("train").values() for index in members)
    if settings.objective.mask_weight != 1 and not any(latents.clips[index].mask for index in train):
        raise ValueError(
            f"objective.mask_weight={settings.objective.mask_weight:g}, but {settings.dataset} has no masks: run "
            "prepare_data with masks=FOLDER, or leave mask_weight at 1"
        )


class Run:
    """A run that is ready to start.

    Args:
        settings: checked.
        config: what they were built from, for the run's folder.
        latents: the training set.
    """

    def __init__(self, settings: TrainSettings, config: Mapping[str, Any], latents: LatentCache) -> None:
        self.settings, self.folder = settings, Path(settings.output)
        self.accelerator = accelerator = make_accelerator(_device(settings))
        check_parallel(settings.parallel, accelerator)
        check_optimizer(settings.optimizer, accelerator.device)
        check_log(settings.log)
        world, batch = accelerator.num_processes, settings.batch
        self._planned: dict[str, Any] = {"conditioning": settings.conditioning, "seed": settings.seed}
        planner = SamplePlanner(latents, batch, samples=batch.size * batch.accumulation * world, **self._planned)
        about = {
            "config": json.loads(json.dumps(config)),
            "processes": world,
            "samples_per_step": planner.samples,
            "clips": training_set_digest(latents),
        }
        checkpoints = Checkpoints(self.folder / CHECKPOINTS, keep=settings.checkpoint.keep, about=about)
        self.resumed = self._newest(checkpoints)
        if self.resumed is not None:
            check_same_run(self.resumed, settings, config, processes=world)
        self.log = RunLog(self.folder, settings.log) if accelerator.is_main_process else None
        # The sample film first: its text encoder is released before the experts are loaded.
        films = self._sample_film(config)
        self.method = self._build_method()
        for film in films:
            film.generator.experts = self.method.experts
        callbacks: list[Callback] = [LogMetrics(self.log, every=settings.log.every)]
        callbacks += [*self._validation(latents), *films]
        self.trainer = Trainer(
            self.method,
            lambda start: train_batches(
                latents,
                planner,
                size=batch.size,
                workers=batch.workers,
                rank=accelerator.process_index,
                world=world,
                start=start,
            ),
            accelerator=accelerator,
            optimizer=settings.optimizer,
            steps=settings.steps,
            accumulation=batch.accumulation,
            seed=settings.seed,
            checkpoints=checkpoints,
            checkpoint_every=settings.checkpoint.every,
            callbacks=callbacks,
        )
        if self.resumed is not None:
            self.trainer.load(self.resumed)
        if self.log is not None:
            self._begin(self.log, checkpoints)

    def finish(self) -> None:
        """Write the result, averaged if there is an average: the adapter in every layout, or the whole model.

        Each folder is whole or absent.

        Raises:
            NotFiniteError: before anything is written, if it has NaN or infinity.
        """
        with self.trainer.averaged():
            tensors = self.trainer.whole_parameters()
        self.trainer.check_finite(tensors)
        if self.accelerator.is_main_process:
            for name in self.settings.export if self.method.info else (MODEL,):
                with replacing_folder(self.folder / name) as partial:
                    if self.method.info is None:
                        save_model(tensors, partial, replace(self.settings.model, adapter=None))
                    else:
                        save_parameters(tensors, partial, info=self.method.info, layout=name)  # type: ignore[arg-type]
                print(self.folder / name)
        if self.log is not None:
            self.log.close()
        self.accelerator.end_training()

    def _newest(self, checkpoints: Checkpoints) -> Checkpoint | None:
        """The checkpoint to resume from, the same at all processes."""
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
        return None if step is None else Checkpoint.read(checkpoints.path(step))

    def _begin(self, log: RunLog, checkpoints: Checkpoints) -> None:
        """Report what is resumed, and write the run's settings and the beginning of its log."""
        settings, step = self.settings, self.trainer.step
        one = sum(4 * parameter.numel() for parameter in self.trainer.parameters.values())
        checkpoint = one * (3 if settings.optimizer.ema_decay is None else 4)  # value, two moments, average
        more = max(1, settings.checkpoint.keep + 1 - len(checkpoints.steps()))
        check_room(self.folder, checkpoint * more + one * len(settings.export), "this run")
        if self.resumed is not None:
            changes = changes_of_later_steps(self.resumed, checkpoints.about, settings)
            lines = "".join(f"\n  {line}" for line in changes)
            print(f"resuming after step {step}{', with changes:' if changes else ''}{lines}", file=sys.stderr)
        config = checkpoints.about["config"]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / CONFIG, yaml.safe_dump(config, allow_unicode=True))
        log.begin(config, step=step)

    def _sample_film(self, config: Mapping[str, Any]) -> list[Any]:
        if not self.settings.samples.every:
            return []
        from storymem.training.sample_film import SampleFilm

        return [SampleFilm.build(self.settings, config, self.log, device=self.accelerator.device)]

    def _validation(self, latents: LatentCache) -> list[Validation]:
        settings, validation = self.settings, self.settings.validation
        if not validation.every:
            return []
        planner = SamplePlanner(latents, settings.batch, samples=1, split="valid", **self._planned)
        counts = {"samples": validation.samples, "every": validation.every}
        return [Validation(self.method, latents, planner, **counts, log=self.log)]

    def _build_method(self) -> MemoryTraining:
        settings, model = self.settings, self.settings.model
        return MemoryTraining(
            self._load_experts(),
            MemoryObjective(
                settings=settings.objective,
                boundary=model.boundary,
                rope_stride=model.rope_stride,
                memory_attention=model.memory_attention,
            ),
            info=self._adapter_info(),
            alternate_every=settings.parallel.alternate_every,
            dtype=getattr(torch, model.dtype),
        )

    def _adapter_info(self) -> AdapterInfo | None:
        """What the files of the trained adapter state about it."""
        settings, batch = self.settings, self.settings.batch
        if settings.adapter is None:
            return None
        return AdapterInfo(
            rank=settings.adapter.rank,
            alpha=settings.adapter.alpha,
            use_rslora=settings.adapter.use_rslora,
            memory_attention=settings.model.memory_attention,
            rope_stride=settings.model.rope_stride,
            conditioning=settings.conditioning,
            training={
                "base": settings.model.name,
                "expert": settings.expert,
                "steps": settings.steps,
                "seed": settings.seed,
                "max_memory": batch.max_memory,
                "samples_per_step": batch.size * batch.accumulation * self.accelerator.num_processes,
                "objective": asdict(settings.objective),
                "optimizer": asdict(settings.optimizer),
            },
        )

    def _load_experts(self) -> Experts:
        """The experts that train, and for the sample film the other too."""
        settings, trained = self.settings, self.settings.trained
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
        adapter = settings.adapter
        if adapter is not None and self.resumed is not None:
            adapter = replace(adapter, start=None)  # a checkpoint has the whole adapter
        for number, name in enumerate(trained):
            prepare_expert(needed[name], name, adapter, seed=settings.seed + number)
        return Experts(
            needed,
            trained=trained,
            accelerator=self.accelerator,
            parallel=settings.parallel,
            full=adapter is None,
        )


def _device(settings: TrainSettings) -> torch.device | None:
    """The device of the settings, or None to leave it to the launcher."""
    device = settings.runtime.device
    return None if device == "auto" else check_runtime(RuntimeSettings(device=device))
