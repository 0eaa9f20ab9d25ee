"""A fixed story told while its adapter is trained: how far the adapter is, in pictures and in one number."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from storymem.film.folder import Film
from storymem.film.generate import build_storyteller
from storymem.film.progress import Progress
from storymem.film.settings import GenerateSettings
from storymem.film.storyteller import Storyteller
from storymem.media.images import write_image
from storymem.media.video import probe, read_video
from storymem.scorers.scorer import as_images
from storymem.story import Story, load_story
from storymem.training.experts import Experts
from storymem.training.objective import ExpertName
from storymem.training.run_settings import CONTINUITY, TrainSettings
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.schedule import wan_scheduler
from storymem.wan.settings import RuntimeSettings
from storymem.wan.shots import WanShotGenerator
from storymem.wan.spec import COMPONENTS

if TYPE_CHECKING:
    from storymem.training.run_log import RunLog
    from storymem.training.trainer import StepReport, Trainer


class TrainedShots(WanShotGenerator):
    """Makes shots with the experts that are being trained, where they lie."""

    experts: Experts

    def _load(self, *, text_encoder: bool, experts: bool) -> WanMemoryToVideoPipeline:
        pipe = super()._load(text_encoder=text_encoder, experts=False)
        if not experts:
            return pipe
        transformers = {COMPONENTS[name]: t for name, t in self.experts.transformers.items()}
        return WanMemoryToVideoPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=pipe.vae,
            scheduler=wan_scheduler(self.sampler.shift, self.sampler.scheduler),
            boundary_ratio=self.model.boundary,
            rope_stride=self.model.rope_stride,
            memory_attention=self.model.memory_attention,
            **transformers,
        )

    def release(self) -> None:
        """Forget the pipeline, and with it the VAE; encoded texts stay."""
        self._pipe = None


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Callback that tells a story every so many steps and after the last.

    All processes tell it, since sharded experts only run together; the main process's film is kept, in
    ``samples/step_00000500`` of the run's folder, with a contact sheet ``step_00000500.png`` beside it.

    Args:
        story: always the same.
        teller: its generator is a :class:`TrainedShots`.
        folder: of the run.
        every: steps between films.
        frames_per_shot: of the contact sheet.
        log: of the main process.
    """

    story: Story
    teller: Storyteller
    folder: Path
    every: int
    frames_per_shot: int
    log: RunLog | None

    @classmethod
    def build(
        cls,
        settings: TrainSettings,
        config: Mapping[str, Any],
        log: RunLog | None,
        *,
        device: torch.device,
    ) -> Rehearsal:
        """With the story's texts encoded already, so that the text encoder need never lie beside the experts."""
        samples = settings.samples
        assert samples.story is not None
        generate = GenerateSettings(
            story=samples.story,
            model=replace(settings.model, adapter=None),
            sampler=settings.sampler,
            memory=settings.memory,
            scorer=settings.scorer,
            runtime=RuntimeSettings(device=str(device)),
            continuity=CONTINUITY[settings.conditioning],
            first_shot="m2v",
            seed=samples.seed,
        )
        generator = TrainedShots(
            model=generate.model,
            sampler=generate.sampler,
            runtime=generate.runtime,
            continuity=generate.continuity,
        )
        teller = replace(build_storyteller(generate, config), generator=generator)
        story = load_story(samples.story)
        generator.prepare([s.prompt for s in story.shots], [s.negative_prompt for s in story.shots])
        return cls(
            story=story,
            teller=teller,
            folder=Path(settings.output) / "samples",
            every=samples.every,
            frames_per_shot=samples.frames_per_shot,
            log=log,
        )

    def use(self, experts: Experts) -> None:
        """Tell which experts make the shots."""
        assert isinstance(self.teller.generator, TrainedShots)
        self.teller.generator.experts = experts

    def __call__(self, trainer: Trainer, report: StepReport) -> None:
        if report.step % self.every and report.step != trainer.steps:
            return
        assert isinstance(self.teller.generator, TrainedShots)
        experts = self.teller.generator.experts
        name = f"step_{report.step:08d}"
        with tempfile.TemporaryDirectory() as elsewhere, trainer.averaged(), _on_demand(experts):
            folder = (self.folder if self.log else Path(elsewhere)) / name
            # A film may be there of a run that was killed before its checkpoint, or of other settings.
            resume = "from_shot:1" if Film.exists(folder) else "auto"
            film = self.teller.tell(self.story, folder, resume=resume, progress=_Stoppable(trainer))
            if self.log is not None:
                sheet = self.folder / f"{name}.png"
                write_image(sheet, contact_sheet(film, self.frames_per_shot))
                self.log.row(report.step, {"cross_shot": self._cross_shot(film)})
                self.log.picture(report.step, "samples", sheet)
        self.teller.generator.release()

    def _cross_shot(self, film: Film) -> float | None:
        return cross_shot_score(
            [self.teller.embedder.embed_images(as_images(frames)) for frames in _evenly(film, self.frames_per_shot)]
        )


class _Stoppable(Progress):
    """Says nothing, and lets a signal stop the run between two denoising steps."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(enabled=False)
        self._trainer = trainer

    def step(self, step: int, total: int) -> None:
        self._trainer.check_stop()


def cross_shot_score(embeddings: list[torch.Tensor]) -> float | None:
    """Mean cosine over all pairs of shots, each shot the mean of its frames' CLIP embeddings; None for one shot.

    Args:
        embeddings: of each shot, [frames, D], of unit length.
    """
    if len(embeddings) < 2:
        return None
    shots = torch.stack([F.normalize(frames.mean(dim=0), dim=0) for frames in embeddings])
    cosines = shots @ shots.T
    above = torch.triu_indices(len(shots), len(shots), offset=1)
    return cosines[above[0], above[1]].mean().item()


def contact_sheet(film: Film, frames_per_shot: int) -> np.ndarray:
    """A row per shot with frames spread evenly over it: uint8 [shots * H, frames_per_shot * W, 3]."""
    return np.concatenate([np.concatenate(list(frames), axis=1) for frames in _evenly(film, frames_per_shot)])


def _evenly(film: Film, count: int) -> list[np.ndarray]:
    """``count`` frames of each shot, the first and the last among them; a frame may come twice."""
    shots = []
    for shot in film.shots:
        path = film.folder / shot.file
        indices = np.linspace(0, probe(path).frames - 1, count).round().astype(int).tolist()
        shots.append(np.stack([read_video(path, [index])[0] for index in indices]))
    return shots


@contextmanager
def _on_demand(experts: Experts) -> Iterator[None]:
    """Inside the block each expert comes to the accelerator when it is called, and computes without dropout."""

    def bringing(name: ExpertName) -> Callable[..., None]:
        return lambda *_: experts.activate(name)

    handles = []
    for name, transformer in experts.transformers.items():
        transformer.eval()
        handles.append(transformer.register_forward_pre_hook(bringing(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
