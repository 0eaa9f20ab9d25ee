"""The metrics of ST-Bench (paper section 4.1), and consistency of characters and of single shots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from storymem.evaluation.metric import (
    Column,
    FilmInfo,
    ImageEmbedder,
    Metric,
    Pair,
    Scores,
    Value,
    appearances,
    cosine,
    in_batches,
    mean,
    pairs_of,
    values_of,
)
from storymem.io import check_finite
from storymem.scorers.aesthetic import AestheticScorer
from storymem.scorers.scorer import as_images
from storymem.scorers.viclip import ViclipScorer, middle_frames
from storymem.scorers.viclip_network import VICLIP_L_14
from storymem.story import Shot

TopRule = Literal["prompts", "shots"]


class AestheticQuality(Metric):
    """LAION's aesthetic score of every frame, divided by 10 as in VBench; mean over frames, then over shots.

    Args:
        scorer: the paper's is V1.
    """

    version = 2
    columns = (Column("aesthetic_quality", "Aesthetic quality", "Aesthetic"),)
    rules: Mapping[str, Any] = {"frames": "all"}

    def __init__(self, scorer: AestheticScorer) -> None:
        self.scorer, self.scorers = scorer, (scorer,)
        self.is_papers = scorer.name == "laion-v1"

    def measure_shot(self, shot: Shot, frames: np.ndarray, film: FilmInfo) -> float:
        """Mean score of a shot, divided by 10."""
        return float(in_batches(frames, self.scorer.clip.batch_size, self.scorer.score).mean()) / 10

    def compute(self, measured: Sequence[float | None], film: FilmInfo) -> Scores:
        column = {"aesthetic_quality": tuple(measured)}
        return Scores.of({name: mean(values) for name, values in column.items()}, film.missing, shots=column)


class _Clips(NamedTuple):
    """Of a shot: the frames that ViCLIP reads, and those of them that it reads of the whole film."""

    shot: np.ndarray
    film: np.ndarray


class ViclipScores(Metric):
    """Prompt following and cross-shot consistency: cosines of ViCLIP embeddings.

    The last column is the inter-shot consistency of HoloCine (arXiv 2510.20822): the mean over pairs of shots that list
    a common character.

    Args:
        scorer: the paper's is L/14.
        top_pairs: how many pairs of shots count for the top-10 consistency; all if there are fewer.
        top_rule: which pairs: those with the most similar prompts by ViCLIP's text embeddings (``prompts``), or those
            of the most similar shots (``shots``). The paper does not specify it. Ties go to the earlier pair.
    """

    columns = (
        Column("prompt_following_global", "Prompt following, global", "Prompt, global"),
        Column("prompt_following_shot", "Prompt following, single shot", "Prompt, shot"),
        Column("consistency_overall", "Cross-shot consistency, overall", "Consist., overall", consistency=True),
        Column("consistency_top10", "Cross-shot consistency, top-10 pairs", "Consist., top-10", consistency=True),
        Column(
            "consistency_same_character",
            "Cross-shot consistency, same character",
            "Consist., same char.",
            consistency=True,
        ),
    )

    def __init__(self, scorer: ViclipScorer, *, top_pairs: int = 10, top_rule: TopRule = "prompts") -> None:
        if top_pairs < 1:
            raise ValueError(f"top_pairs={top_pairs}: must be at least 1")
        if top_rule not in ("prompts", "shots"):
            raise ValueError(f"top_rule={top_rule}: write prompts or shots")
        self.scorer, self.top_pairs, self.top_rule = scorer, top_pairs, top_rule
        self.scorers, self.is_papers = (scorer,), scorer.config == VICLIP_L_14
        self.rules = {
            "frames": f"{scorer.config.num_frames}, as in VBench",
            "context_tokens": scorer.config.context_length,
            "top_pairs": top_pairs,
            "top_rule": top_rule,
        }

    def measure_shot(self, shot: Shot, frames: np.ndarray, film: FilmInfo) -> _Clips:
        """Eight frames of the shot, and those of the film's eight that are in it."""
        start = film.starts[shot.index]
        of_film = [] if film.total is None else self.scorer.frame_indices(film.total)
        inside = [index - start for index in of_film if start <= index < start + len(frames)]
        return _Clips(shot=frames[self.scorer.frame_indices(len(frames))], film=frames[inside])

    def compute(self, measured: Sequence[_Clips | None], film: FilmInfo) -> Scores:
        texts = [film.story.overview, *(shot.prompt for shot in film.story.shots)]
        embedded = self.scorer.embed_texts(texts)
        check_finite(embedded, "embeddings of texts")  # they also decide which pairs count
        overview, *prompts = embedded.double().numpy()
        shots, whole = self._embed(measured)
        following = tuple(cosine(shot, prompt) for shot, prompt in zip(shots, prompts, strict=True))
        pairs = pairs_of(shots)
        top = self._top(pairs, prompts)
        cast = [set(shot.characters) for shot in film.story.shots]
        common = [pair for pair in pairs if cast[pair[0]] & cast[pair[1]]]
        columns = {
            "prompt_following_global": cosine(whole, overview),
            "prompt_following_shot": mean(following),
            "consistency_overall": mean(values_of(pairs)),
            "consistency_top10": mean(values_of(top)),
            "consistency_same_character": mean(values_of(common)),
        }
        undefined = {} if common else {"consistency_same_character": "no character is listed in two shots"}
        if not pairs:
            undefined |= dict.fromkeys(("consistency_overall", "consistency_top10"), "the story has a single shot")
        tokens = self.scorer.tokenizer.token_counts(texts)
        return Scores.of(
            columns,
            film.missing or "the shots differ in size, so there is no clip of the whole film",
            undefined,
            shots={"prompt_following_shot": following},
            pairs={
                "consistency_overall": tuple(pairs),
                "consistency_top10": tuple(top),
                "consistency_same_character": tuple(common),
            },
            details={
                "texts": len(texts),
                "texts_truncated": sum(count > self.scorer.tokenizer.context_length for count in tokens),
                "frames_of_shots": [None if n is None else self.scorer.frame_indices(n) for n in film.lengths],
                "frames_of_film": None if film.total is None else self.scorer.frame_indices(film.total),
            },
        )

    def _embed(self, measured: Sequence[_Clips | None]) -> tuple[list[np.ndarray | None], np.ndarray | None]:
        """Embeddings of all shots and of the film, in batches of clips of one size."""
        clips: dict[int, np.ndarray] = {index: clips.shot for index, clips in enumerate(measured) if clips is not None}
        parts = [clips.film for clips in measured if clips is not None and len(clips.film)]
        if parts and len(clips) == len(measured) and len({part.shape[1:] for part in parts}) == 1:
            clips[-1] = np.concatenate(parts)  # the film
        found: dict[int, np.ndarray] = {}
        for size in {clip.shape for clip in clips.values()}:
            same = [index for index, clip in clips.items() if clip.shape == size]
            for start in range(0, len(same), self.scorer.batch_size):
                batch = same[start : start + self.scorer.batch_size]
                embedded = self.scorer.embed_clips(as_images(np.stack([clips[index] for index in batch])))
                check_finite(embedded, "embeddings of shots")
                found |= dict(zip(batch, embedded.double().numpy(), strict=True))
        return [found.get(index) for index in range(len(measured))], found.get(-1)

    def _top(self, pairs: Sequence[Pair], prompts: Sequence[np.ndarray]) -> list[Pair]:
        if self.top_rule == "shots":
            # A pair without a value might be among the top: it comes first, so that there is no mean without it.
            return sorted(pairs, key=lambda pair: -(2.0 if pair[2] is None else pair[2]))[: self.top_pairs]
        alike = np.stack(prompts) @ np.stack(prompts).T
        return sorted(pairs, key=lambda pair: -round(float(alike[pair[0], pair[1]]), 6))[: self.top_pairs]


class Appearance(Metric):
    """Consistency of characters across shots (identity), and of the frames of each shot (intra-shot).

    Identity: for each character listed in two or more shots, the mean cosine between frames of one of these shots and
    frames of another, over all pairs; then the mean over characters. Intra-shot: the mean cosine between frames of a
    shot, over all pairs of frames; then over shots. Whole frames are embedded, not faces: place and framing count too,
    so compare only systems on the same stories. Not part of the paper.

    Args:
        embedder: of images.
        frames: how many of each shot, evenly spaced.
    """

    columns = (
        Column("identity_consistency", "Identity consistency", "Identity", consistency=True),
        Column("intra_shot_consistency", "Intra-shot consistency", "Intra-shot", consistency=True),
    )

    def __init__(self, embedder: ImageEmbedder, *, frames: int = 8) -> None:
        if frames < 2:
            raise ValueError(f"frames={frames}: must be at least 2")
        self.embedder, self.frames, self.scorers, self.rules = embedder, frames, (embedder,), {"frames": frames}

    def measure_shot(self, shot: Shot, frames: np.ndarray, film: FilmInfo) -> np.ndarray:
        """Embeddings [N, D] of the chosen frames."""
        return in_batches(frames[self._chosen(len(frames))], self.embedder.batch_size, self.embedder.embed_images)

    def compute(self, measured: Sequence[np.ndarray | None], film: FilmInfo) -> Scores:
        within = tuple(None if frames is None else _mean_cosine_within(frames) for frames in measured)
        # The mean of all cosines between two sets is the product of the sets' means.
        means = [None if frames is None else frames.mean(axis=0) for frames in measured]
        found = {name: pairs_of(means, shots) for name, shots in appearances(film.story).items()}
        characters = {name: mean(values_of(pairs)) for name, pairs in found.items()}
        short = any(frames is not None and len(frames) < 2 for frames in measured)
        return Scores.of(
            {"identity_consistency": mean(list(characters.values())), "intra_shot_consistency": mean(within)},
            film.missing or ("a shot has a single frame" if short else None),
            {} if found else {"identity_consistency": "no character is listed in two shots"},
            shots={"intra_shot_consistency": within},
            pairs={"identity_consistency": tuple(sorted({pair for pairs in found.values() for pair in pairs}))},
            details={
                "characters": characters,
                "frames_of_shots": [None if length is None else self._chosen(length) for length in film.lengths],
            },
        )

    def _chosen(self, length: int) -> list[int]:
        return sorted(set(middle_frames(length, self.frames)))  # fewer of a short shot


def _mean_cosine_within(frames: np.ndarray) -> Value:
    """Mean cosine over all pairs of different rows [N, D] of unit length; None for a single row."""
    count = len(frames)
    if count < 2:
        return None
    total = float((frames.sum(axis=0) ** 2).sum())  # over all pairs, including each row with itself
    return (total - float((frames**2).sum())) / (count * (count - 1))
