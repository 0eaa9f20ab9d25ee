"""What agents plan before an image is made: characters, cameras, and for each shot its first frame and references.

:func:`planned` asks a language model, in the order of ViMax (arXiv 2606.07649), from its second step on: a story here
is a script already. :func:`by_rule` plans the same without one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from pydantic.dataclasses import dataclass

from storymem.config import STRICT
from storymem.methods.chat import Chat
from storymem.methods.keyframes import image_names
from storymem.story import Shot, Story


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CharacterPlan:
    """A character: its name in the story, what never changes about its look, and what may (clothes)."""

    name: str
    static_features: str
    dynamic_features: str = ""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Characters:
    """All characters of the story."""

    characters: tuple[CharacterPlan, ...]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Camera:
    """A position of the camera.

    Args:
        camera: its number, from 1.
        shots: numbers of its shots.
        parent: number of the camera that shows (a part of) what this one sees; None: there is none.
        parent_shot: the shot of that camera.
    """

    camera: int
    shots: tuple[int, ...]
    parent: int | None = None
    parent_shot: int | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Cameras:
    """The camera tree."""

    cameras: tuple[Camera, ...]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Frame:
    """The first frame of a shot.

    Args:
        first_frame: what it shows, as a text for an image model.
        visible: names of characters in it.
        motion: what happens in the shot, without names: the text for image-to-video.
    """

    first_frame: str
    visible: tuple[str, ...]
    motion: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sources:
    """What the image of a first frame is made from.

    Args:
        images: names of portraits and of images of earlier shots.
        prompt: for the image model, which calls them Picture 1, Picture 2, ...
    """

    images: tuple[str, ...]
    prompt: str


@dataclass(frozen=True, kw_only=True)
class Storyboard:
    """A plan; ``frames`` and ``sources`` have an entry for each shot."""

    characters: tuple[CharacterPlan, ...]
    cameras: tuple[Camera, ...]
    frames: tuple[Frame, ...]
    sources: tuple[Sources, ...]


def portrait_name(story: Story, name: str) -> str:
    """The name of a character's portrait among the film's images."""
    place = [character.name for character in story.characters].index(name) + 1
    return f"portrait_{place:02d}"


# --- by rule


def by_rule(story: Story, references: int) -> Storyboard:
    """A plan without a language model: prompts as they are.

    A camera is a run of shots without a cut. A first frame is made from the portraits of its characters, and from the
    last image that shows each of them.
    """
    names = image_names(story)
    looks = {one.name: one.description or "" for one in story.characters}
    runs: list[list[int]] = []
    for shot in story.shots:
        if shot.cut or not runs:
            runs.append([])
        runs[-1].append(shot.index + 1)
    sources = []
    for shot in story.shots:
        shown = [[one.index for one in story.shots[: shot.index] if name in one.characters] for name in shot.characters]
        last = dict.fromkeys(names[places[-1]] for places in shown if places)
        images = [*(portrait_name(story, name) for name in shot.characters), *last][:references]
        sources.append(Sources(images=tuple(images), prompt=story.prompt_of(shot)))
    prompts = [story.prompt_of(shot) for shot in story.shots]
    return Storyboard(
        characters=tuple(CharacterPlan(name=name, static_features=look) for name, look in looks.items()),
        cameras=tuple(Camera(camera=number, shots=tuple(run)) for number, run in enumerate(runs, start=1)),
        frames=tuple(
            Frame(first_frame=prompt, visible=shot.characters, motion=prompt)
            for shot, prompt in zip(story.shots, prompts, strict=True)
        ),
        sources=tuple(sources),
    )


# --- by a language model

_CHARACTERS = """\
Describe the characters of this story for an image model: static_features never change (age, build, hair, face),
dynamic_features may (clothes). Keep their names and what the story says about their looks.

{story}"""
_CAMERAS = """\
Divide the shots of this story among cameras. Each shot belongs to one camera; shots of one camera have the same place
and angle. A camera may have a parent: an earlier camera that shows a wider view of what it sees, in parent_shot.

{story}"""
_FRAME = """\
Describe shot {number} of this story. first_frame: the first image of the shot for an image model, with place, light,
framing, and each character as <Name>. visible: names of the characters in it. motion: what then moves, for a model that
animates that image, without names.{words}

{story}"""
_SOURCES = """\
The first image of shot {number} will be made by a model that edits and combines images. Choose at most {most} of the
images below, and write the prompt, which calls them Picture 1, Picture 2, ... in the order in which you list them, and
says what to take from each. The image must show: {frame}

Images:
{images}"""


def planned(story: Story, chat: Chat, *, references: int, words: Iterable[str] | None = None) -> Storyboard:
    """A plan by a language model, in 2 + 2 N calls for N shots.

    Args:
        story: the script.
        chat: asks.
        references: images of a first frame, at most.
        words: all words that the video model knows; None: any.

    Raises:
        EndpointError: see :meth:`Chat.ask`.
    """
    script = _script(story)
    few = "" if words is None else f"\nThe models read only these words: {', '.join(sorted(words, key=str.lower))}."
    names = [character.name for character in story.characters]
    characters = chat.ask(_CHARACTERS.format(story=script), Characters, lambda one: _same_names(one, names))
    cameras = chat.ask(_CAMERAS.format(story=script), Cameras, lambda one: check_tree(one, len(story.shots)))
    frames = [
        chat.ask(
            _FRAME.format(number=shot.index + 1, story=script, words=few),
            Frame,
            lambda one: _known(one.visible, names, "visible"),
        )
        for shot in story.shots
    ]
    sources = []
    for shot, frame in zip(story.shots, frames, strict=True):
        known = _candidates(story, shot, characters, cameras, frames)
        listed = "\n".join(f"- {name}: {text}" for name, text in known.items())
        question = _SOURCES.format(number=shot.index + 1, most=references, frame=frame.first_frame, images=listed)
        sources.append(
            chat.ask(question, Sources, lambda one, known=tuple(known): _few(one, known, references))  # type: ignore[misc]
        )
    return Storyboard(
        characters=characters.characters, cameras=cameras.cameras, frames=tuple(frames), sources=tuple(sources)
    )


def _script(story: Story) -> str:
    shots = [
        {"shot": shot.index + 1, "scene": shot.scene, "cut": shot.cut, "text": shot.prompt, "who": shot.characters}
        for shot in story.shots
    ]
    people = [{"name": one.name, "look": one.description} for one in story.characters]
    content = {"title": story.title, "overview": story.overview, "style": story.style, "characters": people}
    return json.dumps({**content, "shots": shots}, ensure_ascii=False)


def _candidates(
    story: Story, shot: Shot, characters: Characters, cameras: Cameras, frames: Sequence[Frame]
) -> dict[str, str]:
    """Portraits, and the images of earlier shots; those of the shot's camera and of its parent are marked."""
    names = image_names(story)
    own = next(one for one in cameras.cameras if shot.index + 1 in one.shots)
    known = {
        portrait_name(story, one.name): f"portrait of {one.name}: {one.static_features} {one.dynamic_features}".strip()
        for one in characters.characters
    }
    for earlier in story.shots[: shot.index]:
        number = earlier.index + 1
        mark = " (same camera)" if number in own.shots else " (wider view)" if number == own.parent_shot else ""
        known[names[earlier.index]] = f"shot {number}{mark}: {frames[earlier.index].first_frame}"
    return known


def _same_names(found: Characters, names: Sequence[str]) -> None:
    if sorted(one.name for one in found.characters) != sorted(names):
        raise ValueError(f"characters must be exactly {', '.join(names) or 'none'}")


def _known(found: Iterable[str], known: Sequence[str], what: str) -> None:
    if unknown := [name for name in found if name not in known]:
        raise ValueError(f"{what} holds {unknown[0]!r}, which is none of {', '.join(known) or 'nothing'}")


def _few(found: Sources, known: Sequence[str], most: int) -> None:
    _known(found.images, known, "images")
    if len(found.images) > most or len(set(found.images)) < len(found.images):
        raise ValueError(f"images holds more than {most}, or one twice")
    if not found.prompt.strip():
        raise ValueError("prompt is empty")
    for number in map(int, re.findall(r"Picture (\d+)", found.prompt)):
        if not 1 <= number <= len(found.images):
            raise ValueError(f"prompt names Picture {number}, and there are {len(found.images)}")


def check_tree(found: Cameras, shots: int) -> None:
    """Raise ``ValueError`` unless each shot has one camera, and each parent is an earlier camera with the shot."""
    shots_of = {one.camera: one.shots for one in found.cameras}
    if len(shots_of) < len(found.cameras):
        raise ValueError("two cameras have one number")
    if sorted(shot for one in found.cameras for shot in one.shots) != list(range(1, shots + 1)):
        raise ValueError(f"each of the shots 1 to {shots} must belong to exactly one camera")
    for one in found.cameras:
        if one.parent is not None and (one.parent >= one.camera or one.parent_shot not in shots_of.get(one.parent, ())):
            raise ValueError(f"camera {one.camera} has no earlier parent {one.parent} with a shot {one.parent_shot}")
