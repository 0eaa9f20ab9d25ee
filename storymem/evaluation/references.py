"""Do characters look like their reference images? After ViStoryBench (arXiv 2505.24862)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

from storymem.evaluation.crops import crop_boxes, distinct_boxes
from storymem.evaluation.metric import Column, FilmInfo, ImageEmbedder, InnerFramesMetric, Scores, mean, unmeasured
from storymem.media.images import read_image
from storymem.scorers.grounding import GroundingDetector
from storymem.scorers.scorer import as_images
from storymem.story import Shot, Story

_QUERY = "character"


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """Of a shot: each character's similarity to its references, the copy margins, and the match of counts in 0..100."""

    similarity: dict[str, float]
    margins: dict[str, float]
    count: float


class References(InnerFramesMetric):
    """Characters compared with their reference images; for stories that have some.

    - reference similarity (CIDS cross): in each frame, characters are assigned boxes of the query "character" so that
      the sum of cosines is highest, a box's cosine being the highest to any reference of the character; a character
      without a box has 0. Mean over frames, characters and shots.
    - count of characters (OCCM): 100 exp(-|D - E| / (1e-6 + E)) for D boxes and E listed characters; mean over frames.
    - copy margin: cosine to the first reference, minus the mean cosine to the other ones of the character. If only the
      first was given to the system, a high margin means that it was pasted.

    Only characters with references count; OCCM leaves out shots that list others too. ViStoryBench compares faces of
    real people by face networks; here all are compared by ``embedder``.

    Args:
        detector: of boxes.
        embedder: of crops; CLIP ViT-L/14 as published.
        frames: how many of each shot, evenly spaced, without the first and the last.
    """

    columns = (
        Column("reference_similarity", "Likeness to reference images", "References", consistency=True),
        Column("reference_count", "As many characters as listed (0 to 100)", "Count"),
        Column("reference_copy_margin", "Likeness to the first reference minus others", "Copy margin"),
    )

    def __init__(self, detector: GroundingDetector, embedder: ImageEmbedder, *, frames: int = 5) -> None:
        super().__init__(frames, detector, embedder)
        self.detector, self.embedder = detector, embedder
        self.rules = {**self.rules, "definition": "arXiv 2505.24862", "query": _QUERY}
        self._images: dict[Path, np.ndarray] = {}  # reference -> its embedding [D]

    def measure_shot(self, shot: Shot, frames: np.ndarray, film: FilmInfo) -> _Compared | None:
        """A shot's comparison; None if it lists no character with references."""
        known = {one.name: one.references for one in film.story.characters if one.references}
        names = [name for name in shot.characters if name in known]
        if not names:
            return None
        references = {name: np.stack([self._embedded(path) for path in known[name]]) for name in names}
        chosen = frames[self.chosen(len(frames))]
        values: dict[str, list[float]] = {name: [] for name in names}
        margins: dict[str, list[float]] = {name: [] for name in names}
        counts = []
        for frame, found in zip(chosen, self.detector.detect(as_images(chosen), _QUERY), strict=True):
            boxes = distinct_boxes(found, frame.shape[:2])
            counts.append(100 * float(np.exp(-abs(len(boxes) - len(shot.characters)) / (1e-6 + len(shot.characters)))))
            crops = self.embedder.embed_images(crop_boxes(frame, boxes)).double().numpy()
            cosines = {name: of_one @ crops.T for name, of_one in references.items()}
            best = np.stack([cosines[name].max(axis=0) for name in names])
            assigned = dict(zip(*linear_sum_assignment(best, maximize=True), strict=True))
            for row, name in enumerate(names):
                values[name].append(float(best[row, assigned[row]]) if row in assigned else 0.0)
                if row in assigned and len(cosines[name]) > 1:
                    given, *others = cosines[name][:, assigned[row]]
                    margins[name].append(float(given - np.mean(others)))
        return _Compared(
            similarity={name: float(np.mean(of)) for name, of in values.items()},
            margins={name: float(np.mean(of)) for name, of in margins.items() if of},
            count=float(np.mean(counts)),
        )

    def compute(self, measured: Sequence[_Compared | None], film: FilmInfo) -> Scores:
        story = film.story
        listing = [shot.index for shot in story.shots if _known(story) & set(shot.characters)]
        only = [index for index in listing if set(story.shots[index].characters) <= _known(story)]
        several = {one.name for one in story.characters if len(one.references) > 1}
        similarity = tuple(None if one is None else mean(list(one.similarity.values())) for one in measured)
        counts = tuple(None if one is None or i not in only else one.count for i, one in enumerate(measured))
        margins = [value for one in measured if one is not None for value in one.margins.values()]
        incomplete = unmeasured([measured[index] for index in listing], film)
        columns = {
            "reference_similarity": mean([similarity[index] for index in listing]),
            "reference_count": mean([counts[index] for index in only]),
            "reference_copy_margin": mean(margins) if incomplete is None else None,
        }
        undefined = {}
        if not listing:
            undefined = dict.fromkeys(columns, "no character in a shot has reference images")
        elif not only:
            undefined["reference_count"] = "every shot lists a character without reference images"
        if listing and not any(several & set(shot.characters) for shot in story.shots):
            undefined["reference_copy_margin"] = "no character has two reference images"
        return Scores.of(
            columns,
            incomplete or "no box was found in any frame",
            undefined,
            shots={"reference_similarity": similarity, "reference_count": counts},
            details={"frames_of_shots": self.chosen_of_film(film)},
        )

    def _embedded(self, path: Path) -> np.ndarray:
        """Embedding [D] of the most certain box of a reference image; of the whole image if none is found."""
        if path not in self._images:
            image = read_image(path)
            (found,) = self.detector.detect(as_images(image[None]), _QUERY)
            box = next(iter(distinct_boxes(found, image.shape[:2])), (0, 0, image.shape[1], image.shape[0]))
            self._images[path] = self.embedder.embed_images(crop_boxes(image, [box]))[0].double().numpy()
        return self._images[path]


def _known(story: Story) -> set[str]:
    return {one.name for one in story.characters if one.references}
