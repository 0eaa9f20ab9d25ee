"""The loop of the method: recall, generate, select, remember, save; shot after shot (paper section 3.1)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from storymem.film import (
    Film,
    FilmError,
    KeyframeRecord,
    ShotRecord,
    differences,
    estimated_bytes,
    film_folder,
)
from storymem.images import fit_image, read_image
from storymem.memory import (
    Keyframe,
    KeyframeSelector,
    MemoryBank,
    RecallPolicy,
    SelectionPolicy,
    SinkAndRecent,
    embed_in_batches,
    reference_id,
)
from storymem.modes import GIVEN_FRAMES, FirstShot, Mode, check_lengths, mode_of, parse_resume
from storymem.progress import Progress
from storymem.scorers.quality import NoQuality, QualityScorer
from storymem.story import Shot, Story
from storymem.storyboard import write_storyboard
from storymem.wan.settings import Continuity, VideoSettings
from storymem.wan.shots import OnStep, ShotRequest


class ShotGenerator(Protocol):
    """What makes shots; :class:`storymem.wan.shots.WanShotGenerator` is one."""

    @property
    def video(self) -> VideoSettings: ...

    def prepare(self, prompts: Sequence[str], negative_prompts: Sequence[str | None]) -> None: ...

    def first(self, request: ShotRequest, on_step: OnStep | None = None) -> np.ndarray: ...

    def generate(self, request: ShotRequest, on_step: OnStep | None = None) -> np.ndarray: ...

    def encode_keyframes(self, frames: Sequence[np.ndarray]) -> list[Tensor]: ...


class ImageEmbedder(Protocol):
    """What embeds frames for the memory; :class:`storymem.scorers.clip.ClipScorer` is one."""

    def embed_images(self, frames: Tensor) -> Tensor: ...

    def to(self, device: str | torch.device | None = None) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Storyteller:
    """Turns a story into a film.

    Args:
        generator: makes the shots.
        embedder: embeds frames, to tell what is new.
        quality: scores frames; None or ``NoQuality``: every frame may be remembered.
        selector: which frames of a shot become keyframes.
        recall: which keyframes a shot looks back at.
        continuity: what a shot with ``cut: false`` is given of the shot before: nothing, its last frame (mi2v) or
            its last five (mm2v). Given frames are cut from the shot's video, so that the film does not repeat them.
        first_shot: "t2v" makes the first shot by text-to-video, without memory; "m2v" by memory-to-video, with the
            story's references as memory (MR2V); "auto" is "m2v" if there are references, else "t2v".
        reference_fit: how reference images are brought to the shots' size; see :func:`storymem.images.fit_image`.
        seed: of the film; shot k (from 0) draws its noise from ``seed + k`` unless the story says its own.
        scorer_device: where embedder and quality run; they are moved there for each shot and back after it.
        config: the settings all this was built from, for the manifest: a film is only gone on with if they are
            the same.
    """

    generator: ShotGenerator
    embedder: ImageEmbedder
    quality: QualityScorer | None = None
    selector: SelectionPolicy = field(default_factory=KeyframeSelector)
    recall: RecallPolicy = field(default_factory=SinkAndRecent)
    continuity: Continuity = "mi2v"
    first_shot: FirstShot = "auto"
    reference_fit: Literal["cover", "contain"] = "cover"
    seed: int = 0
    scorer_device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    config: Mapping[str, Any] = field(default_factory=dict)

    def tell(self, story: Story, folder: str | Path, *, resume: str = "auto", progress: Progress | None = None) -> Film:
        """Make the film of ``story`` in ``folder``, or go on with it.

        Args:
            story: what is told.
            folder: the film's folder; made if need be.
            resume: "auto" keeps finished shots and refuses a film of another story or other settings;
                "from_shot:N" makes shots N, N + 1, ... (from 1) again, with this story and these settings.
            progress: is told of shots and steps.

        Raises:
            ValueError: before anything is generated, if a shot is too short or ``resume`` is not understood.
            FilmError: likewise, if the folder cannot be used for this.
        """
        self.check_lengths(story)
        progress = progress or Progress(enabled=False)
        with film_folder(folder, self.needed_bytes(story)) as folder:
            film = self._open(story, folder, resume)
            bank = self._restore(story, film)
            remaining = story.shots[len(film.shots) :]
            progress.begin(total=len(story.shots), finished=len(film.shots))
            if remaining:
                self.generator.prepare([s.prompt for s in remaining], [s.negative_prompt for s in remaining])
            for shot in remaining:
                progress.begin_shot(shot)
                film.add(self._make(story, shot, film, bank, progress))
                progress.end_shot(film.shots[-1])
            if film.video is None:
                film.join()
                write_storyboard(film)
            progress.end()
        return film

    def mode_of(self, shot: Shot, story: Story) -> Mode:
        """How ``shot`` is made; see :func:`storymem.modes.mode_of`."""
        return mode_of(shot, story, continuity=self.continuity, first_shot=self.first_shot)

    def frames_of(self, shot: Shot) -> int:
        """F of a shot: its own, or the model's."""
        return shot.frames or self.generator.video.frames

    def needed_bytes(self, story: Story) -> int:
        """Upper estimate of the room that the film needs on disk."""
        video = self.generator.video
        return sum(estimated_bytes(self.frames_of(shot), video.height, video.width) for shot in story.shots)

    def check_lengths(self, story: Story) -> None:
        """Raise ``ValueError`` for shots too short; see :func:`storymem.modes.check_lengths`."""
        frames = self.generator.video.frames
        check_lengths(story, frames=frames, continuity=self.continuity, first_shot=self.first_shot)

    def _open(self, story: Story, folder: Path, resume: str) -> Film:
        """The film in ``folder``, brought to the state from which it goes on."""
        told, config = story_record(story), dict(self.config)
        start = parse_resume(resume, len(story.shots))
        if not Film.exists(folder):
            if start:
                raise FilmError(f"resume={resume}: {folder} holds no film yet; leave resume out to begin one")
            film = Film(folder, story=told, config=config)
            film.save()
            film.remove_unfinished()
            return film
        film = Film.open(folder)
        changed = differences(film.story, told) + differences(film.config, config)
        if start is None:
            if changed:
                raise FilmError(_refusal(folder, changed))
            film.remove_unfinished()
            return film
        self._check_restart(film, story, told, start)
        film.forget_from(start)
        film.story, film.config = told, config
        film.save()
        return film

    def _check_restart(self, film: Film, story: Story, told: Mapping[str, Any], start: int) -> None:
        if start > len(film.shots):
            raise FilmError(
                f"resume=from_shot:{start + 1}: only {len(film.shots)} shots of {film.folder} are finished; "
                f"write from_shot:{len(film.shots) + 1} or less, or leave resume out to go on"
            )
        for number, (old, new) in enumerate(zip(_shots(film.story), _shots(told), strict=False)):
            if number < start and old != new:
                lines = "\n".join(f"  {line}" for line in differences(old, new))
                raise FilmError(
                    f"{story.shots[number].label} has changed too, before the shot you start from; "
                    f"use resume=from_shot:{number + 1}\n{lines}"
                )
        sizes = [config.get("model", {}).get("video") for config in (film.config, self.config)]
        if start > 0 and sizes[0] != sizes[1]:
            raise FilmError("size, length or rate of the shots have changed: use resume=from_shot:1 or another output")

    def _restore(self, story: Story, film: Film) -> MemoryBank:
        """The memory as it was when the last finished shot was saved; for a new film, the story's references."""
        kept: list[Keyframe] = []
        if film.shots:
            saved = MemoryBank.load(film.folder, embed=self._embed)
            saved.forget_from(len(film.shots))
            if {k.source for k in saved if k.shot is None and k.source} == set(story.written(story.references)):
                return MemoryBank(saved, policy=self.recall)
            kept = [keyframe for keyframe in saved if keyframe.shot is not None]
        bank = MemoryBank(policy=self.recall)
        for character in story.characters:
            self._remember_references(bank, story, character.references, character=character.name)
        bank.remember(kept)
        return bank

    def _make(self, story: Story, shot: Shot, film: Film, bank: MemoryBank, progress: Progress) -> ShotRecord:
        """One round of the loop; on return the shot's files are on disk and only the manifest is missing."""
        clock = _Clock()
        self._remember_references(bank, story, shot.references, shot=shot.index)
        mode = self.mode_of(shot, story)
        memory = [] if mode == "t2v" else self._with_latents(bank, bank.recall(shot))
        repeated = GIVEN_FRAMES[mode]
        request = ShotRequest(
            prompt=shot.prompt,
            negative_prompt=shot.negative_prompt,
            frames=self.frames_of(shot),
            seed=self.seed + shot.index if shot.seed is None else shot.seed,
            memory=[keyframe.latent for keyframe in memory if keyframe.latent is not None],
            given=film.last_frames(shot.index - 1, repeated) if repeated else _no_frames(self.generator.video),
        )
        clock.lap("recall")
        frames = (self.generator.first if mode == "t2v" else self.generator.generate)(request, progress.step)
        clock.lap("generate")
        keyframes = self._select(shot, frames[repeated:], bank)
        clock.lap("select")
        file = film.write_shot(shot, frames, repeated=repeated, fps=self.generator.video.fps)
        bank.remember(keyframes)
        bank.save(film.folder)
        clock.lap("save")
        return ShotRecord(
            index=shot.index,
            scene=shot.scene,
            number=shot.number,
            prompt=shot.prompt,
            mode=mode,
            seed=request.seed,
            frames=len(frames) - repeated,
            repeated=repeated,
            file=file,
            memory=tuple(keyframe.id for keyframe in memory),
            keyframes=tuple(
                KeyframeRecord(id=k.id, frame=k.frame, quality=k.quality, similarity=k.similarity) for k in keyframes
            ),
            config_hash=film.config_hash,
            seconds=clock.seconds,
        )

    def _select(self, shot: Shot, frames: np.ndarray, bank: MemoryBank) -> list[Keyframe]:
        """The keyframes of a shot's new frames, each frame embedded once and scored only if it must be."""
        quality = None if isinstance(self.quality, NoQuality) else self.quality
        self.embedder.to(self.scorer_device)
        embeddings = embed_in_batches(frames, self._embed)
        score = None
        if quality is not None:
            quality.to(self.scorer_device)
            score = partial(_score_frame, quality, frames)
        selection = self.selector.select(
            embeddings,
            bank=bank.embeddings,
            quality=score,
            quality_threshold=None if quality is None else quality.threshold,
        )
        if self.scorer_device.type != "cpu":
            self.embedder.to("cpu")
            if quality is not None:
                quality.to("cpu")
        return [
            Keyframe.of_shot(
                shot.index,
                frame,
                image=frames[frame],
                embedding=embeddings[frame],
                quality=selection.quality.get(frame),
                similarity=selection.similarity[frame],
                character=shot.characters[0] if len(shot.characters) == 1 else None,
            )
            for frame in selection.kept
        ]

    def _embed(self, frames: np.ndarray) -> np.ndarray:
        return self.embedder.embed_images(as_tensor(frames)).numpy()

    def _with_latents(self, bank: MemoryBank, keyframes: list[Keyframe]) -> list[Keyframe]:
        """``keyframes`` with latents; those that had none are encoded now and put back into the bank."""
        missing = [keyframe for keyframe in keyframes if keyframe.latent is None]
        latents = self.generator.encode_keyframes([keyframe.image for keyframe in missing])
        for keyframe, latent in zip(missing, latents, strict=True):
            bank.update(replace(keyframe, latent=latent))
        return [bank[keyframe.id] for keyframe in keyframes]

    def _remember_references(
        self,
        bank: MemoryBank,
        story: Story,
        paths: Sequence[Path],
        *,
        character: str | None = None,
        shot: int | None = None,
    ) -> None:
        video = self.generator.video
        for path, source in zip(paths, story.written(paths), strict=True):
            image = fit_image(read_image(path), video.height, video.width, self.reference_fit)
            self.embedder.to(self.scorer_device)
            keyframe = Keyframe(
                id=reference_id(character or path.stem, bank),
                image=image,
                embedding=embed_in_batches(image[None], self._embed)[0],
                shot=shot,
                source=source,
                character=character,
            )
            bank.remember([keyframe])


def as_tensor(frames: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] as scorers take it: float32 [N, 3, H, W] in 0..1."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


def _score_frame(quality: QualityScorer, frames: np.ndarray, frame: int) -> float:
    return quality.score(as_tensor(frames[frame : frame + 1])).item()


def story_record(story: Story) -> dict[str, Any]:
    """What the manifest keeps of a story: all that it says, and which pixels its reference images hold."""
    paths = [*story.references, *(path for shot in story.shots for path in shot.references)]
    digests = {
        source: hashlib.sha256(read_image(path).tobytes()).hexdigest()
        for path, source in zip(paths, story.written(paths), strict=True)
    }
    return story.to_dict() | {"reference_sha256": digests}


def _shots(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [shot for scene in told["scenes"] for shot in scene["shots"]]


def _refusal(folder: Path, changed: list[str]) -> str:
    shown = "\n".join(f"  {line}" for line in changed[:12])
    more = f"\n  and {len(changed) - 12} more" if len(changed) > 12 else ""
    return (
        f"{folder} holds a film of another story or with other settings:\n{shown}{more}\n"
        "choose another output, or make shots N and later again with resume=from_shot:N"
    )


def _no_frames(video: VideoSettings) -> np.ndarray:
    return np.empty((0, video.height, video.width, 3), dtype=np.uint8)


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 4)
        self._last = now
