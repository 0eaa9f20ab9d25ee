"""Where keyframes are in a film, as learned recall and Memento count: in generated frames, from 0."""

from __future__ import annotations

from collections.abc import Sequence

from storymem.film.folder import Film
from storymem.memory import Keyframe


def film_starts(film: Film, lengths: Sequence[int]) -> list[int]:
    """The place of each shot's first frame, with all shots end to end as they were generated.

    Frames that repeat the end of the shot before count, although the film does not show them. ``lengths`` are for
    shots that have no take.
    """
    starts = [0]
    for index, length in enumerate(lengths):
        take = film.take_of(index)
        starts.append(starts[-1] + (length if take is None else take.frames + take.repeated))
    return starts[:-1]


def film_frames(keyframes: Sequence[Keyframe], film: Film, starts: Sequence[int]) -> list[int]:
    """The place of each keyframe; of an image that is no frame, that of the shot it was added for, or 0."""
    places = []
    for keyframe in keyframes:
        place = 0 if keyframe.shot is None else starts[keyframe.shot - 1]
        if keyframe.shot is not None and keyframe.frame is not None:
            take = film.take_of(keyframe.shot - 1)
            place += keyframe.frame - 1 + (0 if take is None else take.repeated)
        places.append(place)
    return places
