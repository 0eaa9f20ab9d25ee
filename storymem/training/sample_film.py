"""A film of a fixed story, generated while training: progress in images, and in one number."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from storymem.film.folder import Film
from storymem.film.generate import build_storyteller
from storymem.film.progress import Progress
from storymem.film.settings import GenerateSettings, build_policy
from storymem.film.storyteller import Storyteller
from storymem.media.images import write_image
from storymem.media.video import probe, read_video
from storymem.scorers import check_scorers, scorer_weights
from storymem.scorers.scorer import as_images
from storymem.story import Story, load_story
from storymem.training.experts import Experts
from storymem.training.resume import SAMPLES
from storymem.training.run_settings import CONTINUITY, SampleSettings
from storymem.training.settings import TrainSettings
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.settings import RuntimeSettings
from storymem.wan.shots import WanShotGenerator
from storymem.wan.spec import COMPONENTS
from storymem.weights import locate

if TYPE_CHECKING:
    from storymem.training.run_log import RunLog
    from storymem.training.trainer import StepReport, Trainer


FRAMES = 4  # of each shot on the contact sheet


class TrainedShots(WanShotGenerator):
    """Generates shots with the experts that are being trained, where they are."""

    experts: Experts

    def _load(self, **parts: bool) -> WanMemoryToVideoPipeline:
        pipe = super()._load(**{**parts, "experts": False})
        if parts.get("experts", True):
            pipe.register_modules(**{COMPONENTS[name]: each for name, each in self.experts.transformers.items()})
        return pipe

    def release(self) -> None:
        """Drop the pipeline, and with it the VAE; encoded texts stay."""
        self._pipe = None


@dataclass(frozen=True, kw_only=True)
class SampleFilm:
    """Callback that generates a film every so many steps and after the last.

    All processes generate it, since sharded experts only run together; the main process, which has a ``log``, writes
    it to ``samples/step_00000500`` in the run's folder, with a contact sheet ``step_00000500.png`` beside it.
    """

    story: Story
    storyteller: Storyteller
    generator: TrainedShots  # of the storyteller; its experts must be set before the first film
    folder: Path
    settings: SampleSettings
    log: RunLog | None

    @classmethod
    def build(
        cls, settings: TrainSettings, config: Mapping[str, Any], log: RunLog | None, *, device: torch.device
    ) -> SampleFilm:
        """With the story's texts encoded, so that the text encoder is never loaded together with the experts."""
        generate = generate_settings(settings, str(device))
        generator = TrainedShots(
            model=generate.model,
            sampler=generate.sampler,
            runtime=generate.runtime,
            continuity=generate.continuity,
        )
        story = load_story(settings.samples.story or "")
        generator.prepare([story.prompt_of(s) for s in story.shots], [s.negative_prompt for s in story.shots])
        return cls(
            story=story,
            storyteller=replace(build_storyteller(generate, config), generator=generator),
            generator=generator,
            folder=Path(settings.output) / SAMPLES,
            settings=settings.samples,
            log=log,
        )

    def __call__(self, trainer: Trainer, report: StepReport) -> None:
        if report.step % self.settings.every and report.step != trainer.steps:
            return
        name = f"step_{report.step:08d}"
        with tempfile.TemporaryDirectory() as elsewhere, trainer.averaged(), _on_demand(self.generator.experts):
            folder = (self.folder if self.log else Path(elsewhere)) / name
            # A run that was killed before its checkpoint, or had other settings, may have left a film.
            resume = "from_shot:1" if Film.exists(folder) else "auto"
            film = self.storyteller.tell(self.story, folder, resume=resume, progress=_Stoppable(trainer))
            if self.log is not None:
                frames = _evenly(film, FRAMES)
                sheet = self.folder / f"{name}.png"
                write_image(sheet, np.concatenate([np.concatenate(list(shot), axis=1) for shot in frames]))
                embedder = self.storyteller.embedder
                score = cross_shot_score([embedder.embed_images(as_images(shot)) for shot in frames])
                self.log.row(report.step, {"cross_shot": score})
                self.log.image(report.step, "samples", sheet)
        self.generator.release()


def generate_settings(settings: TrainSettings, device: str) -> GenerateSettings:
    """The settings of the sample film. ``ValueError`` for those that do not go together."""
    samples = settings.samples
    assert samples.story is not None
    return GenerateSettings(
        story=samples.story,
        model=replace(settings.model, adapter=None),
        sampler=settings.sampler,
        memory=settings.memory,
        scorer=settings.scorer,
        runtime=RuntimeSettings(device=device),
        continuity=CONTINUITY[settings.conditioning],
        first_shot="m2v",
        seed=samples.seed,
    )


def check_sample_film(settings: TrainSettings) -> None:
    """Raise ``ValueError`` or ``MissingWeights`` if the sample film cannot be made with these settings."""
    memory = generate_settings(settings, settings.runtime.device).memory
    build_policy(memory.recall, "memory.recall", ("capacity", "recall"))
    build_policy(memory.selector, "memory.selector", ("max_keyframes", "select"))
    check_scorers(vars(settings.scorer))
    for weights in scorer_weights(vars(settings.scorer)):
        locate(weights)


class _Stoppable(Progress):
    """Prints nothing, and lets a signal stop the run between two denoising steps."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(enabled=False)
        self._trainer = trainer

    def step(self, step: int, total: int) -> None:
        self._trainer.check_stop()


def cross_shot_score(embeddings: list[torch.Tensor]) -> float | None:
    """Mean cosine over all pairs of shots, each the mean of its frames' embeddings [frames, D]; None for one shot."""
    if len(embeddings) < 2:
        return None
    shots = F.normalize(torch.stack([frames.mean(dim=0) for frames in embeddings]))
    first, second = torch.triu_indices(len(shots), len(shots), offset=1)
    return (shots @ shots.T)[first, second].mean().item()


def _evenly(film: Film, count: int) -> list[np.ndarray]:
    """``count`` frames of each shot, the first and the last among them; a frame may be repeated."""
    shots = []
    for shot in film.shots:
        path = film.folder / shot.file
        indices = np.linspace(0, probe(path).frames - 1, count).round().astype(int).tolist()
        shots.append(np.stack([read_video(path, [index])[0] for index in indices]))
    return shots


@contextmanager
def _on_demand(experts: Experts) -> Iterator[None]:
    """Inside the block each expert moves to the accelerator when it is called, and runs without dropout."""
    with ExitStack() as hooks:
        for name, transformer in experts.transformers.items():
            transformer.eval()
            hooks.enter_context(transformer.register_forward_pre_hook(lambda *_, name=name: experts.activate(name)))
        yield
