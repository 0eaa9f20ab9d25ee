"""The storyboard: a film as a page, with the text, the recalled and the new keyframes of every shot."""

from __future__ import annotations

from itertools import groupby

from jinja2 import Environment, PackageLoader, StrictUndefined

from storymem.film.folder import Film
from storymem.film.manifest import scripts
from storymem.film.matching import stale
from storymem.film.reasons import origin, summary
from storymem.memory.bank import read_entries

_MODES = {
    "t2v": "text to video",
    "i2v": "image to video, from an image made for the shot",
    "m2v": "memory to video",
    "mi2v": "memory to video, from the last frame of the previous shot",
    "mm2v": "memory to video, from the last five frames of the previous shot",
}


def storyboard(film: Film) -> str:
    """The page ``storyboard.html``; it opens from disk and refers to files of the film's folder."""
    templates = Environment(
        loader=PackageLoader("storymem.film", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    shots = [
        {"place": place, "scene": script.scene, "prompt": script.content["prompt"], "take": film.take_of(place - 1)}
        | {"takes": len(film.takes_of(place - 1))}
        for place, script in enumerate(scripts(film.story), start=1)
    ]
    scenes = [(scene, list(inside)) for scene, inside in groupby(shots, key=lambda shot: shot["scene"])]
    entries = read_entries(film.folder)
    old = stale(film, entries) if film.has_memory else {}
    memory = [
        (f"{number}. {entry.id}", entry.image, [origin(entry), *["pinned"] * entry.pinned])
        for number, entry in enumerate(entries, start=1)
    ]
    return templates.get_template("storyboard.html.j2").render(
        story=film.story,
        scenes=scenes,
        modes=_MODES,
        has_film=bool(film.shots),
        stale=old,
        memory=memory,
        summary=summary,
    )
