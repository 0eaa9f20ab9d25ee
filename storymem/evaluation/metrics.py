"""The metrics of ST-Bench (paper section 4.1), and what a film-maker asks beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from storymem.evaluation.metric import (
    Column,
    Metric,
    Pair,
    Scores,
    Screening,
    Value,
    in_chunks,
    mean,
    reasons_for,
    weights_sha256,
)
from storymem.io import check_finite
from storymem.scorers.aesthetic import AestheticScorer
from storymem.scorers.scorer import Origin, as_images
from storymem.scorers.viclip import ViclipScorer, middle_frames
from storymem.scorers.viclip_network import VICLIP_L_14
from storymem.story import Shot, Story

TopRule = Literal["prompts", "shots"]


class AestheticQuality(Metric):
    """LAION's aesthetic score of every frame, divided by 10 as in VBench; mean over frames, then over shots.

    Args:
        scorer: V1 for numbers that compare with published ones.
    """

    version = 2
    columns = (Column(name="aesthetic_quality", title="Aesthetic quality", heading="Aesthetic"),)

    def __init__(self, scorer: AestheticScorer) -> None:
        self.scorer = scorer

    @property
    def weights(self) -> Origin:
        """See :meth:`Metric.weights`; the paper's head is V1."""
        return "own" if self.scorer.name != "laion-v1" and self.scorer.origin == "published" else self.scorer.origin

    def see(self, shot: Shot, frames: np.ndarray, screening: Screening) -> float:
        """Mean score of a shot, in tenths."""
        return float(in_chunks(frames, self.scorer.clip.batch_size, self.scorer.score).mean()) / 10

    def conclude(self, seen: Sequence[float | None], screening: Screening) -> Scores:
        """See :meth:`Metric.conclude`."""
        columns = {"aesthetic_quality": mean(seen)}
        return Scores(
            columns=columns, reasons=reasons_for(columns, screening), shots={"aesthetic_quality": tuple(seen)}
        )

    def settings(self) -> dict[str, Any]:
        """See :meth:`Metric.settings`."""
        clip = self.scorer.clip
        return {
            "scorer": self.scorer.name,
            "frames": "all",
            "preprocessing": clip.preprocessing,
            "dtype": str(clip.dtype),
            "weights_sha256": weights_sha256(clip.network, self.scorer.head),
        }


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """Of a shot: the frames ViCLIP looks at, and those of them that stand for it in the whole film."""

    clip: np.ndarray
    of_film: np.ndarray


class ViclipScores(Metric):
    """Prompt following and cross-shot consistency, all by cosines of ViCLIP embeddings.

    Args:
        scorer: L/14 with frame profile ``vbench`` for numbers that compare with published ones.
        top_pairs: how many pairs of shots the narrower consistency counts; all if there are fewer.
        top_rule: which pairs: those whose prompts are most alike, by ViCLIP's text embeddings (``prompts``), or those
            whose shots are (``shots``). The paper does not say; ties go to the earlier pair.
    """

    columns = (
        Column(name="prompt_following_global", title="Prompt following, global", heading="Prompt, global"),
        Column(name="prompt_following_shot", title="Prompt following, single shot", heading="Prompt, shot"),
        Column(name="consistency_overall", title="Cross-shot consistency, overall", heading="Consist., overall"),
        Column(name="consistency_top10", title="Cross-shot consistency, top-10 pairs", heading="Consist., top-10"),
    )

    def __init__(self, scorer: ViclipScorer, *, top_pairs: int = 10, top_rule: TopRule = "prompts") -> None:
        if top_pairs < 1:
            raise ValueError(f"top_pairs={top_pairs}: must be at least 1")
        if top_rule not in ("prompts", "shots"):
            raise ValueError(f"top_rule={top_rule}: write prompts or shots")
        self.scorer, self.top_pairs, self.top_rule = scorer, top_pairs, top_rule

    @property
    def weights(self) -> Origin:
        """See :meth:`Metric.weights`; the paper's network is L/14, on VBench's frames."""
        papers = self.scorer.config == VICLIP_L_14 and self.scorer.profile == "vbench"
        return "own" if self.scorer.origin == "published" and not papers else self.scorer.origin

    def see(self, shot: Shot, frames: np.ndarray, screening: Screening) -> _Seen:
        """Keep eight frames of the shot, and those of the film's eight that fall into it."""
        start = screening.starts[shot.index]
        of_film = [] if screening.total is None else self.scorer.frame_indices(screening.total)
        inside = [index - start for index in of_film if start <= index < start + len(frames)]
        return _Seen(clip=frames[self.scorer.frame_indices(len(frames))], of_film=frames[inside])

    def conclude(self, seen: Sequence[_Seen | None], screening: Screening) -> Scores:
        """See :meth:`Metric.conclude`."""
        story = screening.story
        texts = [story.overview, *(shot.prompt for shot in story.shots)]
        embedded = self.scorer.embed_texts(texts)
        check_finite(embedded, "embeddings of texts")  # they also decide which pairs count
        overview, *prompts = embedded.double().numpy()
        shots, film = self._embed(seen)
        similarity = _cosines(shots)
        following = tuple(
            None if shot is None else float(shot @ prompt) for shot, prompt in zip(shots, prompts, strict=True)
        )
        pairs = [(i, j, similarity[i][j]) for i, j in combinations(range(len(shots)), 2)]
        top = self._top(pairs, prompts)
        columns = {
            "prompt_following_global": None if film is None else float(film @ overview),
            "prompt_following_shot": mean(following),
            "consistency_overall": mean([value for *_, value in pairs]),
            "consistency_top10": mean([value for *_, value in top]),
        }
        reasons = reasons_for(columns, screening)
        undefined: tuple[str, ...] = ()
        if not pairs:
            undefined = ("consistency_overall", "consistency_top10")
            reasons |= dict.fromkeys(undefined, "the story has a single shot")
        if film is None and screening.missing is None:
            reasons["prompt_following_global"] = "the shots differ in size, so that no clip goes through the whole film"
        cut = sum(count > self.scorer.tokenizer.context_length for count in self.scorer.tokenizer.token_counts(texts))
        return Scores(
            columns=columns,
            reasons=reasons,
            undefined=undefined,
            shots={"prompt_following_shot": following},
            pairs={"consistency_overall": tuple(pairs), "consistency_top10": tuple(top)},
            details={
                "texts": len(texts),
                "texts_truncated": cut,
                "frames_of_shots": [None if n is None else self.scorer.frame_indices(n) for n in screening.lengths],
                "frames_of_film": None if screening.total is None else self.scorer.frame_indices(screening.total),
            },
        )

    def settings(self) -> dict[str, Any]:
        """See :meth:`Metric.settings`."""
        return {
            "frame_profile": self.scorer.profile,
            "frames": self.scorer.config.num_frames,
            "context_tokens": self.scorer.config.context_length,
            "top_pairs": self.top_pairs,
            "top_rule": self.top_rule,
            "dtype": str(self.scorer.dtype),
            "weights_sha256": weights_sha256(self.scorer.network),
        }

    def _embed(self, seen: Sequence[_Seen | None]) -> tuple[list[np.ndarray | None], np.ndarray | None]:
        """Embeddings of all shots and of the film, in batches of clips of one size."""
        clips: dict[int, np.ndarray] = {number: one.clip for number, one in enumerate(seen) if one is not None}
        frames = [one.of_film for one in seen if one is not None and len(one.of_film)]
        if frames and len(clips) == len(seen) and len({part.shape[1:] for part in frames}) == 1:
            clips[-1] = np.concatenate(frames)  # the film itself
        found: dict[int, np.ndarray] = {}
        for size in {clip.shape for clip in clips.values()}:
            same = [number for number, clip in clips.items() if clip.shape == size]
            for start in range(0, len(same), self.scorer.batch_size):
                batch = same[start : start + self.scorer.batch_size]
                embedded = self.scorer.embed_clips(as_images(np.stack([clips[number] for number in batch])))
                check_finite(embedded, "embeddings of shots")
                found |= dict(zip(batch, embedded.double().numpy(), strict=True))
        return [found.get(number) for number in range(len(seen))], found.get(-1)

    def _top(self, pairs: Sequence[Pair], prompts: Sequence[np.ndarray]) -> list[Pair]:
        if self.top_rule == "shots":
            # A pair without a value might be any; it comes first, so that the mean is not made without it.
            return sorted(pairs, key=lambda pair: -(2.0 if pair[2] is None else pair[2]))[: self.top_pairs]
        alike = np.stack(prompts) @ np.stack(prompts).T
        return sorted(pairs, key=lambda pair: -round(float(alike[pair[0], pair[1]]), 6))[: self.top_pairs]


class ImageEmbedder(Protocol):
    """Embeds pictures for `Appearance`: `ClipScorer`, or `storymem.evaluation.dinov2.Dinov2Embedder`."""

    batch_size: int
    dtype: torch.dtype

    @property
    def network(self) -> nn.Module: ...

    def embed_images(self, frames: Tensor) -> Tensor: ...


class Appearance(Metric):
    """Does a character look the same wherever it is listed, and does a shot stay itself?

    Identity consistency: for each character listed in two or more shots, the mean cosine between frames of one of these
    shots and frames of another, over all pairs; then the mean over characters. Intra-shot consistency: the mean cosine
    between frames of a shot, over all pairs of frames; then over shots. Whole frames are embedded, not faces: place
    and framing count too, so compare systems on the same stories and nothing else. Not part of the paper.

    Args:
        embedder: of pictures.
        frames: of each shot, the middles of so many intervals of equal length.
    """

    columns = (
        Column(name="identity_consistency", title="Identity consistency", heading="Identity"),
        Column(name="intra_shot_consistency", title="Intra-shot consistency", heading="Intra-shot"),
    )

    def __init__(self, embedder: ImageEmbedder, *, frames: int = 8) -> None:
        if frames < 2:
            raise ValueError(f"frames={frames}: at least 2 of a shot must be compared")
        self.embedder, self.frames = embedder, frames

    @property
    def weights(self) -> Origin:
        """See :meth:`Metric.weights`."""
        return getattr(self.embedder, "origin", "own")

    def see(self, shot: Shot, frames: np.ndarray, screening: Screening) -> np.ndarray:
        """Embeddings [N, D] of the frames that are looked at."""
        chosen = frames[self._chosen(len(frames))]
        return in_chunks(chosen, self.embedder.batch_size, self.embedder.embed_images)

    def conclude(self, seen: Sequence[np.ndarray | None], screening: Screening) -> Scores:
        """See :meth:`Metric.conclude`."""
        steadiness = tuple(None if frames is None else _mean_cosine_within(frames) for frames in seen)
        # The mean of all cosines between two sets is the product of the sets' means.
        between = _cosines([None if frames is None else frames.mean(axis=0) for frames in seen])
        characters = {
            name: [(i, j, between[i][j]) for i, j in combinations(shots, 2)]
            for name, shots in _appearances(screening.story).items()
        }
        by_name = {name: mean([value for *_, value in pairs]) for name, pairs in characters.items()}
        columns = {"identity_consistency": mean(list(by_name.values())), "intra_shot_consistency": mean(steadiness)}
        reasons, undefined = reasons_for(columns, screening), []
        if not characters:
            undefined.append("identity_consistency")
            reasons["identity_consistency"] = "no character is listed in two shots"
        if any(frames is not None and len(frames) < 2 for frames in seen):
            reasons.setdefault("intra_shot_consistency", "a shot has a single frame")
        shared = sorted({pair for pairs in characters.values() for pair in pairs}, key=lambda pair: pair[:2])
        return Scores(
            columns=columns,
            reasons=reasons,
            undefined=tuple(undefined),
            shots={"intra_shot_consistency": steadiness},
            pairs={"identity_consistency": tuple(shared)},
            details={
                "characters": by_name,
                "frames_of_shots": [None if length is None else self._chosen(length) for length in screening.lengths],
            },
        )

    def _chosen(self, length: int) -> list[int]:
        # A short shot shows fewer frames, not the last one several times.
        return sorted(set(middle_frames(length, self.frames)))

    def settings(self) -> dict[str, Any]:
        """See :meth:`Metric.settings`."""
        return {
            "embedder": type(self.embedder).__name__,
            "preprocessing": getattr(self.embedder, "preprocessing", None),
            "frames": self.frames,
            "dtype": str(self.embedder.dtype),
            "weights_sha256": weights_sha256(self.embedder.network),
        }


def _appearances(story: Story) -> Mapping[str, list[int]]:
    """Character -> the shots that list it, for those with two or more."""
    of = {one.name: [shot.index for shot in story.shots if one.name in shot.characters] for one in story.characters}
    return {name: shots for name, shots in of.items() if len(shots) >= 2}


def _cosines(rows: Sequence[np.ndarray | None]) -> list[list[Value]]:
    """Products of all pairs of rows, as one matrix product; None where a row is missing."""
    present = [number for number, row in enumerate(rows) if row is not None]
    table: list[list[Value]] = [[None] * len(rows) for _ in rows]
    if present:
        stacked = np.stack([row for row in rows if row is not None])
        for i, line in zip(present, (stacked @ stacked.T).tolist(), strict=True):
            for j, value in zip(present, line, strict=True):
                table[i][j] = value
    return table


def _mean_cosine_within(frames: np.ndarray) -> Value:
    """Mean over all pairs of different rows of unit length; None for a single row."""
    count = len(frames)
    if count < 2:
        return None
    total = float((frames.sum(axis=0) ** 2).sum())  # of all pairs, each row with itself included
    return (total - float((frames**2).sum())) / (count * (count - 1))
