"""The storyboard: a film as a page, with the text, the recalled and the new keyframes of every shot."""

from __future__ import annotations

from itertools import groupby

from jinja2 import Environment, PackageLoader, StrictUndefined

from storymem.film.folder import Film

_MODES = {
    "t2v": "text to video",
    "m2v": "memory to video",
    "mi2v": "memory to video, from the last frame of the previous shot",
    "mm2v": "memory to video, from the last five frames of the previous shot",
}


def storyboard(film: Film) -> str:
    """The page ``storyboard.html``; it opens from disk and refers to files of the film's folder."""
    templates = Environment(
        loader=PackageLoader("storymem.film", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    scenes = [(scene, list(shots)) for scene, shots in groupby(film.shots, key=lambda shot: shot.scene)]
    return templates.get_template("storyboard.html.j2").render(story=film.story, scenes=scenes, modes=_MODES)
