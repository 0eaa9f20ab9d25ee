"""Story files for tests, and the problems that are reported of them."""

from pathlib import Path

import pytest

from storymem.story import StoryError, load_story

HEAD = """\
title: The Keeper
overview: A keeper finds a seal.
characters:
  - {name: Tam}
  - {name: Pebble}
scenes:
  - shots:
"""
SHOT_LINE = HEAD.count("\n") + 1


def story_of(shots: str) -> str:
    return f"title: A\noverview: B\nscenes:\n  - shots:\n{shots}"


def write(folder: Path, content: str | bytes, name: str = "story.yaml") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def problems(folder: Path, content: str | bytes, name: str = "story.yaml") -> list[str]:
    """The problems that load_story reports for ``content``, without the folder in the paths."""
    path = write(folder, content, name)
    with pytest.raises(StoryError) as caught:
        load_story(path)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return [problem.replace(f"{folder}/", "") for problem in caught.value.problems]


def problem(folder: Path, content: str | bytes, name: str = "story.yaml") -> str:
    found = problems(folder, content, name)
    assert len(found) == 1, found
    return found[0]


def shot_problem(folder: Path, shot: str) -> str:
    """The one problem of a story whose only shot is ``shot``; checks that it names that shot."""
    text = problem(folder, f"{HEAD}      - {shot}\n")
    where, label, rest = text.split(": ", 2)
    assert label == "shot 1 (scene 1, shot 1)"
    assert where == f"story.yaml:{SHOT_LINE}"
    return rest
