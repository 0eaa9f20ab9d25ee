"""The storyboard page: every file that it names exists, and what a person wrote cannot break it."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

from storymem.film.storyboard import PAGE
from tests.stories import FOUR_SHOTS, story, storyteller


def test_a_finished_film_has_a_page_that_refers_to_its_own_files(tmp_path: Path) -> None:
    text = FOUR_SHOTS.replace("A cat sits on a wall.", "A cat says 'hi' <b>& sits</b>.")
    film = storyteller("mi2v").tell(story(tmp_path, text), tmp_path / "film")
    page = (film.folder / PAGE).read_text(encoding="utf-8")
    sources = [unescape(source) for source in re.findall(r"src='([^']*)'", page)]
    assert all((film.folder / source).is_file() for source in sources)
    assert {shot.file for shot in film.shots} | {"film.mp4"} <= set(sources)
    for shot in film.shots:
        assert all(f"keyframes/{id}.png" in sources for id in shot.memory)
    assert "<b>" not in page
    assert "A cat says 'hi' <b>& sits</b>." in unescape(page)
    assert page.count("<section class=shot>") == len(film.shots)
