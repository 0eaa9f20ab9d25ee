"""What a user can do in the studio: each action calls the function behind a command, and names the command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from storymem.config import build_settings
from storymem.film import memory_edits
from storymem.film.differences import arguments_between
from storymem.film.folder import Film, edited_film
from storymem.film.generate import config_of, generate, recorded_config
from storymem.film.resume import story_record
from storymem.film.settings import GenerateSettings
from storymem.io import write_text
from storymem.story import Story, StoryError, load_story
from storymem.story.writing import (
    EndpointSettings,
    ask,
    content_of,
    prompt_for,
    read_answer,
    story_content,
    story_of,
    story_yaml,
    unused_path,
)
from storymem.studio.work import Job, Worker

_ON_PAGE = {"story", "shot", "take", "takes", "following", "resume", "dry_run"}
_OWN = re.compile(r"_edited(_\d+)?$")  # the stem of a story file that the studio wrote


class Studio:
    """A story file, the folder of its film, and the settings that its takes are made with.

    Args:
        opened: a story file, or a film's folder.
        arguments: settings of ``storymem generate``, as they are typed. A film's folder brings its own; these change
            them.

    Raises:
        ValueError: for a mistake in the story or the settings.
    """

    def __init__(self, opened: str | Path, arguments: Sequence[str] = ()) -> None:
        given = {argument.partition("=")[0]: argument for argument in arguments}
        if on_page := sorted(given.keys() & _ON_PAGE):
            raise ValueError(f"{given[on_page[0]]}: this is done on the page; leave it out")
        output = given.pop("output", None)
        opened = Path(opened)
        if Film.exists(opened):
            if output is not None:
                raise ValueError(f"{output}: the film stays in the folder that is opened; leave it out")
            film = Film.open(opened)
            self.folder, self.story_file = opened, _story_file(film)
            given = {one.partition("=")[0]: one for one in _arguments_of(film)} | given
        elif opened.is_dir():
            raise ValueError(f"{opened} holds no film: write the folder of a film, or a story file")
        else:
            self.story_file = opened
            self.folder = Path(output.partition("=")[2]) if output else Path("films") / load_story(opened).slug
        self.arguments = list(given.values())
        self._is_ours = _OWN.search(self.story_file.stem) is not None
        _ = self.story, self.settings
        self.worker = Worker()

    @property
    def story(self) -> Story:
        """The story as it is on disk now."""
        return load_story(self.story_file)

    @property
    def settings(self) -> GenerateSettings:
        """The settings of the takes to come."""
        return build_settings(GenerateSettings, config_of(self.arguments) | {"story": str(self.story_file)})

    @property
    def film(self) -> Film | None:
        """The film as it is on disk, None before its first take."""
        return Film.open(self.folder) if Film.exists(self.folder) else None

    def command(self, *words: str, story: Path | None = None) -> str:
        """``storymem generate`` for this film, or that of another story, with more words."""
        output = [f"output={self.folder}"] if story is None else []
        return shlex.join(["storymem", "generate", str(story or self.story_file), *output, *self.arguments, *words])

    # Takes

    def make(self, *words: str, story: Path | None = None) -> str:
        """Queue ``storymem generate``, with ``words`` such as "shot=3"; of another story: its film. The command."""
        file, output = (self.story_file, self.folder) if story is None else (story, None)
        command, overrides = self.command(*words, story=story), [*self.arguments, *words]
        load_story(file)
        self.worker.add(
            Job(command, lambda progress: generate(file, output=output, overrides=overrides, progress=progress))
        )
        return command

    def choose(self, shot: int, take: int) -> str:
        """Have ``shot`` (from 1) show its take ``take``. The command."""
        self._check_idle("choose")
        words = (f"shot={shot}", f"take={take}")
        generate(self.story_file, output=self.folder, overrides=[*self.arguments, *words])
        return self.command(*words)

    def _check_idle(self, action: str) -> None:
        if self.worker.busy:
            raise ValueError(f"takes are being made: {action} when they are done, or stop them")

    # The memory; a keyframe is named by its id

    def drop(self, keyframe: str | None) -> str:
        """Remove a keyframe from the memory. The command."""
        return self._edit_memory(lambda film: memory_edits.drop(film, _named(keyframe)))

    def pin(self, keyframe: str | None, *, pinned: bool = True) -> str:
        """Have later shots always recall a keyframe, or end that. The command."""
        return self._edit_memory(lambda film: memory_edits.pin(film, _named(keyframe), pinned=pinned))

    def replace(self, keyframe: str | None, image: str | Path) -> str:
        """Put an image in the place of a keyframe. The command."""
        return self._edit_memory(lambda film: memory_edits.replace(film, _named(keyframe), image))

    def add_image(self, image: str | Path, character: str | None = None) -> str:
        """Add an image, of a character if one is named, as the newest keyframe. The command."""
        return self._edit_memory(lambda film: memory_edits.add(film, image, character=character or None))

    def _edit_memory(self, edit: Callable[[Film], memory_edits.Edit]) -> str:
        self._check_idle("edit the memory")
        if not Film.exists(self.folder):
            raise ValueError("the film has no memory yet: make its first take")
        with edited_film(self.folder) as film:
            done = edit(film)
        notes = [f"Shot {shot} is not what would be made now: {reason}." for shot, reason in done.stale.items()]
        return "\n# ".join([done.command or "# nothing changed", *notes])

    # The story

    def edit_shot(self, shot: int, *, overwrite: bool = False, **values: Any) -> str:
        """Change keys of ``shot`` (from 1), such as ``prompt``; None removes one. The command to run then."""

        def edit(shots: list[dict[str, Any]], place: int) -> None:
            shots[place] = {key: value for key, value in {**shots[place], **values}.items() if value not in (None, [])}

        return self._edit(shot, edit, overwrite)

    def add_shot(self, after: int, prompt: str, *, overwrite: bool = False) -> str:
        """Add a shot after shot ``after`` (from 1), in its scene."""
        return self._edit(after, lambda shots, place: shots.insert(place + 1, {"prompt": prompt}), overwrite)

    def remove_shot(self, shot: int, *, overwrite: bool = False) -> str:
        """Remove a shot; its takes stay in the film's folder."""
        return self._edit(shot, lambda shots, place: shots.pop(place), overwrite)

    def move_shot(self, shot: int, by: int, *, overwrite: bool = False) -> str:
        """Move a shot by -1 or 1 place; at the end of its scene it moves into the next one."""
        content = story_content(self.story)
        scene, place = _place(content, shot)
        shots = content["scenes"][scene]["shots"]
        if not 0 <= place + by < len(shots):
            if not 0 <= scene + by < len(content["scenes"]):
                raise ValueError(f"shot {shot} is the {'first' if by < 0 else 'last'} of the film")
            other = content["scenes"][scene + by]["shots"]
            other.insert(0 if by > 0 else len(other), shots.pop(place))
        else:
            shots.insert(place + by, shots.pop(place))
        return self._save(content, overwrite)

    def _edit(self, shot: int, edit: Callable[[list[dict[str, Any]], int], object], overwrite: bool) -> str:
        content = story_content(self.story)
        scene, place = _place(content, shot)
        edit(content["scenes"][scene]["shots"], place)
        return self._save(content, overwrite)

    def _save(self, content: dict[str, Any], overwrite: bool) -> str:
        """Write the story beside the user's file, or over it if asked."""
        content["scenes"] = [scene for scene in content["scenes"] if scene["shots"]]
        path = self.story_file
        if not (overwrite or self._is_ours):
            path = unused_path(path.with_name(f"{path.stem}_edited.yaml"))
        write_text(path, story_yaml(story_of(content, path)))
        self._is_ours |= path != self.story_file
        self.story_file = path
        return f"{self.command()}\n# The story is saved as {path}; this command makes what is new."

    def write_story(self, idea: str, shots: int, url: str, name: str) -> tuple[str, str]:
        """The command, and the answer of the language model ``name`` at ``url``; without one, the prompt for any."""
        model = [argument for argument in self.arguments if argument.startswith("model=")] or ["model=toy"]
        words = [f"shots={shots}", *model]
        words += [f"endpoint.url={url}", f"endpoint.model={name}"] if url else []
        if not idea.strip():
            raise ValueError("write what the story is about")
        prompt = prompt_for(idea, shots, self.settings.model)
        endpoint = EndpointSettings(url=url, model=name) if url else None
        answer = prompt if endpoint is None else ask(endpoint, [{"role": "user", "content": prompt}])
        return shlex.join(["storymem", "write", idea, *words]), answer

    def import_story(self, text: str) -> str:
        """Save a pasted story (YAML, JSON or a language model's answer) and open it; the command, and repairs.

        It is saved beside the story that is open, and its film is another one.
        """
        self._check_idle("open another story")
        story, notes = read_answer(text, self.story_file.parent)
        path = unused_path(self.story_file.with_name(f"{story.slug}.yaml"))
        write_text(path, story_yaml(story))
        self.story_file, self._is_ours, self.folder = path, True, Path("films") / story.slug
        return "\n# ".join([self.command(), f"The story is saved as {path}.", *notes])

    @property
    def other_stories(self) -> list[Path]:
        """Story files beside the one that is open."""
        found = []
        for path in sorted(self.story_file.parent.glob("*.yaml")):
            try:
                load_story(path)
            except StoryError:
                continue
            if path != self.story_file:
                found.append(path)
        return found


def _named(keyframe: str | None) -> str:
    if keyframe is None:
        raise ValueError("choose a keyframe first")
    return keyframe


def _place(content: dict[str, Any], shot: int) -> tuple[int, int]:
    """The scene of a shot (from 1) and its place there, both from 0."""
    places = [(scene, place) for scene, one in enumerate(content["scenes"]) for place in range(len(one["shots"]))]
    if not 1 <= shot <= len(places):
        raise ValueError(f"there is no shot {shot}; the story has {len(places)}")
    return places[shot - 1]


def _story_file(film: Film) -> Path:
    """A story file in the film's folder that holds the film's story; written if there is none."""
    for path in sorted(film.folder.glob("story*.yaml")):
        try:
            if story_record(load_story(path)) == film.story:
                return path
        except StoryError:
            continue
    content = content_of({key: value for key, value in film.story.items() if key != "reference_sha256"})
    path = unused_path(film.folder / "story_edited.yaml")
    try:
        story = story_of(content, path)
    except StoryError as error:
        cure = f"open the film with its story file: storymem studio story.yaml output={film.folder}"
        raise StoryError([*error.problems, cure]) from None
    write_text(path, story_yaml(story))
    return path


def _arguments_of(film: Film) -> list[str]:
    """The arguments of ``storymem generate`` that make takes with the film's settings."""
    name = film.config.get("model", {}).get("name", "toy")
    arguments = [] if name == "toy" else [f"model={name}"]
    more = arguments_between(film.config, recorded_config(config_of(arguments)))
    if more is None:
        cure = "open it with its story file and the settings that it was made with"
        raise ValueError(f"{film.folder} was made with settings that single arguments do not give: {cure}")
    return [*arguments, *shlex.split(more)]
