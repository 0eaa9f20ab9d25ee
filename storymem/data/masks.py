"""Masks: videos beside the clips, light where the subject is, so that the loss can count it more than the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from storymem.data.clips import Clip, read_clip, video_times
from storymem.data.video_folder import find_videos

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
            own, wanted = video_times(self.folder / mask), video_times(self.videos / clip.video)
        except ValueError as error:
            raise ValueError(f"mask: {error}") from error
        if abs(own.width * wanted.height / (own.height * wanted.width) - 1) > _ASPECT_ERROR:
            sizes = f"it is {own.width}x{own.height}, and its video {wanted.width}x{wanted.height}"
            raise ValueError(f"mask: {sizes}")
        return frames.mean(axis=-1, dtype=np.float32) / 255


def find_masks(folder: Path, videos: Sequence[str], source: Path) -> Masks:
    """The masks that lie in ``folder`` as ``videos`` lie in ``source``: of the same path and name, with any ending.

    Raises:
        ValueError: if there are none, or one belongs to no video or to several.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: masks= names a folder that holds masks as videos= holds videos")
    exact, by_stem = set(videos), defaultdict[str, list[str]](list)
    for video in videos:
        by_stem[_stem(video)].append(video)
    of = {mask: [mask] if mask in exact else by_stem.get(_stem(mask), []) for mask in find_videos(folder)}
    if strangers := [mask for mask, found in of.items() if not found]:
        raise ValueError(
            f"{folder} holds {len(strangers)} masks that belong to no video in {source}, {strangers[0]} the first of "
            "them: a mask has the path and name of its video"
        )
    files: dict[str, str] = {}
    for mask, found in of.items():
        if len(found) > 1:
            raise ValueError(f"{folder / mask} belongs to {found[0]} and {found[1]}: give it the ending of its video")
        if found[0] in files:
            raise ValueError(f"{folder / mask} and {files[found[0]]} belong to {found[0]}: remove one of them")
        files[found[0]] = mask
    return Masks(folder=folder, videos=source, files=files)


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))
