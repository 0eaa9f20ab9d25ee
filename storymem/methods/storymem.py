"""StoryMem (arXiv 2512.19539): the shot loop with memory. Its ablations are the same method under other settings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from storymem.config import build_settings
from storymem.film.folder import Film
from storymem.film.generate import build_generator, build_storyteller
from storymem.film.progress import Progress
from storymem.film.resume import match_film, story_record
from storymem.film.settings import GenerateSettings, Work, check_lengths, uses_text_to_video
from storymem.film.storyteller import Storyteller
from storymem.methods import check_all
from storymem.scorers import scorer_weights
from storymem.story import Story
from storymem.wan.sources import check_weights
from storymem.weights import locate


class StoryMem:
    """See :class:`storymem.methods.Method`.

    Args:
        generate: the settings of ``generate.yaml`` that decide what a film looks like, and ``runtime``.
    """

    loop: type[Storyteller] = Storyteller  # which makes the shots

    def __init__(self, *, generate: Mapping[str, Any]) -> None:
        self.config = dict(generate)
        self.settings = build_settings(GenerateSettings, {**generate, "story": "."})  # the story is given to `run`

    @cached_property
    def storyteller(self) -> Storyteller:
        """The shot loop; its models are loaded on first use."""
        plain = vars(build_storyteller(self.settings, self.config))
        return self.loop(**{**plain, **self.parts(plain)})

    def parts(self, plain: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of :attr:`loop` besides those of the ``plain`` one, or in their place."""
        return {}

    def uses_text_to_video(self, story: Story) -> bool:
        """Whether the film of ``story`` needs the text-to-video model."""
        return uses_text_to_video(story, self.settings)

    def check(self, story: Story) -> None:
        """See :meth:`storymem.methods.Method.check`."""
        settings, continuity = self.settings, self.settings.continuity
        check_all(
            lambda: check_weights(
                settings.model,
                text_to_video=self.uses_text_to_video(story),
                continuity=continuity,
                sampler=settings.sampler,
            ),
            *(partial(locate, weights) for weights in scorer_weights(vars(settings.scorer))),
            lambda: build_generator(settings).check_machine(),
            lambda: check_lengths(
                story, frames=settings.model.video.frames, continuity=continuity, first_shot=settings.first_shot
            ),
        )
        _ = self.storyteller  # ValueError for parts that cannot be built

    def check_film(self, story: Story, folder: Path) -> None:
        """See :meth:`storymem.methods.ChecksFilms.check_film`."""
        if Film.exists(folder):
            match_film(Film.open(folder), story_record(story), self.storyteller.config, Work())

    def run(self, story: Story, folder: Path) -> None:
        """See :meth:`storymem.methods.Method.run`."""
        self.storyteller.tell(story, folder, progress=Progress())
