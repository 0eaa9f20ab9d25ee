"""What is shown while a film is made."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from storymem.film.folder import Film
from storymem.film.manifest import Take
from storymem.film.progress import Progress, duration
from storymem.film.tables import film_table, format_table
from storymem.memory.bank import KeyframeRecord
from storymem.story import Shot


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shot(index: int) -> Shot:
    return Shot(prompt="A dog.", cut=True, scene=2, number=index + 1, index=index)


def record(index: int, keyframes: int = 2, memory: int = 3) -> Take:
    kept = tuple(KeyframeRecord(id=f"k{k}", frame=4 * k, quality=None, similarity=None) for k in range(keyframes))
    return Take(
        shot=index + 1,
        scene=2,
        number=index + 1,
        folder=f"02_{index + 1:02d}",
        take=1,
        script={"prompt": "A dog."},
        mode="mi2v",
        seed=0,
        frames=16,
        repeated=1,
        file=f"shots/02_{index}.mp4",
        memory=tuple(f"m{k}" for k in range(memory)),
        keyframes=kept,
        config_hash="0",
        seconds={"generate": 10.0, "save": 2.5},
    )


def make(progress: Progress, *, finished: int, total: int = 3) -> None:
    with progress.film(total=total, finished=finished, making=total - finished):
        for index in range(finished, total):
            progress.begin_shot(shot(index))
            for step in range(1, 5):
                progress.step(step, 4)
            logging.getLogger("storymem.film").warning("a note")
            progress.end_shot(record(index))


def test_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    make(Progress(stream=stream), finished=1)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "1 of 3 shots are finished already"
    assert lines[1].startswith(
        "shot 2 of 3 (scene 2, shot 2; mi2v): 12.5 s, 3 keyframes recalled, 2 added; about 0:00 left"
    )
    assert lines[2].startswith("shot 3 of 3 (scene 2, shot 3; mi2v)")
    assert len(lines) == 3
    assert "\r" not in stream.getvalue()


def test_two_bars_in_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Terminal()
    make(Progress(stream=stream), finished=1)
    shown = stream.getvalue()
    assert "shots:" in shown
    assert "3/3" in shown
    assert "shot 2 (scene 2, shot 2)" in shown
    assert "recalled" not in shown
    assert capsys.readouterr().err.endswith("a note\n"), "above the bars"


def test_a_finished_film_is_reported() -> None:
    stream = io.StringIO()
    make(Progress(stream=stream), finished=3)
    assert stream.getvalue() == "3 of 3 shots are finished already\n"


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_disabled_progress_prints_nothing(stream: type[io.StringIO]) -> None:
    written = stream()
    make(Progress(enabled=False, stream=written), finished=1)
    assert written.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3599.7, "1:00:00"), (7325, "2:02:05")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_table_has_a_line_for_each_shot(tmp_path: Path) -> None:
    told = {"title": "A Dog", "scenes": [{"number": 2, "shots": [{"prompt": "A dog."}] * 3}]}
    takes = [record(0), record(1, keyframes=0, memory=0), replace(record(1), take=2, file="b.mp4")]
    film = Film(tmp_path, story=told, config={}, takes=takes)
    film.slots = [replace(slot, take=take) for slot, take in zip(film.slots, (1, 1, None), strict=True)]
    heading, rule, first, second, third = film_table(film, {2: "continues another take"}, {}).splitlines()
    assert heading.split()[:8] == ["shot", "scene", "take", "takes", "mode", "seed", "frames", "seconds"]
    assert set(rule) == {"-"}
    assert first.split() == ["1", "2.1", "1", "1", "mi2v", "0", "16", "12.5", "3", "2", "(0,", "4)"]
    assert second.split()[:8] == ["2", "2.2", "1", "2", "mi2v", "0", "16", "12.5"]
    assert second.endswith("continues another take")
    assert third.split() == ["3", "2.3", "none", "0"]


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert format_table([("a", "long"), ("wide", "b")]) == "   a  long\n----------\nwide     b"
