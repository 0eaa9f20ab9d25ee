"""Shots of training stories as video files with captions, from which `storymem prepare` makes a training set.

python -m toyworld.clips FOLDER --stories 200 [--masks FOLDER] [--scenes FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from storymem.io import replacing, write_text
from storymem.media.video import write_video
from toyworld.attributes import FPS
from toyworld.stories import overview
from toyworld.world import HELD_OUT, ToyShot, people_mask, render_layers, story

CRF = 4  # nearly without loss: colours must stay readable


def write_clips(folder: Path, stories: range, *, masks: Path | None = None) -> int:
    """Write all shots of the stories with these seeds as `000123_ada/01.mp4`, each with its prompt in a `.txt`.

    A clip is 17 frames of 96x64 at 8 a second. Clips that are there already are left alone. Characters keep their looks
    within a story only, so a folder holds the shots of a story in which the same characters appear.

    Args:
        folder: of the clips.
        stories: their seeds.
        masks: a folder for a mask of each clip, of the same path: white where people are.

    Returns:
        how many clips were written now.

    Raises:
        ValueError: for stories that are held out for measuring.
    """
    if stories and not 0 <= min(stories) <= max(stories) < HELD_OUT:
        raise ValueError(
            f"clips are for training, so stories have seeds from 0 to {HELD_OUT - 1}; asked for are "
            f"{min(stories)} to {max(stories)}"
        )
    written = 0
    for seed in stories:
        for number, shot in enumerate(story(seed).shots, start=1):
            name = _folder(seed, shot) / f"{number:02d}.mp4"
            if masks is not None and not (masks / name).exists():
                mask = people_mask(*render_layers(shot, slice(None)))
                _write(masks / name, np.repeat(255 * mask[..., None].astype(np.uint8), 3, axis=-1))
            if not (folder / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                write_text((folder / name).with_suffix(".txt"), f"{shot.prompt}\n")
                _write(folder / name, shot.frames)  # last: a clip never lacks its caption
                written += 1
    return written


def write_scenes(path: Path, stories: range) -> None:
    """Write what the shots of each folder have in common, for `objective.scenes` of a training: who and where.

    A line is `{"folder": "000045_eli", "caption": "Eli on the moon."}`, in the words of a toy story's overview.
    """
    lines = []
    for seed in stories:
        shots: dict[str, list[ToyShot]] = {}
        for shot in story(seed).shots:
            shots.setdefault(str(_folder(seed, shot)), []).append(shot)
        lines += [json.dumps({"folder": folder, "caption": overview(of)}) + "\n" for folder, of in shots.items()]
    write_text(path, "".join(lines))


def _folder(seed: int, shot: ToyShot) -> Path:
    names = sorted(character.name.lower() for character in shot.cast)
    return Path("_".join([f"{seed:06d}", *names]))


def _write(path: Path, frames: npt.NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        write_video(partial, frames, FPS, crf=CRF)


def main() -> None:
    """Parse the command line and write the clips."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the clips; those that exist are left alone")
    parser.add_argument("--stories", type=int, default=400, help="how many training stories, of eight clips each")
    parser.add_argument("--masks", type=Path, help="a folder for masks of where the characters are")
    parser.add_argument("--scenes", type=Path, help="a file for the text of each folder's scene")
    args = parser.parse_args()
    if args.scenes is not None:
        write_scenes(args.scenes, range(args.stories))
    print(f"{write_clips(args.folder, range(args.stories), masks=args.masks)} clips written")


if __name__ == "__main__":
    main()
