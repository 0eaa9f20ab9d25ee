"""Masks: videos beside the clips, light where the subject is, so that the loss can count it more than the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from storymem.training.clips import Clip, find_videos, picture_size, read_clip

_ASPECT_ERROR = 0.02  # sizes are whole pixels


@dataclass(frozen=True, kw_only=True)
class Masks:
    """The masks of a training set.

    Args:
        folder: in which they lie.
        videos: the folder of the videos.
        files: video -> its mask, as paths below the two folders; a video may have none.
    """

    folder: Path
    videos: Path
    files: Mapping[str, str]

    def path(self, video: str) -> Path | None:
        """The mask of a video, if it has one."""
        return self.folder / self.files[video] if video in self.files else None

    def read(self, clip: Clip) -> np.ndarray:
        """The mask of a clip of a video that has one: float32 [F, H, W] in 0..1, the brightness of its frames.

        Raises:
            ValueError: if the mask is broken, ends before the clip, or is not of the video's shape.
        """
        mask = self.files[clip.video]
        try:
            frames = read_clip(self.folder, replace(clip, video=mask))
        except ValueError as error:
            raise ValueError(f"mask: {error}") from error
        height, width = picture_size(self.folder / mask)
        wanted = picture_size(self.videos / clip.video)
        if abs(width * wanted[0] / (height * wanted[1]) - 1) > _ASPECT_ERROR:
            raise ValueError(f"mask: it is {width}x{height}, and its video {wanted[1]}x{wanted[0]}")
        return frames.mean(axis=-1, dtype=np.float32) / 255


def find_masks(folder: Path, videos: Sequence[str], source: Path) -> Masks:
    """The masks that lie in ``folder`` as ``videos`` lie in ``source``: of the same path and name, with any ending.

    Raises:
        ValueError: if there are none, or one belongs to no video.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: masks= names a folder that holds masks as videos= holds videos")
    of = {_stem(video): video for video in videos}
    found = {mask: of.get(_stem(mask)) for mask in find_videos(folder)}
    strangers = [mask for mask, video in found.items() if video is None]
    if strangers:
        raise ValueError(
            f"{folder} holds {len(strangers)} masks that belong to no video in {source}, {strangers[0]} the first of "
            "them: a mask has the path and name of its video"
        )
    return Masks(folder=folder, videos=source, files={video: mask for mask, video in found.items() if video})


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))
