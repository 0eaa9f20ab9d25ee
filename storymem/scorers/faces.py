"""Faces by OpenCV: YuNet finds them, SFace embeds them. Needs ``pip install 'storymem[faces]'``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np

from storymem.io import FileError, hash_file
from storymem.scorers.scorer import Origin
from storymem.weights import Weights, locate

SAME_PERSON = 0.363
"""OpenCV's cosine of SFace embeddings from which two faces are one person's."""


class FaceScorer:
    """Embeddings of faces.

    Args:
        detector, recogniser: ONNX files of YuNet and SFace.
        score: lowest score of a face.

    Raises:
        ValueError: without OpenCV.
        FileError: for files that are not these networks.
    """

    origin: Origin = "own"

    def __init__(self, detector: Path, recogniser: Path, *, score: float = 0.9) -> None:
        try:
            import cv2
        except ImportError:
            raise ValueError(
                "metrics=faces needs a package that is not installed: pip install 'storymem[faces]'"
            ) from None
        self.score = score
        self.sha256 = [hash_file(path) for path in (detector, recogniser)]
        try:
            self._detector = cv2.FaceDetectorYN.create(str(detector), "", (320, 320), score)
            self._recogniser = cv2.FaceRecognizerSF.create(str(recogniser), "")
        except cv2.error as error:
            raise FileError(f"{detector} or {recogniser} is not a network that OpenCV reads: {error}") from None

    @staticmethod
    def required_weights(
        detector: str = "opencv/face_detection_yunet", recogniser: str = "opencv/face_recognition_sface", **_: Any
    ) -> list[Weights]:
        """What :meth:`from_pretrained` loads."""
        yunet, sface = "face_detection_yunet_2023mar.onnx", "face_recognition_sface_2021dec.onnx"
        return [
            Weights(name="YuNet", source=detector, file=yunet, size_gb=0.00023, licence="MIT"),
            Weights(name="SFace", source=recogniser, file=sface, size_gb=0.0387, licence="Apache-2.0"),
        ]

    @classmethod
    def from_pretrained(
        cls,
        detector: str = "opencv/face_detection_yunet",
        recogniser: str = "opencv/face_recognition_sface",
        *,
        score: float = 0.9,
    ) -> Self:
        """Load published weights; each source is a hub repository, a folder or a file."""
        scorer = cls(*(locate(weights) for weights in cls.required_weights(detector, recogniser)), score=score)
        scorer.origin = "published"
        return scorer

    def embed_faces(self, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The faces in a frame uint8 [H, W, 3], the most certain first.

        Returns:
            embeddings float64 [K, 128] of unit length, and scores [K]; K may be 0.
        """
        bgr = np.ascontiguousarray(frame[:, :, ::-1])
        self._detector.setInputSize((frame.shape[1], frame.shape[0]))
        _, faces = self._detector.detect(bgr)
        if faces is None:
            return np.zeros((0, 128)), np.zeros(0)
        faces = faces[np.argsort(-faces[:, -1], kind="stable")]
        rows = [self._recogniser.feature(self._recogniser.alignCrop(bgr, face))[0].astype(np.float64) for face in faces]
        return np.stack([row / np.linalg.norm(row) for row in rows]), faces[:, -1].astype(np.float64)
