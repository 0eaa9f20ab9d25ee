"""The command ``train``: from a composed configuration to a trained adapter or model.

Torch is loaded once the settings are checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storymem.config import build_settings
from storymem.film.settings import check_lengths
from storymem.io import check_room, folder_lock
from storymem.story import load_story
from storymem.training.resume import CHECKPOINTS, check_run_folder
from storymem.training.run_settings import CONTINUITY
from storymem.training.settings import TrainSettings
from storymem.wan.processes import Launch

if TYPE_CHECKING:  # it loads torch
    from storymem.data.cache import LatentCache


def train(config: Mapping[str, Any]) -> Path:
    """Train what a composed configuration (plain containers) describes; returns the run's folder.

    Settings are checked first, before torch is imported; then everything else that can be wrong, before the first
    step; ``dry_run`` ends there, with the plan, and writes nothing. One process at a time trains in a folder, with
    those that were started together with it.

    Raises:
        ValueError: for what cannot work.
        Stopped: after SIGINT, SIGTERM or SIGUSR1, saved; the same command resumes.
    """
    settings = build_settings(TrainSettings, config)
    folder = Path(settings.output)
    begun = check_run_folder(folder, settings, config)
    with_film = bool(settings.samples.every)
    if with_film:
        story, continuity = load_story(settings.samples.story or ""), CONTINUITY[settings.conditioning]
        check_lengths(story, frames=settings.model.video.frames, continuity=continuity, first_shot="m2v")
    from storymem.training.experts import check_start
    from storymem.training.session import Run, check_machine, open_cache
    from storymem.wan.sources import check_weights

    model = replace(settings.model, adapter=None)
    everything = with_film or settings.adapter is None  # a trained model is exported whole
    experts = model.spec.experts if everything else settings.trained
    encoded = everything or settings.objective.encodes
    check_weights(model, text_to_video=False, text_encoder=encoded, experts=experts)
    if not begun and settings.adapter is not None:
        check_start(settings.adapter, model, settings.trained, settings.objective.system)
    latents, launch = open_cache(settings), Launch.of_environment()
    if settings.dry_run:
        check_machine(settings, launch.world)
        if launch.is_first:
            _print_plan(settings, latents, launch.world)
        return folder
    with folder_lock(folder, "training in") if launch.is_first else nullcontext():
        run = Run(settings, config, latents)
        try:
            run.trainer.run()
            run.finish()
        finally:
            if run.log is not None:
                run.log.close()
    return folder


def _print_plan(settings: TrainSettings, latents: LatentCache, processes: int) -> None:
    """Print the plan. ``ValueError`` or ``OSError`` if the sample film cannot be made, or the disk is too small."""
    from storymem.training.checkpoints import Checkpoints
    from storymem.training.plan import disk_bytes, make_plan, parameters
    from storymem.training.sample_film import check_sample_film

    if settings.samples.every:
        check_sample_film(settings)
    checkpoints = Checkpoints(Path(settings.output) / CHECKPOINTS, keep=settings.checkpoint.keep)
    newest = checkpoints.newest_readable()
    print(make_plan(settings, latents, processes=processes, done=0 if newest is None else newest.step), flush=True)
    _, trained = parameters(settings)
    check_room(settings.output, disk_bytes(settings, trained, checkpoints=len(checkpoints.steps())), "this run")
