"""The loop of the method: recall keyframes, generate, select keyframes, save; shot after shot (paper section 3.1)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from storymem.film.folder import Film, FilmError, ShotRecord, estimated_bytes
from storymem.film.manifest import KeyframeRecord, film_folder
from storymem.film.progress import Progress
from storymem.film.resume import (
    Recipe,
    check_restart,
    check_same,
    encoders,
    flat,
    naming_next_command,
    references,
    setting_changes,
    story_record,
)
from storymem.film.settings import GIVEN_FRAMES, FirstShot, Mode, check_lengths, mode_of, parse_resume
from storymem.film.storyboard import storyboard
from storymem.io import NotFiniteError, check_finite, check_room
from storymem.media.images import Fit, fit_image, read_image
from storymem.memory import (
    ComingShot,
    Keyframe,
    KeyframeSelector,
    MemoryBank,
    RecallPolicy,
    SelectionPolicy,
    SinkAndRecent,
    embed_in_batches,
    frame_id,
    ids_on_disk,
    reference_id,
)
from storymem.scorers import QualityScorer
from storymem.scorers.scorer import NoQuality, as_images
from storymem.story import Shot, Story
from storymem.wan.settings import Continuity, VideoSettings
from storymem.wan.shots import OnStep, ShotRequest

logger = logging.getLogger(__name__)


class ShotGenerator(Protocol):
    """Generates shots; see :class:`storymem.wan.shots.WanShotGenerator`."""

    @property
    def video(self) -> VideoSettings: ...

    def prepare(self, prompts: Sequence[str], negative_prompts: Sequence[str | None]) -> None: ...

    def first(self, request: ShotRequest, on_step: OnStep | None = None) -> np.ndarray: ...

    def generate(self, request: ShotRequest, on_step: OnStep | None = None) -> np.ndarray: ...

    def encode_keyframes(self, frames: Sequence[np.ndarray]) -> list[Tensor]: ...


class Embedder(Protocol):
    """Embeds frames and texts; see :class:`storymem.scorers.clip.ClipScorer`."""

    def embed_images(self, frames: Tensor) -> Tensor: ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor: ...

    def to(self, device: str | torch.device | None = None) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Storyteller:
    """Generates the film of a story.

    :func:`storymem.film.generate.build_storyteller` makes one from settings; with parts of your own::

        storyteller = Storyteller(
            generator=WanShotGenerator(model=model, sampler=sampler, runtime=RuntimeSettings(), continuity="mi2v"),
            embedder=ClipScorer.from_folder("clip"),
            recall=SinkAndRecent(capacity=6, sink=2),
        )
        film = storyteller.tell(load_story("story.yaml"), "films/mine")

    Args:
        generator: generates the shots.
        embedder: embeds frames for the comparison of keyframes, and texts where a recall policy asks for them.
        quality: scores frames; None or ``NoQuality``: every frame may become a keyframe.
        selector: which frames of a shot become keyframes.
        recall: which keyframes a shot is given.
        continuity: what a shot with ``cut: false`` is given of the previous shot: nothing, its last frame (mi2v) or
            its last five (mm2v). Given frames are cut from the shot's video, so that the film does not repeat them.
        first_shot: see :func:`storymem.film.settings.mode_of`.
        reference_fit: how reference images are resized; see :func:`storymem.media.images.fit_image`.
        seed: of the first shot; each later shot uses the next number, unless the story gives it a seed of its own.
        scorer_device: where embedder and quality run; they are on the CPU in between.
        config: the settings all this was built from, for the manifest. A film is resumed only with equal ones.
    """

    generator: ShotGenerator
    embedder: Embedder
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
        """Generate the film of ``story`` in ``folder``, or resume it.

        Args:
            story: see :func:`storymem.story.load_story`.
            folder: the film's folder, created if need be.
            resume: "auto" keeps finished shots, and refuses a film of another story or with other settings;
                "from_shot:N" regenerates shots N, N + 1, ... (from 1) with this story and these settings.
            progress: shows shots and steps.

        Raises:
            ValueError: before anything is generated, if a shot is too short or ``resume`` is not understood.
            FilmError: likewise, if the folder cannot be used for this.
        """
        self.check_lengths(story)
        progress = progress or Progress(enabled=False)
        with film_folder(folder) as folder:
            film, before = self._open(story, folder, resume)
            remaining = story.shots[len(film.shots) :]
            check_room(folder, self.needed_bytes(remaining), "the film")
            film.check()
            finished = len(film.shots)
            with progress.film(total=len(story.shots), finished=finished), naming_next_command(film, resume):
                if remaining:
                    self._generate(story, remaining, film, self._restore(story, film, before), progress)
                film.finish(storyboard(film))
        return film

    def mode_of(self, shot: Shot, story: Story) -> Mode:
        """How ``shot`` is made; see :func:`storymem.film.settings.mode_of`."""
        return mode_of(shot, story, continuity=self.continuity, first_shot=self.first_shot)

    def frames_of(self, shot: Shot) -> int:
        """F of a shot: its own, or the model's."""
        return shot.frames or self.generator.video.frames

    def needed_bytes(self, shots: Sequence[Shot]) -> int:
        """Upper estimate of the disk space that ``shots`` need."""
        video = self.generator.video
        return sum(estimated_bytes(self.frames_of(shot), video.height, video.width) for shot in shots)

    def check_lengths(self, story: Story) -> None:
        """Raise ``ValueError`` for shots too short; see :func:`storymem.film.settings.check_lengths`."""
        frames = self.generator.video.frames
        check_lengths(story, frames=frames, continuity=self.continuity, first_shot=self.first_shot)

    # Resuming

    def _open(self, story: Story, folder: Path, resume: str) -> tuple[Film, Recipe]:
        """The film in ``folder`` with the shots that are kept, and what it was made from; on disk it stays as it is."""
        now = Recipe(story=story_record(story), config=dict(self.config))
        start = parse_resume(resume, len(story.shots))
        if not Film.exists(folder):
            if start:
                raise FilmError(f"resume={resume}: {folder} holds no film yet; leave resume out")
            return Film(folder, story=now.story, config=now.config), now
        film = Film.open(folder)
        film.remove_unfinished()
        before = Recipe(story=film.story, config=film.config)
        if start is not None:
            check_restart(film, story, now, start)
            own = [shot.label for shot in story.shots[start:] if shot.seed is not None]
            if own and film.config.get("seed") != self.config.get("seed"):
                logger.warning(f"seed={self.seed} does not change {', '.join(own[:5])}: the story gives their seeds")
            film.drop_from(start)
        elif film.shots:
            check_same(film, now)
        kept = zip(film.shots, story.shots, strict=False)
        film.shots = [replace(record, scene=shot.scene, number=shot.number) for record, shot in kept]
        same = not setting_changes(before.config, now.config)
        film.story, film.config = now.story, before.config if same else now.config
        return film, before

    def _restore(self, story: Story, film: Film, before: Recipe) -> MemoryBank:
        """The memory of the shots that are kept, as the user left it, with the references that the story names now."""
        made_with = encoders(film.config)
        if not film.has_memory:
            if film.shots:
                raise FilmError(
                    f"{film.folder / 'memory.json'} is missing: put it back from a copy, "
                    "or regenerate all shots with resume=from_shot:1"
                )
            return MemoryBank(self._references(story, film, [], None), policy=self.recall, made_with=made_with)
        saved = MemoryBank.load(film.folder, embed=self._embed, fit=self._fit, made_with=made_with)
        if film.memory_changed:
            logger.warning(
                f"memory: {film.folder / 'memory.json'} was changed since the last shot; it is used as it is"
            )
        for id, done in saved.edited.items():
            logger.warning(f"memory: {done}; it becomes keyframe {id}")
        all_saved = list(saved)
        saved.remove_from(len(film.shots) + 1)
        bank = MemoryBank(self._references(story, film, list(saved), before), policy=self.recall, made_with=made_with)
        bank.edited = {id: done for id, done in saved.edited.items() if id in bank}
        film.keep_memory(bank, [k for k in all_saved if k.id not in bank and k.id not in saved.edited])
        return bank

    def _references(self, story: Story, film: Film, keyframes: list[Keyframe], before: Recipe | None) -> list[Keyframe]:
        """``keyframes`` with the references of the story's characters.

        Those that the story no longer names leave; those whose image, size or fit has changed are read again; new ones
        follow the last. Those that the user deleted from the memory stay away.
        """
        old = set() if before is None else set(references(before.story))
        size, old_size = (
            [flat(config).get(key) for key in ("model.video.height", "model.video.width", "memory.reference_fit")]
            for config in (self.config, {} if before is None else before.config)
        )
        paths = dict(zip(references(film.story), story.references, strict=True))
        unread = [reference for reference in paths if reference not in old]
        taken = ids_on_disk(film.folder) | {keyframe.id for keyframe in keyframes}
        found: list[Keyframe] = []
        end = 0
        for keyframe in keyframes:
            if keyframe.shot is None and not keyframe.is_users:
                of = (keyframe.character, keyframe.source)
                reference = next((one for one in paths if (one.character, one.source) == of), None)
                if reference is None:
                    continue
                if size != old_size or reference in unread:
                    keyframe = self._reference(paths[reference], reference.source, taken, keyframe.character)
                    unread = [one for one in unread if one != reference]
                end = len(found) + 1
            found.append(keyframe)
        found[end:end] = [self._reference(paths[one], one.source, taken, one.character) for one in unread]
        return found

    def _reference(
        self, path: Path, source: str, taken: set[str], character: str | None = None, shot: int | None = None
    ) -> Keyframe:
        """The keyframe of a reference image; its id is added to ``taken``."""
        image = self._fit(read_image(path))
        id = reference_id(character or path.stem, taken)
        taken.add(id)
        embedding = self._embed(image[None])[0]
        return Keyframe(id=id, image=image, embedding=embedding, shot=shot, source=source, character=character)

    def _fit(self, image: np.ndarray) -> np.ndarray:
        video = self.generator.video
        if image.shape[:2] == (video.height, video.width):
            return image
        return fit_image(image, video.height, video.width, self.reference_fit)

    # One shot

    def _generate(self, story: Story, shots: Sequence[Shot], film: Film, bank: MemoryBank, progress: Progress) -> None:
        """Generate ``shots``, the last of the film. Until the first is finished, the film on disk does not change."""
        self._given(story, shots[0], film)
        self.generator.prepare([story.prompt_of(s) for s in shots], [s.negative_prompt for s in shots])
        for shot in shots:
            progress.begin_shot(shot)
            try:
                record = self._shot(story, shot, film, bank, progress)
            except NotFiniteError as error:
                raise NotFiniteError(f"{shot.label} was not finished: {error}") from None
            film.add(record)
            progress.end_shot(record)

    def _shot(self, story: Story, shot: Shot, film: Film, bank: MemoryBank, progress: Progress) -> ShotRecord:
        """One round of the loop; on return the shot's files are on disk and only the manifest is missing."""
        clock = _Clock()
        taken = ids_on_disk(film.folder) | {keyframe.id for keyframe in bank}
        for path, source in zip(shot.references, story.written(shot.references), strict=True):
            bank.add([self._reference(path, source, taken, shot=shot.index + 1)])
        mode = self.mode_of(shot, story)
        repeated = GIVEN_FRAMES[mode]
        memory = self._recall(story, shot, mode, bank)
        request = ShotRequest(
            prompt=story.prompt_of(shot),
            negative_prompt=shot.negative_prompt,
            frames=self.frames_of(shot),
            seed=self.seed + shot.index if shot.seed is None else shot.seed,
            memory=[keyframe.latent for keyframe in memory if keyframe.latent is not None],
            given=self._given(story, shot, film),
        )
        clock.lap("recall")
        frames = (self.generator.first if mode == "t2v" else self.generator.generate)(request, progress.step)
        clock.lap("generate")
        keyframes = self._select(shot, frames[repeated:], bank, taken)
        bank.add(keyframes)
        clock.lap("select")
        file = film.write_shot(shot, frames, repeated=repeated, fps=self.generator.video.fps, memory=bank)
        clock.lap("save")
        return ShotRecord(
            shot=shot.index + 1,
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

    def _given(self, story: Story, shot: Shot, film: Film) -> np.ndarray:
        """The frames that ``shot`` begins with, uint8 [0, 1 or 5, H, W, 3]."""
        video, count = self.generator.video, GIVEN_FRAMES[self.mode_of(shot, story)]
        if not count:
            return np.empty((0, video.height, video.width, 3), dtype=np.uint8)
        return np.stack([self._fit(frame) for frame in film.last_frames(shot.index - 1, count)])

    def _recall(self, story: Story, shot: Shot, mode: Mode, bank: MemoryBank) -> list[Keyframe]:
        """The keyframes that ``shot`` is given, with latents; those that had none are encoded now."""
        coming = ComingShot(
            number=shot.index + 1,
            prompt=story.prompt_of(shot),
            characters=shot.characters,
            embed_text=self._embed_text,
        )
        recalled = [] if mode == "t2v" else bank.recall(coming)
        ids = [keyframe.id for keyframe in recalled]
        if missed := [id for id in bank.edited if id not in ids]:
            rule = "it is made from text alone" if mode == "t2v" else f"{self.recall} recalls {len(ids)} of {len(bank)}"
            logger.warning(
                f"memory: {', '.join(missed)}, added or replaced by the user, not recalled for {shot.label}: {rule}"
            )
        bank.edited = {}
        missing = [keyframe for keyframe in recalled if keyframe.latent is None]
        latents = self.generator.encode_keyframes([keyframe.image for keyframe in missing])
        for keyframe, latent in zip(missing, latents, strict=True):
            bank.replace(replace(keyframe, latent=latent))
        found = [bank[id] for id in ids]
        shapes = {keyframe.id: list(keyframe.latent.shape) for keyframe in found if keyframe.latent is not None}
        for id, shape in shapes.items():
            if shape != (first := next(iter(shapes.values()))):
                raise ValueError(
                    f"the latent of keyframe {id} has shape {shape}, and another of the memory {first}: "
                    f"delete the sha256 of the wrong one's entry in memory.json, and it is encoded again"
                )
        return found

    def _select(self, shot: Shot, frames: np.ndarray, bank: MemoryBank, taken: set[str]) -> list[Keyframe]:
        """The keyframes of a shot's new frames, each frame embedded once and scored only where needed."""
        quality = None if isinstance(self.quality, NoQuality) else self.quality

        def score(frame: int) -> float:
            assert quality is not None
            value = quality.score(as_images(frames[frame : frame + 1]))
            check_finite(value, f"the quality score of frame {frame + 1}", "check the weights of scorer.quality")
            return value.item()

        embeddings = self._embed(frames)
        with self._on_device(quality):
            selection = self.selector.select(
                embeddings,
                bank=bank.embeddings,
                quality=None if quality is None else score,
                quality_threshold=None if quality is None else quality.threshold,
            )
        return [
            Keyframe(
                id=frame_id(shot.index + 1, frame + 1, taken),
                image=frames[frame],
                embedding=embeddings[frame],
                shot=shot.index + 1,
                frame=frame + 1,
                quality=selection.quality.get(frame),
                similarity=selection.similarity[frame],
                character=shot.characters[0] if len(shot.characters) == 1 else None,
            )
            for frame in selection.kept
        ]

    def _embed(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [F, H, W, 3] -> float32 [F, D] of unit length."""
        with self._on_device(self.embedder):
            return embed_in_batches(frames, lambda batch: self.embedder.embed_images(as_images(batch)).numpy())

    def _embed_text(self, text: str) -> np.ndarray:
        with self._on_device(self.embedder):
            return self.embedder.embed_texts([text])[0].numpy()

    @contextmanager
    def _on_device(self, scorer: Embedder | QualityScorer | None) -> Iterator[None]:
        """Inside the block ``scorer`` is on the scorers' device, and on the CPU again after it."""
        if scorer is None or self.scorer_device.type == "cpu":
            yield
            return
        scorer.to(self.scorer_device)
        try:
            yield
        finally:
            scorer.to("cpu")


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 4)
        self._last = now
