"""Methods: a story in, a film's folder out. What another baseline must be to stand in the same table."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from storymem.config import build_settings
from storymem.film.folder import Film, ShotRecord, differences
from storymem.film.generate import build_generator, build_storyteller
from storymem.film.ownership import film_folder
from storymem.film.progress import Progress
from storymem.film.resume import story_record
from storymem.film.settings import GenerateSettings, uses_text_to_video
from storymem.film.storyteller import Storyteller, finish_film
from storymem.io import check_room
from storymem.story import Shot, Story
from storymem.wan.shots import ShotRequest
from storymem.wan.sources import check_weights


class Method(Protocol):
    """Makes films. Any class with these methods can be the ``_target_`` of a file in ``configs/method``.

    Attributes:
        name: of its row in the tables and its folder of films.
    """

    name: str

    def check(self, story: Story) -> None:
        """Raise ``ValueError`` or ``FileNotFoundError`` for what would keep ``story`` from being filmed."""
        ...

    def make(self, story: Story, folder: Path) -> None:
        """Make the film, or go on with it; a finished one is left as it is.

        Afterwards ``folder`` holds a film of ours, or a file ``01_02.mp4`` for each shot (scene 1, shot 2).
        """
        ...

    def free(self) -> None:
        """Drop the models: the scorers need the room."""
        ...


class StoryMem:
    """The shot loop with memory; with other settings (``memory=none``, ``continuity=none``), its ablations.

    Args:
        name: see `Method`.
        generate: the settings of ``generate.yaml`` that decide what a film looks like, and ``runtime``.
    """

    def __init__(self, *, name: str, generate: Mapping[str, Any]) -> None:
        self.name = name
        self.config = dict(generate)
        self.settings = build_settings(GenerateSettings, {**generate, "story": "."})  # which is not used

    @cached_property
    def teller(self) -> Storyteller:
        """The loop with its models, which load when they are needed."""
        return build_storyteller(self.settings, self.config)

    def check(self, story: Story) -> None:
        """See `Method`."""
        settings = self.settings
        text_to_video = self.uses_text_to_video(story)
        check_weights(
            settings.model,
            text_to_video=text_to_video,
            continuity=settings.continuity,
            sampler=settings.sampler,
        )
        build_generator(settings).check_machine()
        self.teller.check_lengths(story)

    def make(self, story: Story, folder: Path) -> None:
        """See `Method`."""
        self.teller.tell(story, folder, progress=Progress())

    def free(self) -> None:
        """See `Method`."""
        self.__dict__.pop("teller", None)
        gc.collect()

    def uses_text_to_video(self, story: Story) -> bool:
        """Whether the text-to-video model is needed."""
        return uses_text_to_video(story, self.settings)


class IndependentShots(StoryMem):
    """Every shot by text-to-video on its own, as if it were a film's first: the paper's Wan2.2 baseline.

    Noise, sampler and model are those of `StoryMem` with the same settings; memory, continuity and selection play no
    part. (The loop without memory is something else: there all shots but the first are made by the memory model.)
    """

    def make(self, story: Story, folder: Path) -> None:
        """See `Method`."""
        generator, progress = self.teller.generator, Progress()
        told, config = story_record(story), dict(self.teller.config)
        with film_folder(folder) as folder:
            film = Film.open(folder) if Film.exists(folder) else Film(folder, story=told, config=config)
            if changed := differences(film.story, told) + differences(film.config, config):
                shown = "\n".join(f"  {line}" for line in changed[:12])
                raise ValueError(f"{folder} holds a film of another story or with other settings:\n{shown}")
            film.remove_unfinished()
            film.check(progress.say)
            remaining = story.shots[len(film.shots) :]
            check_room(folder, self.teller.needed_bytes(remaining), "the film")
            progress.begin(total=len(story.shots), finished=len(film.shots))
            if remaining:
                generator.prepare([s.prompt for s in remaining], [s.negative_prompt for s in remaining])
            for shot in remaining:
                progress.begin_shot(shot)
                film.add(self._shot(shot, film, progress))
                progress.end_shot(film.shots[-1])
            finish_film(film, progress.say)
            progress.end()

    def uses_text_to_video(self, story: Story) -> bool:
        """Always."""
        return True

    def _shot(self, shot: Shot, film: Film, progress: Progress) -> ShotRecord:
        teller = self.teller
        video = teller.generator.video
        start = time.perf_counter()
        request = ShotRequest(
            prompt=shot.prompt,
            negative_prompt=shot.negative_prompt,
            frames=teller.frames_of(shot),
            seed=teller.seed + shot.index if shot.seed is None else shot.seed,
            memory=[],
            given=np.empty((0, video.height, video.width, 3), dtype=np.uint8),
        )
        frames = teller.generator.first(request, progress.step)
        file = film.write_shot(shot, frames, repeated=0, fps=video.fps)
        return ShotRecord(
            index=shot.index,
            scene=shot.scene,
            number=shot.number,
            prompt=shot.prompt,
            mode="t2v",
            seed=request.seed,
            frames=len(frames),
            repeated=0,
            file=file,
            memory=(),
            keyframes=(),
            config_hash=film.config_hash,
            seconds={"generate": round(time.perf_counter() - start, 4)},
        )
