"""``film.mp4``: the chosen takes one after the other, and a card for every shot that has none yet."""

from __future__ import annotations

import logging
import textwrap
from collections import Counter
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from storymem.film.manifest import VIDEO, Manifest, Take, scripts
from storymem.io import hash_file
from storymem.media.images import fit_image
from storymem.media.video import VideoInfo, iter_frames, join_videos, probe

logger = logging.getLogger(__name__)

_CARD_SECONDS = 2.0  # of a shot whose length neither the story nor the settings give


def join_film(film: Manifest, folder: Path, joined: Path) -> None:
    """Write the film in ``folder`` to ``joined``; at least one shot must have a take.

    Takes of another size or rate, put there by the user, are fitted to the others. A video that is lost is a card too,
    until its shot gets another take.
    """
    takes = {take.index: take for take in film.shots if _is_playable(take, folder / take.file)}
    own = [take for take in takes.values() if not take.is_replaced] or [*takes.values()]
    like = probe(folder / own[0].file)
    parts = [
        _card(film, index, like) if (take := takes.get(index)) is None else _part(take, folder / take.file, like)
        for index in range(len(film.slots))
    ]
    for note in join_videos(parts, joined, like.fps):
        logger.warning(note.replace(joined.name, VIDEO))


def _is_playable(take: Take, path: Path) -> bool:
    try:
        return path.is_file() and (hash_file(path) == take.sha256.get(take.file) or any(1 for _ in iter_frames(path)))
    except ValueError:
        return False


def _part(take: Take, path: Path, like: VideoInfo) -> Path | Iterator[np.ndarray]:
    """A take's video; of one that the user put there or that differs from the others, its frames.

    Even one that fits is encoded again: packets of a damaged file can decode alone and fail after those of another.
    """
    info = probe(path)
    fits = (info.height, info.width) == (like.height, like.width) and abs(info.fps - like.fps) < 0.01 * like.fps
    if fits and not take.is_replaced:
        return path
    if not fits:
        was, now = (f"{one.width}x{one.height} at {one.fps:g} frames per second" for one in (info, like))
        logger.warning(f"{path} is {was}: fitted to {now} for {VIDEO}")
    if info.sound:
        logger.warning(f"{path} has sound, which is left out of {VIDEO}")
    return _fitted(path, info, like)


def _fitted(path: Path, info: VideoInfo, like: VideoInfo) -> Iterator[np.ndarray]:
    """The frames of a video at the size and rate of another, each the one that is shown at its time."""
    total = max(1, round((info.times[-1] + 1 / info.fps) * like.fps)) if info.fps else 1
    shown = np.searchsorted(info.times, np.arange(total) / like.fps + 1e-6, side="right") - 1
    times_shown = Counter(shown.tolist())
    for number, frame in enumerate(iter_frames(path)):
        yield from repeat(fit_image(frame, like.height, like.width, "contain"), times_shown[number])


def _card(film: Manifest, index: int, like: VideoInfo) -> Iterator[np.ndarray]:
    """Frames for a shot that is not made yet, of its length, with its number and text."""
    content = scripts(film.story)[index].content
    frames = content.get("frames") or film.config.get("model", {}).get("video", {}).get("frames")
    length = frames if isinstance(frames, int) and 0 < frames < 10**4 else round(_CARD_SECONDS * like.fps)
    return repeat(title_card(f"Shot {index + 1}", content["prompt"], like.height, like.width), length)


def title_card(title: str, text: str, height: int, width: int) -> np.ndarray:
    """A dark image with a title and a text below it, uint8 [height, width, 3]."""
    image = Image.new("RGB", (width, height), (24, 24, 28))
    draw, margin, size = ImageDraw.Draw(image), width // 12, max(6, height // 16)
    large, small = (ImageFont.load_default(size * scale) for scale in (1.6, 1.0))
    draw.text((margin, height // 4), title, font=large, fill=(235, 235, 235))
    columns = max(8, int((width - 2 * margin) / max(1.0, small.getlength("n"))))
    lines = textwrap.wrap(text, columns, max_lines=max(1, int(height / size * 0.35)), placeholder=" ...")
    draw.multiline_text((margin, height // 4 + 3 * size), "\n".join(lines), font=small, fill=(170, 170, 175))
    return np.asarray(image)
