"""A film's folder as a page: every shot with its text, what it looked back at, and what it left in memory."""

from __future__ import annotations

from html import escape
from pathlib import Path
from urllib.parse import quote

from storymem.film.folder import Film, Say, ShotRecord
from storymem.film.manifest import PAGE
from storymem.io import write_text

_MODES = {
    "t2v": "from text alone",
    "m2v": "memory to video",
    "mi2v": "memory to video, going on from the last frame",
    "mm2v": "memory to video, going on from the last five frames",
}
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
header p, .how, figcaption { color: var(--soft); }
.shot { display: grid; grid-template-columns: minmax(16rem, 2fr) 3fr; gap: 1.5rem; padding: 1.5rem 0;
        border-top: 1px solid var(--line); }
h2 { font-size: 1rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0; }
video { width: 100%; border-radius: .4rem; background: #000; image-rendering: auto; }
.strip { display: flex; flex-wrap: wrap; gap: .5rem; align-items: end; }
header video { max-width: 40rem; }
figure { margin: 0; } figure img { height: 4rem; border-radius: .3rem; display: block; }
figcaption, .how { font-size: .8rem; }
h4 { font-size: .8rem; margin: .8rem 0 .2rem; }
@media (max-width: 45rem) { .shot { grid-template-columns: 1fr; } }
"""


def write_storyboard(film: Film, say: Say = lambda line: None) -> Path:
    """Write ``storyboard.html`` into the film's folder; it opens from disk and refers to the folder's own files.

    A page that a person changed is kept under another name, of which ``say`` is told.
    """
    path = film.folder / f".{PAGE}.partial"
    write_text(path, _page(film))
    film.put(PAGE, path, say)
    return film.folder / PAGE


def _page(film: Film) -> str:
    told = film.story
    parts = [
        "<!doctype html>",
        f"<html lang=en><meta charset=utf-8><title>{escape(told['title'])}</title>",
        "<meta name=viewport content='width=device-width'>",
        f"<style>{_STYLE}</style>",
        f"<header><h1>{escape(told['title'])}</h1><p>{escape(told.get('overview', ''))}</p>",
        f"<video controls src='{quote(film.video.name)}'></video>" if film.video else "",
        "</header>",
    ]
    scene = None
    for shot in film.shots:
        if shot.scene != scene:
            scene = shot.scene
            parts.append(f"<h2>Scene {scene}</h2>")
        parts.append(_shot(shot))
    return "\n".join(parts)


def _shot(shot: ShotRecord) -> str:
    how = f"{_MODES[shot.mode]} · {shot.frames} frames · seed {shot.seed} · {sum(shot.seconds.values()):.1f} s"
    kept = [(keyframe.id, _verdict(keyframe.quality, keyframe.similarity)) for keyframe in shot.keyframes]
    return "\n".join(
        [
            "<section class=shot>",
            f"<video controls loop muted preload=metadata src='{quote(shot.file)}'></video>",
            f"<div><h3>Shot {shot.index + 1}</h3><p>{escape(shot.prompt)}</p><p class=how>{how}</p>",
            _strip("Looked back at", [(id, "") for id in shot.memory]),
            _strip("Left in memory", kept),
            "</div></section>",
        ]
    )


def _verdict(quality: float | None, similarity: float | None) -> str:
    said = [] if quality is None else [f"quality {quality:.2f}"]
    return ", ".join(said + ([] if similarity is None else [f"similarity {similarity:.2f}"]))


def _strip(title: str, pictures: list[tuple[str, str]]) -> str:
    if not pictures:
        return f"<h4>{title}</h4><p class=how>nothing</p>"
    figures = "".join(
        f"<figure><img loading=lazy src='keyframes/{quote(id)}.png' alt='{escape(id)}'>"
        f"<figcaption>{escape(id)}{'<br>' + escape(said) if said else ''}</figcaption></figure>"
        for id, said in pictures
    )
    return f"<h4>{title}</h4><div class=strip>{figures}</div>"
