"""``storymem write``: a language model writes a story; its answer is checked, converted and saved. Loads no torch."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import field
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from pydantic.dataclasses import dataclass

from storymem.config import STRICT, UserPath, build_settings, check_bounds
from storymem.io import FileError, parse_json, parse_yaml, read_text, write_text
from storymem.story.json_schema import story_schema
from storymem.story.parser import StoryError, shorten
from storymem.story.schema import MAX_SHOTS, Story, load_story
from storymem.wan.settings import ModelSettings, SamplerSettings
from storymem.wan.texts import TextReader, known_words

MAX_ANSWER = 1 << 20  # bytes
_ANSWERS = (".json", ".yaml", ".yml", ".txt", ".md")

_TASK = """\
Write a story for a film of {shots} shots of about {seconds:.0f} seconds each. The idea:

{idea}

A video model generates each shot from its prompt and from images of earlier shots. It knows nothing else of the story.

- Answer with one JSON object that fits the schema below, and with nothing else.
- overview: one or two sentences. Scenes have {shots} shots in all; a scene is one place at one time.
- prompt: one to four sentences in the present tense: who does what, where, at what time of day, in which light; framing
  and movement of the camera. One action that fits into the length of a shot. Only what can be seen: no thoughts, no
  dialogue, no text in the picture, nothing about other shots.
- Every prompt names the place and its characters, always by the same names, and the shot lists them in characters.
- cut: false only where a shot begins with the last image of the shot before; the first shot of a scene is a cut.
- Leave out references, frames, seed, negative_prompt and genre.
{more}

JSON schema:

{schema}
"""
_ANY_WORDS = """\
- characters: all who appear in the story, each with a description of age, hair, clothes and colours. It is added to the
  prompts of their shots.
- style: a few words on how the film looks, such as "watercolour"; they begin every prompt."""
_FEW_WORDS = """\
- Leave out style, and the descriptions of characters.
- This model is a small drawn world. Prompts use only the words in the list below; names, places and actions are among
  them. Two examples: "Ada waits in the desert at noon. Medium shot." "Ada and Hana meet in the city at night. Medium
  shot." The idea may have to become a simpler one. The words: {words}
- At most one character of each of these three groups, who first appear alone and in this order: Ada, Bo, Cleo, Dax;
  Eli, Fay, Gus, Hana; Ivo, Juno, Kit, Lou."""
_AGAIN = "This is not a story yet:\n{problems}\nAnswer with the whole corrected JSON object and with nothing else."


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EndpointSettings:
    """An OpenAI-compatible endpoint.

    Args:
        url: up to /v1, such as http://localhost:11434/v1; null: the prompt is printed and nothing is asked.
        model: its name there.
        key: the environment variable that holds the key, never the key itself. It may be unset.
        timeout: seconds to wait for an answer.
    """

    url: str | None = None
    model: str | None = None
    key: str = "OPENAI_API_KEY"
    timeout: float = 600

    def __post_init__(self) -> None:
        check_bounds(self, timeout=(1, 86400))
        if not re.fullmatch(r"[A-Za-z_]\w*", self.key, re.ASCII):
            raise ValueError("key is the name of an environment variable, such as OPENAI_API_KEY, not the key itself")
        if self.url is None:
            return
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.port == 0:
            raise ValueError("url must be like http://localhost:11434/v1 or https://HOST/v1, without user and password")
        if not self.model:
            raise ValueError("model is missing: write endpoint.model=NAME")

    @property
    def address(self) -> str:
        """Where chats are posted."""
        url = (self.url or "").rstrip("/")
        return url if url.endswith("/chat/completions") else f"{url}/chat/completions"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WriteSettings:
    """The settings of ``storymem write``.

    Args:
        idea: what the story is about; or a file with a language model's answer, which is checked and converted.
        model, sampler, memory, scorer: as in `generate.yaml`, of the model that the story is for. The prompt lists the
            words of a model that was trained on few, such as model=toy.
        shots: how many.
        output: the story file, <title>.yaml by default. A file that exists is never overwritten.
        endpoint: where to ask.
    """

    idea: str | tuple[str, ...]
    model: ModelSettings
    sampler: SamplerSettings
    memory: dict[str, Any]
    scorer: dict[str, Any]
    endpoint: EndpointSettings = field(default_factory=EndpointSettings)
    shots: int = 10
    output: UserPath | None = None

    def __post_init__(self) -> None:
        check_bounds(self, shots=(1, MAX_SHOTS))
        if not self.text.strip():
            raise ValueError("idea is empty; write what the story is about")
        if self.output is not None:
            if Path(self.output).suffix.lower() not in (".yaml", ".yml"):
                raise ValueError(f"output={self.output}: write the name of a YAML file, such as story.yaml")
            if os.path.lexists(self.output):
                raise ValueError(f"output={self.output} exists and is not overwritten: write another name")

    @property
    def text(self) -> str:
        """The idea, whose words may have been given one by one."""
        return self.idea if isinstance(self.idea, str) else " ".join(self.idea)

    @property
    def answer(self) -> Path | None:
        """The file with an answer, if that is what was given."""
        path = Path(os.path.expanduser(self.text))
        return path if os.path.isfile(path) or (path.suffix.lower() in _ANSWERS and " " not in path.name) else None

    @property
    def folder(self) -> Path:
        """Where the story file is written: with ``output``, beside the answer, or here."""
        return Path(self.output or self.answer or "story.yaml").parent


class EndpointError(ValueError):
    """An endpoint that could not be asked, or whose answer is none."""


def write(config: Mapping[str, Any]) -> None:
    """Print the prompt for a story; or ask the endpoint, or read an answer, and save it as a story file.

    Raises:
        StoryError: with every problem, if the answer is not a story.
        EndpointError: if the endpoint cannot be asked.
        FileError: if the answer cannot be read.
    """
    settings = build_settings(WriteSettings, config)
    prompt = prompt_for(settings.text, settings.shots, settings.model)
    if settings.answer is None and settings.endpoint.url is None:
        print(prompt)
        print(
            "Give this to a language model, save its answer to a file, and run: storymem write answer.json\n"
            "Or let an OpenAI-compatible endpoint be asked: endpoint.url=http://HOST/v1 endpoint.model=NAME",
            file=sys.stderr,
        )
        return
    answer = None if settings.answer is None else read_text(settings.answer, limit=MAX_ANSWER)
    settings.folder.mkdir(parents=True, exist_ok=True)
    if answer is None:
        story, notes = _ask_for_story(prompt, settings)
        if len(story.shots) != settings.shots:
            notes.append(f"the answer has {len(story.shots)} shots, not {settings.shots}")
    else:
        try:
            story, notes = read_answer(answer, settings.folder)
        except StoryError as error:
            raise StoryError([f"{settings.answer}: {problem}" for problem in error.problems]) from None
    _save(story, notes, settings)


def prompt_for(idea: str, shots: int, model: ModelSettings) -> str:
    """What to ask a language model, with the schema of its answer."""
    words = known_words(model)
    more = _ANY_WORDS if words is None else _FEW_WORDS.format(words=", ".join(sorted(words, key=str.lower)))
    schema = json.dumps(story_schema(), indent=1)
    seconds = model.video.frames / model.video.fps
    return _TASK.format(shots=shots, seconds=seconds, idea=idea, more=more, schema=schema).rstrip()


def read_answer(answer: str, folder: Path, idea: str | None = None) -> tuple[Story, list[str]]:
    """The story in a language model's answer, and a line for everything that was repaired. Prompts stay as they are.

    Args:
        folder: where the story will lie; paths of reference images are relative to it.
        idea: in place of a missing overview; by default the title.

    Raises:
        StoryError: with every problem, without line numbers.
    """
    content, notes = find_object(answer)
    title, overview = "title", "overview"
    if not content.keys().isdisjoint(("story_name", "story_overview")):
        title, overview = "story_name", "story_overview"
        notes.append("ST-Bench's form is converted")
        if any(isinstance(scene, dict) and "first_frame_prompt" in scene for scene in _listed(content, "scenes")):
            notes.append("first_frame_prompt is left out: it is not used")
    shots = [shot for scene in _listed(content, "scenes") for shot in _listed(scene, "shots")]
    for number, shot in enumerate(shots, start=1):
        if isinstance(shot, dict) and "prompt" not in shot and "description" in shot:
            shot["prompt"] = shot.pop("description")
            notes.append(f"shot {number}: description is taken as its prompt")
    if not content.get(overview) and (instead := idea or content.get(title)):
        content[overview] = instead
        notes.append(f"overview was missing: {'the idea' if idea else 'the title'} is used")
    return story_of(content, folder / "story.yaml"), notes


def story_of(content: Mapping[str, Any], path: Path) -> Story:
    """The story with the content of a story file, as if ``path`` were the file. ``StoryError`` without line numbers."""
    try:
        return load_story(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=math.inf))
    except StoryError as error:
        raise StoryError([re.sub(rf"^{re.escape(str(path))}(:\d+)?: ", "", one) for one in error.problems]) from None


def _listed(content: Any, key: str) -> list[Any]:
    found = content.get(key) if isinstance(content, dict) else None
    return found if isinstance(found, list) else []


def find_object(answer: str) -> tuple[dict[str, Any], list[str]]:
    """The object (JSON, else YAML) in an answer, and notes on the text around it."""
    answer = answer.replace("\r\n", "\n")
    said = answer.rpartition("</think>")[2].strip()
    candidates = [(said, [] if said == answer.strip() else ["text around the story is left out"])]
    for fence in re.finditer(r"^```\w*\n(.*?)^```", said, re.MULTILINE | re.DOTALL):
        notes = ["Markdown fences are left out"]
        candidates.append((fence[1], notes if fence[0] == said else [*notes, "text around the story is left out"]))
    braces = said[said.find("{") : said.rfind("}") + 1]
    candidates.append((braces, ["text around the story is left out"]))
    found = []
    for text, notes in candidates:
        for parse in (parse_json, parse_yaml):
            try:
                content = parse(text, "the answer")
            except FileError:
                continue
            if isinstance(content, dict):
                found.append((content, notes))
                break
    if not found:
        try:
            parse_json(braces, "the JSON object in the answer")
        except FileError as error:
            raise StoryError([str(error) if braces else "there is no JSON object in the answer"]) from None
    return next((one for one in found if "scenes" in one[0]), found[-1])


def _save(story: Story, notes: list[str], settings: WriteSettings) -> None:
    """Write the story file, print its path, and report what was repaired and what the model does not read."""
    path = Path(settings.output) if settings.output else unused_path(settings.folder / f"{story.slug}.yaml")
    write_text(path, story_yaml(story))
    if known_words(settings.model) is not None:
        from storymem.story.notes import text_notes

        notes += text_notes(story, TextReader.of(settings.model), settings.sampler, model=settings.model.name)
    for note in notes:
        print(note, file=sys.stderr)
    print(path)


def story_yaml(story: Story) -> str:
    """A story as the text of a story file, which reads as an equal story in the same folder."""
    return yaml.safe_dump(story_content(story), sort_keys=False, allow_unicode=True, width=120)


def story_content(story: Story) -> dict[str, Any]:
    """What a story file of a story holds."""
    return content_of(story.to_dict() | {"genre": story.genre})


def content_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a story file from what :meth:`Story.to_dict` gives."""
    scenes = [{"shots": [_given(shot) for shot in scene["shots"]]} for scene in record["scenes"]]
    characters = [_given(character) for character in record.get("characters", ())]
    return _given({**record, "characters": characters, "scenes": scenes})


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is not given, and ``cut: true``, which is the default."""
    return {key: value for key, value in values.items() if value not in (None, []) and not (key == "cut" and value)}


def unused_path(path: Path) -> Path:
    """``path``, or the first of NAME_2, NAME_3, ... that does not exist."""
    names = (path.with_stem(f"{path.stem}_{number}") for number in count(2))
    return path if not os.path.lexists(path) else next(one for one in names if not os.path.lexists(one))


# --- the endpoint


def _ask_for_story(prompt: str, settings: WriteSettings) -> tuple[Story, list[str]]:
    """Ask, and once more with the problems if the answer is not a story. A second such answer is saved as text."""
    messages = [{"role": "user", "content": prompt}]
    print(f"asking {settings.endpoint.model} at {settings.endpoint.url}", file=sys.stderr)
    answer = ask(settings.endpoint, messages)
    try:
        return read_answer(answer, settings.folder, settings.text)
    except StoryError as error:
        problems = "\n".join(f"- {problem}" for problem in error.problems)
    print(f"the answer is not a story; asking once more with its problems:\n{problems}", file=sys.stderr)
    again = {"role": "user", "content": _AGAIN.format(problems=problems)}
    answer = ask(settings.endpoint, [*messages, {"role": "assistant", "content": answer}, again])
    try:
        return read_answer(answer, settings.folder, settings.text)
    except StoryError as error:
        path = unused_path(settings.folder / "answer.txt")
        write_text(path, answer)
        cure = f"the answer is saved: correct {path}, then run: storymem write {path}"
        raise StoryError(["the second answer is not a story either:", *error.problems, cure]) from None


def ask(endpoint: EndpointSettings, messages: list[dict[str, str]]) -> str:
    """The endpoint's answer to a chat.

    Raises:
        EndpointError: with what went wrong, and never with the key.
    """
    import httpx

    key = os.environ.get(endpoint.key, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise EndpointError(f"the key in {endpoint.key} holds characters that no key has: set it again")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    question = {"model": endpoint.model, "messages": messages}
    content = bytearray()
    try:
        with httpx.stream("POST", endpoint.address, json=question, headers=headers, timeout=endpoint.timeout) as reply:
            for part in reply.iter_bytes():
                content += part
                if len(content) > MAX_ANSWER:
                    raise EndpointError(f"{endpoint.address} answers with more than {MAX_ANSWER:,} bytes")
    except httpx.TimeoutException:
        reason = f"has not answered in {endpoint.timeout:g} seconds: raise endpoint.timeout"
    except EndpointError:
        raise
    except httpx.HTTPError as error:
        cure = "check endpoint.url and the network"
        if isinstance(error, httpx.ConnectError) and "refused" in str(error).lower():
            cure = "start the server there, or correct endpoint.url"
        reason = f"cannot be asked ({error}): {cure}"
    except (httpx.InvalidURL, OSError, ValueError, ImportError) as error:
        cure = "check endpoint.url, and HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and SSL_CERT_FILE if they are set"
        reason = f"cannot be asked ({error}): {cure}"
    else:
        if reply.is_success:
            return _answer(bytes(content), endpoint, key)
        text = _without(key, content.decode(errors="replace"))
        status = f"{reply.status_code} {reply.reason_phrase}"
        reason = f"answers {status} ({_message(text)}): {_cure(reply.status_code, endpoint, key)}"
        if reply.has_redirect_location:
            reason = f"redirects to {reply.headers['Location']}: write the endpoint.url of that place"
    raise EndpointError(f"{endpoint.address} {reason}")


def _without(key: str, text: str) -> str:
    """A text of the endpoint for messages; short keys, as local servers have, may be words in it."""
    return text.replace(key, "***") if len(key) >= 8 else text


def _answer(content: bytes, endpoint: EndpointSettings, key: str) -> str:
    """What the model wrote, in the JSON of a reply."""
    try:
        choice = json.loads(content)["choices"][0]
        answer, ended = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        text = shorten(_without(key, content.decode(errors="replace")))
        reason = f"is not an OpenAI-compatible endpoint: it answers {text!r}"
    else:
        if ended == "length":
            reason = f"stopped at the limit of {endpoint.model}'s answers: write fewer shots, or use another model"
        elif isinstance(answer, str) and answer.strip():
            return answer
        else:
            reason = "gave an empty answer"
    raise EndpointError(f"{endpoint.address} {reason}")


def _message(text: str) -> str:
    """The message of an error, of at most 300 characters."""
    try:
        error = json.loads(text)["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, RecursionError, LookupError, TypeError):
        pass  # not in the usual form
    return " ".join(str(text).split())[:300]


def _cure(status: int, endpoint: EndpointSettings, key: str) -> str:
    if status in (401, 403):
        no_key = f"no key was sent: set {endpoint.key}, or name another with endpoint.key"
        return f"check the key in {endpoint.key}" if key else no_key
    cures = {404: "check endpoint.url, which mostly ends in /v1, and endpoint.model"}
    cures |= {429: "wait, or check the credit of the account"}
    return cures.get(status, "the same command asks again")
