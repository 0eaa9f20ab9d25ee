"""Which mask belongs to which video, and that both are read the same way."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from storymem.data.clips import Clip, read_mask
from storymem.data.settings import Bucket
from storymem.data.videos import VideoFolder, find_masks
from storymem.wan.conditioning import latent_mask
from tests.data.drawn_clips import FRAMES, scene, video
from tests.encoding import encode, turned


def masks_of(folder: Path, videos: list[str], masks: list[str]) -> dict[str, str]:
    content = video(folder / "any.mp4", scene(0, 2)).read_bytes()
    for name in [*(f"videos/{one}" for one in videos), *(f"masks/{one}" for one in masks)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    found = VideoFolder(path=folder / "videos", videos=sorted(videos), texts=[], ignored={})
    masks_found = find_masks(folder / "masks", found)
    return {video: mask.relative_to(folder / "masks").as_posix() for video, mask in masks_found.items()}


def test_a_mask_may_have_another_ending_if_that_is_clear(tmp_path: Path) -> None:
    videos = ["a.mp4", "b/a.mp4", "c.mp4", "c.mov"]
    assert masks_of(tmp_path, videos, ["a.mkv", "b/a.mp4", "c.mov"]) == {
        "a.mp4": "a.mkv",
        "b/a.mp4": "b/a.mp4",
        "c.mov": "c.mov",
    }


@pytest.mark.parametrize(
    ("videos", "masks", "message"),
    [
        (["a.mp4", "a.mov"], ["a.mkv"], "a.mkv belongs to a.mov and a.mp4: give it the suffix of its video"),
        (["a.mp4"], ["a.mkv", "a.mov"], "a.mov and a.mkv belong to a.mp4: remove one of them"),
        (["a.mp4"], ["a.mp4", "b.mp4"], "1 masks that belong to no video"),
    ],
)
def test_a_mask_of_two_videos_or_two_of_one_are_refused(
    tmp_path: Path, videos: list[str], masks: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        masks_of(tmp_path, videos, masks)


def test_a_turned_mask_lies_on_its_turned_video(tmp_path: Path) -> None:
    bright = np.zeros((FRAMES + 3, 32, 48, 3), np.uint8)
    bright[:, :16] = 255  # above as stored, at the right as shown
    for folder in ("videos", "masks"):
        os.mkdir(tmp_path / folder)
        turned(encode(tmp_path / folder / "a.mp4", bright), 0, 1, -1, 0)
    clip = Clip(id="a", video="a.mp4", start=0, fps=8, bucket=Bucket(frames=FRAMES, height=48, width=32))
    mask = read_mask(tmp_path / "masks" / "a.mp4", tmp_path / "videos" / "a.mp4", clip)
    assert mask.shape == (FRAMES, 48, 32)
    assert mask[:, :, 20:].min() > 0.9
    assert mask[:, :, :12].max() < 0.1


def test_a_mask_of_pixels_reaches_the_latents_that_show_them() -> None:
    mask = torch.zeros(17, 16, 24)
    mask[0, 0, 0] = 1.0  # the first frame has a latent frame of its own
    mask[4, 15, 23] = 0.5  # the last of the second latent frame's four
    mask[5, 7, 8] = 1.0  # the first of the third's
    expected = torch.zeros(5, 2, 3)
    expected[0, 0, 0], expected[1, 1, 2], expected[2, 0, 1] = 1.0, 0.5, 1.0
    assert torch.equal(latent_mask(mask), expected)
