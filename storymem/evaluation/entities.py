"""Characters as objects in the frames: are they there, and do they look the same in every shot?

After EntityBench (arXiv 2605.15199), whose repository has no licence: the definitions are its, the code is ours.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter
from scipy.optimize import linear_sum_assignment

from storymem.config import StoryPath
from storymem.evaluation.crops import Box, crop_boxes, distinct_boxes, erased, sharpness
from storymem.evaluation.metric import (
    Column,
    FilmInfo,
    ImageEmbedder,
    InnerFramesMetric,
    Pair,
    Scores,
    Value,
    appearances,
    mean,
    mean_of_present,
    pairs_of,
    unmeasured,
    values_of,
)
from storymem.io import FileError, hash_json, read_text
from storymem.scorers.clip import ClipScorer
from storymem.scorers.grounding import GroundingDetector
from storymem.scorers.scorer import as_images
from storymem.story import Shot, Story

GAPS = {"1": (1, 1), "2": (2, 2), "3_4": (3, 4), "5": (5, 10**6)}
"""Distances between shots (lowest, highest) by the ends of their columns' names."""

_QUERY_WORDS = 12  # of a description, for the detector


LEFT_OUT = (
    "a character that is present in fewer than two shots has no look to compare and is left out: see the presence, and "
    "the column that counts absent ones as 0"
)
"""Footnote of the mean look and the contrast."""


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """A character in a shot.

    Args:
        status: "present"; "weak": there is a box, but it does not fit the description; "absent": there is no box.
        frame: of the crop, from 0.
        box: left, top, right, bottom in pixels, with the margin.
        similarity: cosine of crop and description.
        look: embedding [D] of unit length; None unless present.
    """

    status: Literal["present", "weak", "absent"] = "absent"
    frame: int | None = None
    box: Box | None = None
    similarity: float | None = None
    look: np.ndarray | None = None


class Entities(InnerFramesMetric):
    """Presence and looks of the characters that have a description, by crops instead of whole frames.

    In each of a shot's frames, every listed character is searched for by the first 12 words of its description; among
    all boxes found, each character is assigned one, so that the sum of CLIP's cosines of crops and descriptions is
    highest. From ``gate`` on, the crop shows the character. The shot's crop of a character is the one among these with
    the highest product of cosine, sharpness and size; DINOv2 embeds it.

    - presence: the share of the listed characters that are present; mean over shots.
    - same: mean cosine over the pairs of shots in which a character is present; mean over characters.
    - strict: the same over all pairs of shots that list it; 0 where it is not present in both.
    - gaps: mean cosine by the distance of the shots, over the pairs of all characters.
    - contrast: same, minus the mean cosine between different characters: 0 if all look alike.

    ``strict`` and ``contrast`` are ours. A character without a description is left out. So is, from ``same``, one that
    is present in fewer than two shots: a footnote marks the value, and there is none if no character is left. The
    results name all characters that are left out, with the reason.

    Args:
        detector: of boxes.
        clip: compares crops with descriptions.
        embedder: of looks.
        frames: how many of each shot, evenly spaced, without the first and the last.
        gate: lowest cosine of crop and description that counts as present.
        descriptions: a CSV file (story, character, description), for characters without one in their story.
    """

    version = 2
    columns = (
        Column("entity_presence", "Characters present", "Present"),
        Column("entity_same", "Looks of characters, where present", "Same", consistency=True),
        Column("entity_strict", "Looks of characters, absent as 0", "Strict", consistency=True),
        Column("entity_gap_1", "Looks, neighbouring shots", "Gap 1", consistency=True),
        Column("entity_gap_2", "Looks, two shots apart", "Gap 2", consistency=True),
        Column("entity_gap_3_4", "Looks, three or four shots apart", "Gap 3-4", consistency=True),
        Column("entity_gap_5", "Looks, five or more shots apart", "Gap 5+", consistency=True),
        Column("entity_contrast", "Same minus different characters", "Contrast"),
    )

    def __init__(
        self,
        detector: GroundingDetector,
        clip: ClipScorer,
        embedder: ImageEmbedder,
        *,
        frames: int = 5,
        gate: float = 0.20,
        descriptions: str | None = None,
    ) -> None:
        super().__init__(frames, detector, clip, embedder)
        self.detector, self.clip, self.embedder, self.gate = detector, clip, embedder, gate
        self.descriptions = {} if descriptions is None else _read_descriptions(descriptions)
        self.rules = {
            **self.rules,
            "definition": "arXiv 2605.15199, without its judge",
            "gate": gate,
            "descriptions": hash_json(self.descriptions) if self.descriptions else "of the stories",
        }

    def measure_shot(self, shot: Shot, frames: np.ndarray, film: FilmInfo) -> dict[str, Sighting]:
        """Each listed character with a description."""
        texts = self._texts(film.story, shot)
        found: dict[str, list[tuple[float, Sighting]]] = {name: [] for name in texts}
        for index, assigned in self._search(texts, frames):
            for name, (box, similarity) in assigned.items():
                crop = frames[index, box[1] : box[3], box[0] : box[2]]
                share = 100 * crop.shape[0] * crop.shape[1] / (frames.shape[1] * frames.shape[2])
                rank = similarity * _sigmoid((sharpness(crop) - 100) / 200) * _sigmoid((share - 2) / 5)
                status: Literal["present", "weak"] = "present" if similarity >= self.gate else "weak"
                found[name].append((rank, Sighting(status=status, frame=index, box=box, similarity=similarity)))
        sightings = {
            name: max(of, key=lambda one: (one[1].status == "present", one[0]))[1] if of else Sighting()
            for name, of in found.items()
        }
        for name, one in sightings.items():
            if one.status == "present" and one.box is not None:
                crops = crop_boxes(frames[one.frame], [one.box])
                sightings[name] = replace(one, look=self.embedder.embed_images(crops)[0].double().numpy())
        return sightings

    def compute(self, measured: Sequence[dict[str, Sighting] | None], film: FilmInfo) -> Scores:
        story, described, incomplete = film.story, list(self._described(film.story)), unmeasured(measured, film)
        presence = tuple(_share_present(seen.values()) if seen else None for seen in measured)
        listed = [presence[shot.index] for shot in story.shots if set(shot.characters) & set(described)]
        looks = {
            name: [None if seen is None or name not in seen else seen[name].look for seen in measured]
            for name in described
        }
        pairs = {name: pairs_of(looks[name], shots) for name, shots in appearances(story, described).items()}
        every = [pair for of_one in pairs.values() for pair in of_one]
        gaps = {
            f"entity_gap_{name}": values_of(pair for pair in every if low <= pair[1] - pair[0] <= high)
            for name, (low, high) in GAPS.items()
        }
        characters = {
            name: _of_character(
                name, pairs.get(name, []), [seen[name] for seen in measured if seen and name in seen], incomplete
            )
            for name in described
        }
        compared = [characters[name] for name in pairs]
        same = mean_of_present([one["same"] for one in compared])
        apart = mean_of_present(list(_between_characters(looks)))
        columns = {
            "entity_presence": mean(listed),
            "entity_same": same,
            "entity_strict": mean([one["strict"] for one in compared]),
            **{name: mean_of_present(values) for name, values in gaps.items()},
            "entity_contrast": None if same is None or apart is None else same - apart,
        }
        lacking = [one["reason"] for one in compared if one["same"] is None]
        undescribed = [one.name for one in story.characters if one.name not in described]
        return Scores.of(
            dict.fromkeys(columns) if incomplete else columns,
            incomplete or "; ".join(lacking) or "no characters are present in such shots",
            _undefined(columns, described, story, pairs, gaps),
            shots={"entity_presence": presence},
            pairs={"entity_same": tuple(_of_shots(every))},
            marks=dict.fromkeys(("entity_same", "entity_contrast"), LEFT_OUT) if lacking and same is not None else {},
            details={
                "entities": characters | {name: {"reason": "no description"} for name in undescribed},
                "sightings": [
                    None if seen is None else {name: _plain(one) for name, one in seen.items()} for seen in measured
                ],
                "frames_of_shots": self.chosen_of_film(film),
            },
        )

    def finds_characters(self, story: Story) -> bool:
        """See :meth:`Metric.finds_characters`: those with a description."""
        return bool(self._described(story))

    def without_characters(self, shot: Shot, frames: np.ndarray, film: FilmInfo) -> np.ndarray:
        """See :meth:`Metric.without_characters`: each frame loses the boxes of the nearest frame that is searched."""
        found = dict(self._search(self._texts(film.story, shot), frames))
        if not found:  # the shot lists nobody
            return frames
        nearest = [min(found, key=lambda index: abs(index - frame)) for frame in range(len(frames))]
        return np.stack(
            [erased(f, [box for box, _ in found[at].values()]) for f, at in zip(frames, nearest, strict=True)]
        )

    def _described(self, story: Story) -> dict[str, str]:
        """Character -> description, for those that have one."""
        known = {one.name: one.description or "" for one in story.characters}
        added = self.descriptions.get(story.title, {})
        return {name: text for name, own in known.items() if (text := own or added.get(name, ""))}

    def _texts(self, story: Story, shot: Shot) -> dict[str, str]:
        """The descriptions of the characters in a shot."""
        known = self._described(story)
        return {name: known[name] for name in shot.characters if name in known}

    def _search(
        self, texts: Mapping[str, str], frames: np.ndarray
    ) -> Iterator[tuple[int, dict[str, tuple[Box, float]]]]:
        """For each searched frame, character -> its box and the cosine of crop and description."""
        if not texts:
            return
        wanted = self.clip.embed_texts(list(texts.values()))
        chosen = self.chosen(len(frames))
        images = as_images(frames[chosen])
        queries = [" ".join(text.split()[:_QUERY_WORDS]) for text in texts.values()]
        by_query = [self.detector.detect(images, query) for query in queries]
        for place, index in enumerate(chosen):
            boxes = distinct_boxes(torch.cat([found[place] for found in by_query]), frames.shape[1:3])
            fits = (wanted @ self.clip.embed_images(crop_boxes(frames[index], boxes)).T).double().numpy()
            rows, columns = linear_sum_assignment(fits, maximize=True)
            names = list(texts)
            yield index, {names[r]: (boxes[c], float(fits[r, c])) for r, c in zip(rows, columns, strict=True)}


def _sigmoid(value: float) -> float:
    return float(1 / (1 + np.exp(-value)))


# --- columns


def _read_descriptions(file: str) -> dict[str, dict[str, str]]:
    """Title -> name -> description. Raises ``FileError`` for another file."""
    path = Path(TypeAdapter(StoryPath).validate_python(file))
    rows = csv.DictReader(read_text(path).splitlines())
    if rows.fieldnames != ["story", "character", "description"]:
        raise FileError(f"{path}: expected the columns story,character,description")
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        found.setdefault(row["story"], {})[row["character"]] = row["description"]
    return found


def _share_present(sightings: Iterable[Sighting]) -> Value:
    return mean([float(one.status == "present") for one in sightings])


def _of_character(name: str, pairs: Sequence[Pair], seen: Sequence[Sighting], incomplete: str | None) -> dict[str, Any]:
    """Presence, same and strict of a character; a reason where it has no ``same``."""
    values = [] if incomplete else values_of(pairs)
    found: dict[str, Any] = {
        "presence": _share_present(seen),
        "same": mean_of_present(values),
        "strict": mean([value or 0.0 for value in values]),
    }
    if found["same"] is None:
        few = "present" if pairs else "listed"
        found["reason"] = incomplete or f"{name} is {few} in fewer than two shots"
    return found


def _between_characters(looks: Mapping[str, Sequence[np.ndarray | None]]) -> Iterator[float]:
    """Cosines between all crops of one character and all of another."""
    known = [[look for look in of_one if look is not None] for of_one in looks.values()]
    for one, other in combinations(known, 2):
        yield from (float(a @ b) for a in one for b in other)


def _of_shots(pairs: Sequence[Pair]) -> Iterator[Pair]:
    """For each pair of shots, the mean over the characters present in both."""
    found: dict[tuple[int, int], list[Value]] = {}
    for i, j, value in pairs:
        found.setdefault((i, j), []).append(value)
    yield from ((i, j, mean_of_present(values)) for (i, j), values in sorted(found.items()))


def _undefined(
    columns: Iterable[str], described: Sequence[str], story: Story, pairs: Mapping[str, Any], gaps: Mapping[str, Any]
) -> dict[str, str]:
    """Columns that the story cannot have, and why."""
    if not described:
        return dict.fromkeys(columns, "no character has a description")
    shown = {name for shot in story.shots for name in shot.characters} & set(described)
    reasons = {name: "no character is listed in shots so far apart" for name, values in gaps.items() if not values}
    if not shown:
        reasons["entity_presence"] = "no shot lists a character with a description"
    if not pairs:
        twice = "no character with a description is listed in two shots"
        reasons |= dict.fromkeys(("entity_same", "entity_strict"), twice)
    if len(shown) < 2 or not pairs:
        reasons["entity_contrast"] = "the story has no two characters to compare"
    return reasons


def _plain(one: Sighting) -> dict[str, Any]:
    return {name: value for name, value in vars(one).items() if name != "look" and value is not None}
