"""The loop of the method: recall, generate, select, remember, save; shot after shot (paper section 3.1)."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from storymem.film.folder import (
    Film,
    FilmError,
    Say,
    ShotRecord,
    differences,
    estimated_bytes,
    flat,
)
from storymem.film.manifest import KeyframeRecord
from storymem.film.modes import GIVEN_FRAMES, FirstShot, Mode, check_lengths, mode_of, parse_resume
from storymem.film.ownership import film_folder
from storymem.film.progress import Progress
from storymem.film.resume import (
    SIZE,
    Reference,
    Told,
    check_restart,
    encoders,
    references,
    refusal,
    saying_how_to_go_on,
    story_record,
)
from storymem.film.storyboard import write_storyboard
from storymem.io import NotFiniteError, check_finite, check_room
from storymem.media.images import Fit, fit_image, read_image
from storymem.memory import (
    Keyframe,
    KeyframeSelector,
    MemoryBank,
    RecallPolicy,
    SelectionPolicy,
    SinkAndRecent,
    embed_in_batches,
    ids_on_disk,
    reference_id,
)
from storymem.scorers import QualityScorer
from storymem.scorers.scorer import NoQuality, as_images
from storymem.story import Shot, Story
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
        reference_fit: how reference images are brought to the shots' size; see :func:`storymem.media.images.fit_image`.
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
    reference_fit: Fit = "auto"
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
        with film_folder(folder) as folder:
            film, before = self._open(story, folder, resume, progress.say)
            remaining = story.shots[len(film.shots) :]
            check_room(folder, self.needed_bytes(remaining), "the film")
            film.check(progress.say)
            progress.begin(total=len(story.shots), finished=len(film.shots))
            with saying_how_to_go_on(film, resume):
                if remaining:
                    bank = self._restore(story, film, before, progress.say)
                    self._make_all(story, remaining, film, bank, progress)
                finish_film(film, progress.say)
            progress.end()
        return film

    def _make_all(self, story: Story, shots: Sequence[Shot], film: Film, bank: MemoryBank, progress: Progress) -> None:
        """Make ``shots``, the film's last. Until the first of them is finished, the film on disk is what it was."""
        self._given(story, shots[0], film)
        self.generator.prepare([s.prompt for s in shots], [s.negative_prompt for s in shots])
        for shot in shots:
            progress.begin_shot(shot)
            with _naming(shot):
                record = self._make(story, shot, film, bank, progress)
            film.add(record)
            progress.end_shot(record)

    def mode_of(self, shot: Shot, story: Story) -> Mode:
        """How ``shot`` is made; see :func:`storymem.film.modes.mode_of`."""
        return mode_of(shot, story, continuity=self.continuity, first_shot=self.first_shot)

    def frames_of(self, shot: Shot) -> int:
        """F of a shot: its own, or the model's."""
        return shot.frames or self.generator.video.frames

    def needed_bytes(self, shots: Sequence[Shot]) -> int:
        """Upper estimate of the room that ``shots`` need on disk."""
        video = self.generator.video
        return sum(estimated_bytes(self.frames_of(shot), video.height, video.width) for shot in shots)

    def check_lengths(self, story: Story) -> None:
        """Raise ``ValueError`` for shots too short; see :func:`storymem.film.modes.check_lengths`."""
        frames = self.generator.video.frames
        check_lengths(story, frames=frames, continuity=self.continuity, first_shot=self.first_shot)

    def _open(self, story: Story, folder: Path, resume: str, say: Say) -> tuple[Film, Told]:
        """The film in ``folder`` with the shots that are kept, and what it was before; on disk it stays as it is."""
        now = Told(story=story_record(story), config=dict(self.config))
        start = parse_resume(resume, len(story.shots))
        if not Film.exists(folder):
            if start:
                raise FilmError(f"resume={resume}: {folder} holds no film yet; leave resume out to begin one")
            return Film(folder, story=now.story, config=now.config), now
        film = Film.open(folder)
        film.remove_unfinished()
        before = Told(story=film.story, config=film.config)
        if start is not None:
            check_restart(film, story, now, start)
            self._say_what_seed_leaves(film, story, start, say)
            film.forget_from(start)
            kept = zip(film.shots, story.shots, strict=False)
            film.shots = [replace(record, scene=shot.scene, number=shot.number) for record, shot in kept]
        elif film.shots and (differences(before.story, now.story) or differences(before.config, now.config)):
            raise FilmError(refusal(folder, before, now))
        film.story, film.config = now.story, now.config
        return film, before

    def _say_what_seed_leaves(self, film: Film, story: Story, start: int, say: Say) -> None:
        """Shots with seeds of their own do not heed another ``seed``."""
        own = [shot.label for shot in story.shots[start:] if shot.seed is not None]
        if own and film.config.get("seed") != self.config.get("seed"):
            say(f"seed={self.seed} does not change {', '.join(own[:5])}: the story gives them seeds of their own")

    def _restore(self, story: Story, film: Film, before: Told, say: Say) -> MemoryBank:
        """The memory of the shots that are kept, as a person left it, with the story's references.

        References are added, dropped or replaced where the story names others than it did, and fitted anew where the
        shots' size or ``reference_fit`` has changed.
        """
        made_with = encoders(self.config)
        if not film.has_memory:
            if film.shots:
                raise FilmError(
                    f"{film.folder / 'memory.json'} is missing: put it back from a copy, "
                    "or make all shots again with resume=from_shot:1"
                )
            begun = self._changed_references([], [], story, film, refit=False)
            return MemoryBank(begun, policy=self.recall, made_with=made_with)
        saved = MemoryBank.load(
            film.folder, embed=self._embed, fit=self._fit, made_with=made_with, unmarked=encoders(before.config)
        )
        if film.memory_changed:
            say(f"memory: {film.folder / 'memory.json'} was changed since the last shot; it is used as it is now")
        for id, done in saved.by_hand.items():
            say(f"memory: {done}; it is remembered as {id}")
        all_saved = list(saved)
        saved.forget_from(len(film.shots))
        refit = self._refits(before.config)
        kept = self._changed_references(list(saved), references(before.story), story, film, refit=refit)
        bank = MemoryBank(kept, policy=self.recall, made_with=made_with)
        bank.by_hand = {id: done for id, done in saved.by_hand.items() if id in bank}
        film.keep_memory(bank, [k for k in all_saved if k.id not in bank and k.id not in saved.by_hand])
        return bank

    def _refits(self, before: Mapping[str, Any]) -> bool:
        """Whether reference pictures come to another size, or in another way, than before."""
        old, new = flat(before), flat(self.config)
        return any(old.get(key) != new.get(key) for key in (*SIZE, "memory.reference_fit"))

    def _changed_references(
        self, keyframes: list[Keyframe], old: list[Reference], story: Story, film: Film, *, refit: bool
    ) -> list[Keyframe]:
        """``keyframes`` without references that the story no longer names, and with those that it did not name before.

        Those that a person deleted, the ``old`` ones that are not there, stay away.
        """
        new = references(film.story)
        paths = dict(zip(new, story.references, strict=True))
        taken = ids_on_disk(film.folder) | {keyframe.id for keyframe in keyframes}
        changed: list[Keyframe] = []
        placed, end = set(old), 0
        for keyframe in keyframes:
            if keyframe.shot is None and not keyframe.is_by_hand:
                reference = next((r for r in new if r[:2] == (keyframe.character, keyframe.source)), None)
                if reference is None:
                    continue
                if refit or reference not in old:
                    keyframe = self._reference(paths[reference], reference[1], taken, character=reference[0])
                    taken.add(keyframe.id)
                    placed.add(reference)
                end = len(changed) + 1
            changed.append(keyframe)
        added = []
        for reference in new:
            if reference not in placed:
                added.append(self._reference(paths[reference], reference[1], taken, character=reference[0]))
                taken.add(added[-1].id)
        return [*changed[:end], *added, *changed[end:]]

    def _reference(
        self, path: Path, source: str, taken: Container[str], *, character: str | None = None, shot: int | None = None
    ) -> Keyframe:
        """The keyframe of a reference picture."""
        image = self._fit(read_image(path))
        self.embedder.to(self.scorer_device)
        return Keyframe(
            id=reference_id(character or path.stem, taken),
            image=image,
            embedding=embed_in_batches(image[None], self._embed)[0],
            shot=shot,
            source=source,
            character=character,
        )

    def _fit(self, image: np.ndarray) -> np.ndarray:
        video = self.generator.video
        if image.shape[:2] == (video.height, video.width):
            return image
        return fit_image(image, video.height, video.width, self.reference_fit)

    def _given(self, story: Story, shot: Shot, film: Film, say: Say = lambda line: None) -> np.ndarray:
        """The frames that ``shot`` begins with, uint8 [0, 1 or 5, H, W, 3]."""
        video, count = self.generator.video, GIVEN_FRAMES[self.mode_of(shot, story)]
        if not count:
            return np.empty((0, video.height, video.width, 3), dtype=np.uint8)
        return np.stack([self._fit(frame) for frame in film.last_frames(shot.index - 1, count, say)])

    def _recall(self, shot: Shot, mode: Mode, bank: MemoryBank, say: Say) -> list[Keyframe]:
        """What ``shot`` looks back at, with latents. Pictures that a person added for a later shot wait for it."""
        known = [keyframe for keyframe in bank if keyframe.shot is None or keyframe.shot <= shot.index]
        recalled = [] if mode == "t2v" else self.recall.recall(known, shot)
        ids = {keyframe.id for keyframe in recalled}
        if missed := [id for id in bank.by_hand if id not in ids]:
            rule = (
                "it is made from text alone" if mode == "t2v" else f"{self.recall} gives it {len(ids)} of {len(bank)}"
            )
            say(f"memory: {', '.join(missed)}, changed by hand, not recalled for {shot.label}: {rule}")
        bank.by_hand = {}
        return self._with_latents(bank, recalled)

    def _make(self, story: Story, shot: Shot, film: Film, bank: MemoryBank, progress: Progress) -> ShotRecord:
        """One round of the loop; on return the shot's files are on disk and only the manifest is missing."""
        clock = _Clock()
        taken = ids_on_disk(film.folder) | {keyframe.id for keyframe in bank}
        for path, source in zip(shot.references, story.written(shot.references), strict=True):
            bank.remember([self._reference(path, source, taken, shot=shot.index)])
            taken |= {keyframe.id for keyframe in bank}
        mode = self.mode_of(shot, story)
        memory = self._recall(shot, mode, bank, progress.say)
        repeated = GIVEN_FRAMES[mode]
        request = ShotRequest(
            prompt=shot.prompt,
            negative_prompt=shot.negative_prompt,
            frames=self.frames_of(shot),
            seed=self.seed + shot.index if shot.seed is None else shot.seed,
            memory=[keyframe.latent for keyframe in memory if keyframe.latent is not None],
            given=self._given(story, shot, film, progress.say),
        )
        clock.lap("recall")
        frames = (self.generator.first if mode == "t2v" else self.generator.generate)(request, progress.step)
        clock.lap("generate")
        keyframes = self._select(shot, frames[repeated:], bank, taken)
        clock.lap("select")
        bank.remember(keyframes)
        file = film.write_shot(shot, frames, repeated=repeated, fps=self.generator.video.fps, memory=bank)
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
                KeyframeRecord(id=k.id, frame=k.frame, quality=k.quality, similarity=k.similarity, sha256=k.sha256)
                for k in keyframes
            ),
            config_hash=film.config_hash,
            seconds=clock.seconds,
        )

    def _select(self, shot: Shot, frames: np.ndarray, bank: MemoryBank, taken: Container[str]) -> list[Keyframe]:
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
                taken=taken,
            )
            for frame in selection.kept
        ]

    def _embed(self, frames: np.ndarray) -> np.ndarray:
        return self.embedder.embed_images(as_images(frames)).numpy()

    def _with_latents(self, bank: MemoryBank, keyframes: list[Keyframe]) -> list[Keyframe]:
        """``keyframes`` with latents; those that had none are encoded now and put back into the bank."""
        missing = [keyframe for keyframe in keyframes if keyframe.latent is None]
        latents = self.generator.encode_keyframes([keyframe.image for keyframe in missing])
        for keyframe, latent in zip(missing, latents, strict=True):
            bank.update(replace(keyframe, latent=latent))
        found = [bank[keyframe.id] for keyframe in keyframes]
        shapes = {keyframe.id: list(keyframe.latent.shape) for keyframe in found if keyframe.latent is not None}
        for id, shape in shapes.items():
            if shape != (first := next(iter(shapes.values()))):
                raise ValueError(
                    f"the latent of keyframe {id} has shape {shape}, and another of the memory {first}: "
                    f"delete the sha256 of the wrong one's entry in memory.json, and it is made anew"
                )
        return found


def _score_frame(quality: QualityScorer, frames: np.ndarray, frame: int) -> float:
    score = quality.score(as_images(frames[frame : frame + 1]))
    check_finite(score, f"the quality score of frame {frame}", "check the weights of scorer.quality")
    return score.item()


def finish_film(film: Film, say: Say = lambda line: None) -> None:
    """Join the shots of a film that has them all and write its page, if need be; delete earlier takes."""
    for path in film.missing_memory():
        say(f"memory: {path} is missing: the film is whole, and shots cannot be made again from here; put it back")
    if not film.is_joined:
        film.join(say)
    write_storyboard(film, say)
    film.remove_replaced()


@contextmanager
def _naming(shot: Shot) -> Iterator[None]:
    """Say which shot a number that is not finite belongs to."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{shot.label} was not finished: {error}") from None


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 4)
        self._last = now
