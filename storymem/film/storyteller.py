"""The loop of the method: recall keyframes, generate, select keyframes, save; shot after shot (paper section 3.1)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from storymem.film.differences import setting_changes
from storymem.film.folder import Film
from storymem.film.manifest import CandidateRecord, FilmError, Take, film_folder
from storymem.film.matching import bank_digest
from storymem.film.parts import Embedder, Recalled, ShotGenerator
from storymem.film.progress import Progress
from storymem.film.restoring import restored_memory
from storymem.film.resume import (
    Run,
    check_size,
    jobs_of,
    match_film,
    naming_next_command,
    story_changes,
    story_record,
)
from storymem.film.settings import (
    GIVEN_FRAMES,
    FirstShot,
    Mode,
    Work,
    check_lengths,
    estimated_bytes,
    mode_of,
    parse_work,
)
from storymem.film.timeline import film_frames, film_starts
from storymem.io import NotFiniteError, check_finite, check_room
from storymem.media.images import Fit, fit_image
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
)
from storymem.memory.bank import KeyframeRecord
from storymem.scorers import QualityScorer
from storymem.scorers.on_demand import OnDemand
from storymem.scorers.scorer import NoQuality, as_images
from storymem.story import Shot, Story
from storymem.wan.settings import MAX_SEED, Continuity
from storymem.wan.shots import Candidates, ShotRequest
from storymem.wan.spec import Expert

logger = logging.getLogger(__name__)

_OTHER_NOISE = 10_000  # from the seed of one take to that of the next: more than a film has shots


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

    def tell(
        self,
        story: Story,
        folder: str | Path,
        *,
        resume: str = "auto",
        shot: str | None = None,
        following: bool = False,
        takes: int = 1,
        progress: Progress | None = None,
    ) -> Film:
        """Generate the film of ``story`` in ``folder``, resume it, or make other takes of its shots.

        Args:
            story: see :func:`storymem.story.load_story`. If the folder holds a film of an earlier version of it, shots
                that are in both keep their takes.
            folder: the film's folder, created if needed.
            resume: "auto" makes the shots that have no take, and refuses a film of another story or with other
                settings; "from_shot:N" regenerates shots N, N + 1, ... (from 1) with this story and these settings.
            shot: makes another take of these shots, such as "3" or "3,5-7", with the memory that they would see now.
            following: regenerates the shots after the first of ``shot`` too.
            takes: of each shot in ``shot``. The first is chosen.
            progress: shows shots and steps.

        Raises:
            ValueError: before anything is generated, if a shot is too short or an argument is not understood.
            FilmError: also before anything is generated, if the folder cannot be used for this.
        """
        video = self.generator.video
        check_lengths(story, frames=video.frames, continuity=self.continuity, first_shot=self.first_shot)
        work = parse_work(len(story.shots), resume=resume, shot=shot, following=following, takes=takes)
        progress = progress or Progress(enabled=False)
        with film_folder(folder) as folder:
            run = self._open(story, folder, work, progress)
            film, jobs = run.film, run.jobs
            shots = [story.shots[job.index] for job in jobs for _ in range(job.takes)]
            needed = sum(estimated_bytes(self.frames_of(shot), video.height, video.width) for shot in shots)
            check_room(folder, needed, "the film")
            film.check(besides=[job.index for job in jobs])
            making, finished = sum(job.takes for job in jobs), 0 if work.shots else len(story.shots) - len(jobs)
            shown = progress.film(total=len(story.shots), finished=finished, making=making)
            with shown, naming_next_command(film, work, jobs):
                if jobs:
                    self._generate(run, progress)
                elif run.changed:
                    film.commit(self._restore(run))
                film.refresh()
                if lost := film.lost():
                    logger.warning(f"{film.folder}: {lost}")
        return film

    def mode_of(self, shot: Shot, story: Story) -> Mode:
        """How ``shot`` is made; see :func:`storymem.film.settings.mode_of`."""
        return mode_of(shot, story, continuity=self.continuity, first_shot=self.first_shot)

    def before_shots(self, story: Story, film: Film, shots: Sequence[Shot], progress: Progress) -> None:
        """Called before the first take of ``shots`` is made; methods of other systems make here what they need."""

    def given(self, story: Story, shot: Shot, film: Film) -> np.ndarray:
        """The frames that ``shot`` begins with, uint8 [0, 1 or 5, H, W, 3]."""
        video, count = self.generator.video, GIVEN_FRAMES[self.mode_of(shot, story)]
        if not count:
            return np.empty((0, video.height, video.width, 3), dtype=np.uint8)
        return np.stack([self._fit(frame) for frame in film.last_frames(shot.index - 1, count)])

    def texts_of(self, story: Story, shot: Shot) -> list[str]:
        """Texts that are encoded for ``shot``: its prompt, a caption of the whole film if there is one, others."""
        return [story.prompt_of(shot)]

    def recall_for(self, story: Story, shot: Shot, film: Film, bank: MemoryBank) -> Recalled:
        """The keyframes that ``shot`` recalls, with latents or without."""
        if self.mode_of(shot, story) in ("t2v", "i2v"):
            return Recalled(keyframes=[])
        return Recalled(keyframes=bank.recall(self.coming(story, shot, film, bank)))

    def request(self, story: Story, shot: Shot, film: Film, recalled: Recalled, seed: int) -> ShotRequest:
        """What the generator makes ``shot`` from; ``recalled`` has latents."""
        return ShotRequest(
            prompt=self.texts_of(story, shot)[0],
            negative_prompt=shot.negative_prompt,
            frames=self.frames_of(shot),
            seed=seed,
            memory=[keyframe.latent for keyframe in recalled.keyframes if keyframe.latent is not None],
            given=self.given(story, shot, film),
        )

    def frames_of(self, shot: Shot) -> int:
        """F of a shot: its own, or the model's."""
        return shot.frames or self.generator.video.frames

    # Resuming

    def _open(self, story: Story, folder: Path, work: Work, progress: Progress) -> Run:
        """The film in ``folder``, its takes matched with the story, and what to make; on disk it stays as it is."""
        record, config = story_record(story), dict(self.config)
        if not Film.exists(folder):
            if work.onwards:
                raise FilmError(f"{work.words}: {folder} holds no film yet; leave that out")
            film = Film(folder, story=record, config=config)
            return Run(story=story, film=film, jobs=jobs_of(film, work), config=config)
        film = Film.open(folder)
        film.remove_unfinished()
        match_film(film, record, config, work)
        before = film.config
        differs = setting_changes(before, config)
        config = config if differs else before
        if work.shots is None or work.onwards is not None or not film.takes:
            film.use_config(config)
        lines = [*story_changes(film)]
        if config != before:
            lines += ["other settings than those of the film:", *(f"  {line}" for line in differs)]
        for line in lines:
            progress.print(line)
        jobs = jobs_of(film, work)
        check_size(film, config, jobs)
        own = [
            story.shots[job.index].label for job in jobs if story.shots[job.index].seed is not None and not job.fresh
        ]
        if work.words and own and before.get("seed") != self.config.get("seed"):
            logger.warning(f"seed={self.seed} does not change {', '.join(own[:5])}: the story gives their seeds")
        return Run(story=story, film=film, jobs=jobs, config=config)

    def _restore(self, run: Run) -> MemoryBank:
        return restored_memory(run, policy=self.recall, embed=self._embed, fit=self._fit)

    def _fit(self, image: np.ndarray) -> np.ndarray:
        video = self.generator.video
        if image.shape[:2] == (video.height, video.width):
            return image
        return fit_image(image, video.height, video.width, self.reference_fit)

    # One shot

    def _generate(self, run: Run, progress: Progress) -> None:
        """Make the takes. Until the first is finished, the film on disk does not change."""
        story, film = run.story, run.film
        made: set[int] = set()
        shots = [story.shots[job.index] for job in run.jobs]
        self.before_shots(story, film, shots, progress)
        for job in run.jobs:  # frames that cannot be read are reported before anything is made
            if job.index - 1 not in made:
                self.given(story, story.shots[job.index], film)
            made.add(job.index)
        bank = self._restore(run)
        texts = [text for shot in shots for text in self.texts_of(story, shot)]
        self.generator.prepare(texts, [shot.negative_prompt for shot in shots])
        for job, shot in zip(run.jobs, shots, strict=True):
            for number in range(job.takes):
                progress.begin_shot(shot)
                try:
                    take = self._take(run, shot, bank, progress, fresh=job.fresh, chosen=number == 0)
                except NotFiniteError as error:
                    raise NotFiniteError(f"{shot.label} was not finished: {error}") from None
                progress.end_shot(take)
                film.refresh()

    def _take(self, run: Run, shot: Shot, bank: MemoryBank, progress: Progress, *, fresh: bool, chosen: bool) -> Take:
        """One round of the loop: makes a take and adds it to the film, and what it adds to the memory if ``chosen``."""
        clock = _Clock()
        story, film = run.story, run.film
        taken = ids_on_disk(film.folder) | {keyframe.id for keyframe in bank}
        mode = self.mode_of(shot, story)
        recalled = self._recall(story, shot, film, bank)
        request = self.request(story, shot, film, recalled, self._seed(shot, film, fresh=fresh))
        clock.lap("recall")
        frames = (self.generator.first if mode == "t2v" else self.generator.generate)(request, progress.step)
        clock.lap("generate")
        keyframes, candidates = self.select(shot, frames[GIVEN_FRAMES[mode] :], bank, taken)
        digest = bank_digest(bank.known_to(shot.index + 1))
        besides = bank.put_frames(shot.index + 1, keyframes) if chosen else keyframes
        clock.lap("select")
        take = film.write_take(
            shot.index,
            frames,
            mode=mode,
            seed=request.seed,
            fps=self.generator.video.fps,
            config=run.config,
            memory=bank if chosen else None,
            besides=MemoryBank(besides, made_with=bank.made_with),
        )
        clock.lap("save")
        take = replace(
            take,
            memory=tuple(keyframe.id for keyframe in recalled.keyframes),
            memory_of=recalled.ids,
            keyframes=tuple(map(KeyframeRecord.of, keyframes)),
            bank=digest,
            candidates=candidates,
            seconds=clock.seconds,
        )
        left = [KeyframeRecord.of(keyframe) for keyframe in besides] if chosen else None
        film.add(take, chosen=chosen, left=left)
        return take

    def _seed(self, shot: Shot, film: Film, *, fresh: bool) -> int:
        """The seed that the story gives, or that of the shot's place; if ``fresh``, one that no take of it had."""
        seed = self.seed + shot.index if shot.seed is None else shot.seed
        used = film.seeds_of(shot.index) if fresh else set()
        return next(one for n in count() if (one := (seed + n * _OTHER_NOISE) % (MAX_SEED + 1)) not in used)

    def _recall(self, story: Story, shot: Shot, film: Film, bank: MemoryBank) -> Recalled:
        """See :meth:`recall_for`; keyframes that had no latents are encoded now."""
        recalled = self.recall_for(story, shot, film, bank)
        self._report_missed(story, shot, film, bank, recalled)
        by_expert = {expert: self.encoded(bank, own) for expert, own in recalled.by_expert.items()}
        return Recalled(keyframes=self.encoded(bank, recalled.keyframes), by_expert=by_expert)

    def _report_missed(self, story: Story, shot: Shot, film: Film, bank: MemoryBank, recalled: Recalled) -> None:
        """Log which of the user's new images ``shot`` does not recall although it may; each is reported once."""
        known = {keyframe.id for keyframe in bank.known_to(shot.index + 1)}
        ids = {keyframe.id for keyframe in recalled.keyframes}
        missed = [id for id in bank.edited if id in known - ids]
        bank.edited = {id: done for id, done in bank.edited.items() if id not in known}
        if not missed:
            return
        if self.mode_of(shot, story) == "t2v":
            rule = "it is made from text alone, as first_shot sets it"
        else:
            rule = f"{self.recall} recalls {len(ids)} of the {len(known)} keyframes before it"
            if ids and not recalled.by_expert:
                rule += f"; to have it recalled: storymem memory {film.folder} pin {missed[0]}"
        logger.warning(
            f"memory: {', '.join(missed)}, added or replaced by the user, not recalled for {shot.label}: {rule}"
        )

    def encoded(self, bank: MemoryBank, keyframes: Sequence[Keyframe]) -> list[Keyframe]:
        """``keyframes`` of the bank with latents; those that had none are encoded now."""
        missing = [keyframe for keyframe in keyframes if bank[keyframe.id].latent is None]
        latents = self.generator.encode_keyframes([keyframe.image for keyframe in missing])
        for keyframe, latent in zip(missing, latents, strict=True):
            bank.replace(replace(keyframe, latent=latent))
        found = [bank[keyframe.id] for keyframe in keyframes]
        shapes = {keyframe.id: list(keyframe.latent.shape) for keyframe in found if keyframe.latent is not None}
        for id, shape in shapes.items():
            if shape != (first := next(iter(shapes.values()))):
                raise ValueError(
                    f"the latent of keyframe {id} has shape {shape}, and another of the memory {first}: "
                    f"delete the sha256 of the wrong one's entry in memory.json, and it is encoded again"
                )
        return found

    def coming(
        self, story: Story, shot: Shot, film: Film, bank: MemoryBank, expert: Expert | None = None
    ) -> ComingShot:
        """``shot`` as a recall policy knows it; ``expert`` is the one whose learned recall chooses, None: all."""
        prompt, caption = (self.texts_of(story, shot) * 2)[:2]

        def choose(keyframes: Sequence[Keyframe], local: int, whole: int) -> list[int]:
            starts = film_starts(film, [self.frames_of(each) for each in story.shots])
            candidates = Candidates(
                latents=[k.latent for k in self.encoded(bank, keyframes) if k.latent is not None],
                frames=film_frames(keyframes, film, starts),
                start=starts[shot.index],
                prompt=prompt,
                caption=caption,
            )
            return self.generator.choose(candidates, local, whole, expert)

        return ComingShot(
            number=shot.index + 1,
            prompt=story.prompt_of(shot),
            characters=shot.characters,
            embed_text=self._embed_text,
            choose=choose,
        )

    def select(
        self, shot: Shot, frames: np.ndarray, bank: MemoryBank, taken: set[str]
    ) -> tuple[list[Keyframe], tuple[CandidateRecord, ...]]:
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
                bank=MemoryBank(bank.known_to(shot.index + 1)).embeddings,
                quality=None if quality is None else score,
                quality_threshold=None if quality is None else quality.threshold,
            )
        keyframes = [
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
        records = (CandidateRecord(**{**vars(one), "frame": one.frame + 1}) for one in selection.candidates)
        return keyframes, tuple(records)

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
        stays = self.scorer_device.type == "cpu" and not isinstance(scorer, OnDemand)
        if scorer is None or stays:
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
