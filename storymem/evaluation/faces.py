"""Are the faces of a character in different shots one person's? For films of real people."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from storymem.evaluation.metric import (
    Column,
    FilmInfo,
    InnerFramesMetric,
    Pair,
    Scores,
    appearances,
    mean,
    unmeasured,
    values_of,
)
from storymem.scorers.faces import SAME_PERSON, FaceScorer
from storymem.story import Shot


class Faces(InnerFramesMetric):
    """Faces of the same character in different shots, by OpenCV's YuNet and SFace.

    Of each shot counts the frame with the most faces, up to the number of listed characters; of equal ones the frame
    whose faces are found most surely. For each pair of shots that list a common character, the value is the highest
    cosine between a face of one and a face of the other: whose face is whose is not known, so a shot with several
    characters makes it higher. Pairs with a shot without a face have no value; how many shots show one has its own
    column. Ours; not part of the paper.

    Args:
        scorer: of faces.
        frames: how many of each shot, evenly spaced, without the first and the last.
        same: lowest cosine of one person's faces; 0.363 is OpenCV's.
    """

    columns = (
        Column("face_presence", "Shots of characters that show a face", "Faces"),
        Column("face_similarity", "Similarity of faces across shots", "Face sim.", consistency=True),
        Column("face_same", "Pairs of shots with the same face", "Same face", consistency=True),
    )

    def __init__(self, scorer: FaceScorer, *, frames: int = 5, same: float = SAME_PERSON) -> None:
        super().__init__(frames, scorer)
        self.scorer, self.same = scorer, same
        self.rules = {
            **self.rules,
            "same_from": same,
            "score": getattr(scorer, "score", None),
            "weights_sha256": getattr(scorer, "sha256", None),
        }

    def measure_shot(self, shot: Shot, frames: np.ndarray, film: FilmInfo) -> np.ndarray:
        """Embeddings [K, D] of the shot's faces; K is 0 if it lists no character or shows no face."""
        found = []
        for index in self.chosen(len(frames)) if shot.characters else ():
            faces, scores = (part[: len(shot.characters)] for part in self.scorer.embed_faces(frames[index]))
            found.append((len(faces), float(scores.sum()), faces))
        return max(found, key=lambda one: one[:2])[2] if found else np.zeros((0, 1))

    def compute(self, measured: Sequence[np.ndarray | None], film: FilmInfo) -> Scores:
        listing = [shot.index for shot in film.story.shots if shot.characters]
        shown = tuple(
            None if faces is None or not shot.characters else float(len(faces) > 0)
            for faces, shot in zip(measured, film.story.shots, strict=True)
        )
        shared = sorted({pair for shots in appearances(film.story).values() for pair in combinations(shots, 2)})
        pairs: list[Pair] = []
        for i, j in shared:
            both = [faces for faces in (measured[i], measured[j]) if faces is not None and len(faces)]
            pairs.append((i, j, float((both[0] @ both[1].T).max()) if len(both) == 2 else None))
        incomplete = unmeasured(measured, film)
        known = [] if incomplete else [value for value in values_of(pairs) if value is not None]
        columns = {
            "face_presence": mean([shown[index] for index in listing]),
            "face_similarity": mean(known),
            "face_same": mean([float(value >= self.same) for value in known]),
        }
        undefined = {} if listing else {"face_presence": "no shot lists a character"}
        if not shared:
            undefined |= dict.fromkeys(("face_similarity", "face_same"), "no character is listed in two shots")
        return Scores.of(
            columns,
            incomplete or "no two shots of a character show a face",
            undefined,
            shots={"face_presence": shown},
            pairs={"face_similarity": tuple(pairs)},
            details={"frames_of_shots": self.chosen_of_film(film)},
        )
