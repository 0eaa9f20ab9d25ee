"""A training run that is ready to start: everything checked, loaded, and resumed from the newest checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import broadcast_object_list

from storymem.data.cache import LatentCache, cache_fingerprint
from storymem.data.settings import Bucket, DataSettings
from storymem.devices import resolve_device
from storymem.io import FileError, check_room, replacing_folder, write_text
from storymem.training.batches import train_batches, training_set_digest
from storymem.training.callbacks import LogMetrics, Validation
from storymem.training.checkpoints import Checkpoint, Checkpoints
from storymem.training.experts import Experts, load_start, make_accelerator, prepare_expert, save_model
from storymem.training.method import ExpertTraining
from storymem.training.objectives.encodings import Encodings, encode
from storymem.training.objectives.flow import loss_of
from storymem.training.objectives.samples import Source, samples_of
from storymem.training.plan import disk_bytes
from storymem.training.resume import CHECKPOINTS, CONFIG, MODEL, changes_of_later_steps, check_same_run
from storymem.training.run_log import RunLog
from storymem.training.run_settings import AdapterTrainingSettings
from storymem.training.settings import TrainSettings
from storymem.training.trainer import Callback, Trainer
from storymem.wan.loading import load_pipeline
from storymem.wan.lora import AdapterInfo
from storymem.wan.settings import RuntimeSettings
from storymem.wan.spec import experts_of


def open_cache(settings: TrainSettings) -> LatentCache:
    """The cache of the training set, which the model's own VAE and text encoder must have made.

    Raises:
        ValueError: if there is none, or it lacks the model's size or what the objective needs.
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
    samples_of(settings.objective).check(settings.objective, settings, cache)
    return cache


def check_machine(settings: TrainSettings, processes: int) -> None:
    """Raise ``ValueError`` for settings that so many processes, this machine or its packages cannot serve."""
    resolve_device(settings.runtime.device)
    if settings.parallel.strategy == "fsdp" and processes == 1:
        raise ValueError(
            "parallel.strategy=fsdp shards the experts over several processes and there is one: start it with "
            "torchrun --nproc-per-node=N -m storymem train ..., or use parallel.strategy=ddp"
        )
    if settings.log.wandb != "disabled" and find_spec("wandb") is None:
        raise ValueError(
            f"log.wandb={settings.log.wandb} needs wandb: pip install 'storymem[train]', or write log.wandb=disabled; "
            "the run's folder has all metrics either way"
        )


class Run:
    """A run that is ready to start; ``settings`` were built from ``config``, which the run's folder holds."""

    def __init__(self, settings: TrainSettings, config: Mapping[str, Any], latents: LatentCache) -> None:
        self.settings, self.folder = settings, Path(settings.output)
        device = None if settings.runtime.device == "auto" else resolve_device(settings.runtime.device)
        self.accelerator = accelerator = make_accelerator(device)
        check_machine(settings, accelerator.num_processes)
        world, batch = accelerator.num_processes, settings.batch
        source = Source(
            train=settings,
            latents=latents,
            encodings=self._encodings(latents),
            count=batch.size * batch.accumulation * world,
        )
        draw = partial(samples_of(settings.objective), settings.objective)
        samples = draw(source)
        about = {
            "config": json.loads(json.dumps(config)),
            "processes": world,
            "samples_per_step": samples.count,
            "clips": training_set_digest(latents),
        }
        checkpoints = Checkpoints(self.folder / CHECKPOINTS, keep=settings.checkpoint.keep, about=about)
        self.resumed = self._newest(checkpoints)
        if self.resumed is not None:
            check_same_run(self.resumed, settings, config, processes=world)
        self.log = RunLog(self.folder, settings.log) if accelerator.is_main_process else None
        # The sample film first: its text encoder is released before the experts are loaded.
        films = self._sample_film(config)
        self.method = self._build_method(samples.count)
        for film in films:
            film.generator.experts = self.method.experts
        callbacks: list[Callback] = [LogMetrics(self.log, every=settings.log.every)]
        if every := settings.validation.every:
            held_out = draw(replace(source, count=1, split="valid"))
            number = settings.validation.samples
            callbacks.append(Validation(self.method, held_out, samples=number, every=every, log=self.log))
        readers = {"workers": batch.workers, "rank": accelerator.process_index, "world": world}
        self.trainer = Trainer(
            self.method,
            lambda start: train_batches(samples, size=batch.size, start=start, **readers),
            accelerator=accelerator,
            optimizer=settings.optimizer,
            steps=settings.steps,
            accumulation=batch.accumulation,
            seed=settings.seed,
            checkpoints=checkpoints,
            checkpoint_every=settings.checkpoint.every,
            callbacks=[*callbacks, *films],
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
                        self.method.save(tensors, partial, layout=name)  # type: ignore[arg-type]
                print(self.folder / name)
        if self.log is not None:
            self.log.close()
        self.accelerator.end_training()

    def _encodings(self, latents: LatentCache) -> Encodings:
        """What the objective needs beside the training set."""
        needs = samples_of(self.settings.objective).needs(self.settings.objective, self.settings, latents)
        return encode(needs, self.folder, replace(self.settings.model, adapter=None), latents, self.accelerator)

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
        trained = sum(parameter.numel() for parameter in self.trainer.parameters.values())
        check_room(self.folder, disk_bytes(settings, trained, checkpoints=len(checkpoints.steps())), "this run")
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

    def _build_method(self, samples_per_step: int) -> ExpertTraining:
        """The experts that train (and, for the sample film, the other too) and their loss."""
        settings, model, adapter = self.settings, replace(self.settings.model, adapter=None), self.settings.adapter
        pipe = load_pipeline(
            model,
            runtime=RuntimeSettings(device="cpu"),
            text_encoder=False,
            experts=model.spec.experts if settings.samples.every else settings.trained,
        )
        transformers = experts_of(pipe)
        del pipe
        for transformer in transformers.values():
            transformer.requires_grad_(False)
        for seed, name in enumerate(settings.trained, start=settings.seed):
            prepare_expert(transformers[name], adapter, seed=seed)
            settings.objective.prepare(transformers[name], seed=seed)
            # A checkpoint has the whole adapter.
            if adapter is not None and adapter.start is not None and self.resumed is None:
                load_start(transformers[name], name, adapter.start)
        parallel, accelerator = settings.parallel, self.accelerator
        return ExpertTraining(
            Experts(transformers, trained=settings.trained, accelerator=accelerator, parallel=parallel),
            loss_of(settings.objective, model),
            info=None if adapter is None else self._adapter_info(adapter, samples_per_step),
            alternate_every=parallel.alternate_every,
            dtype=getattr(torch, model.dtype),
        )

    def _adapter_info(self, adapter: AdapterTrainingSettings, samples_per_step: int) -> AdapterInfo:
        """What the files of the trained adapter state about it."""
        settings = self.settings
        return AdapterInfo(
            rank=adapter.rank,
            alpha=adapter.alpha,
            use_rslora=adapter.use_rslora,
            memory_attention=settings.model.memory_attention,
            rope_stride=settings.model.rope_stride,
            conditioning=settings.conditioning,
            objective=settings.objective.made_for(settings),
            training={
                "base": settings.model.name,
                "expert": settings.expert,
                "steps": settings.steps,
                "seed": settings.seed,
                "max_memory": settings.batch.max_memory,
                "samples_per_step": samples_per_step,
                "objective": asdict(settings.objective),
                "optimizer": asdict(settings.optimizer),
            },
        )
