"""Notes on a story before its film is generated: text that the model does not read, images that are changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from storymem.config import first_of
from storymem.io import FileError
from storymem.media.images import Fit, fit_note, read_image_with_notes
from storymem.story import Story
from storymem.story.parser import as_written
from storymem.wan.settings import ModelSettings, SamplerSettings
from storymem.wan.spec import TRAINED_SIZES
from storymem.wan.texts import KNOWN_WORDS, TextReader

_MOST = 20  # lines of one kind, and words in a line


def notes_on(stories: Sequence[Story], model: ModelSettings, sampler: SamplerSettings, fit: Fit) -> list[str]:
    """:func:`size_notes`; :func:`text_notes` and :func:`image_notes` of stories, of several each with its title."""
    try:
        reader = TextReader.of(model)
    except FileError:  # reported where weights are checked
        reader = None
    if model.weights is None:  # the default negative prompt is not for random networks
        sampler = replace(sampler, negative_prompt="")
    notes = [
        (story, note)
        for story in stories
        for note in (
            *text_notes(story, reader, sampler, model=model.name),
            *image_notes(story, model.video.height, model.video.width, fit),
        )
    ]
    return [
        *size_notes(model),
        *(note if len(stories) == 1 else f"{story.title}: {note}" for story, note in notes),
    ]


def size_notes(model: ModelSettings) -> list[str]:
    """A line if the model is known to be trained at other sizes than that of the film."""
    size = f"{model.video.width}x{model.video.height}"
    trained = TRAINED_SIZES.get(model.name, (size,))
    return [] if size in trained else [f"{model.name} was trained at {', '.join(trained)}: {size} may look worse"]


def text_notes(story: Story, reader: TextReader | None, sampler: SamplerSettings, *, model: str) -> list[str]:
    """A line for each text that is truncated and for words that ``model`` does not know.

    ``reader`` is None if the model's tokenizer is not on this machine, or damaged.
    """
    notes = list(story.notes)
    if reader is None:
        return [*notes, f"prompts are not counted: no readable tokenizer of {model} is on this machine"]
    readings = [(name, reader.read(text)) for name, text in _texts(story, sampler)]
    cut = [
        f"{name} has {reading.tokens} tokens, and {model} reads {reader.limit}; it does not read {_ends(reading.cut)}"
        for name, reading in readings
        if reading.cut
    ]
    unknown: dict[str, list[str]] = {}
    for name, reading in readings:
        for word in reading.unknown:
            unknown.setdefault(word, []).append(name)
    return [*notes, *_first(cut, "more texts are truncated"), *_unknown(unknown, reader, model)]


def image_notes(story: Story, height: int, width: int, fit: Fit) -> list[str]:
    """A line for each reference image that is converted, cut or padded to ``height`` x ``width``."""
    paths = story.all_references
    notes = []
    for path, written in dict(zip(paths, story.written(paths), strict=True)).items():
        image, of_image = read_image_with_notes(path)
        if (fitted := fit_note(image.shape[0], image.shape[1], height, width, fit)) is not None:
            of_image = (*of_image, f"{fitted} ({width}x{height}, memory.reference_fit={fit})")
        notes += [f"reference {as_written(written)} {note}" for note in of_image]
    return _first(notes, "more notes on references")


def _texts(story: Story, sampler: SamplerSettings) -> Iterable[tuple[str, str]]:
    """Every text that is encoded, with its name for messages."""
    for shot in story.shots:
        yield f"{shot.label}: the prompt", story.prompt_of(shot)
    if sampler.guidance <= 1:
        return
    for shot in story.shots:
        if shot.negative_prompt is not None:
            yield f"{shot.label}: the negative prompt", shot.negative_prompt
    if any(shot.negative_prompt is None for shot in story.shots):
        yield "sampler.negative_prompt", sampler.negative_prompt


def _unknown(found: dict[str, list[str]], reader: TextReader, model: str) -> list[str]:
    if not found:
        return []
    words = list(found)
    for place, word in enumerate(words[:_MOST]):
        words[place] += f" ({near}?)" if (near := reader.nearest(word)) else ""
    places = list(dict.fromkeys(name.split(":")[0] for names in found.values() for name in names))
    line = f"words that {model} does not know: {first_of(words, _MOST)}; in {first_of(places, 3)}"
    if reader.words is None:
        return [line]
    listed = Path(reader.tokenizer.name_or_path, KNOWN_WORDS)
    return [line, f"{model} knows {len(reader.words)} words, listed in {listed}; model=wan2.2-a14b knows all words"]


def _ends(text: str) -> str:
    """A text in quotes; of a long one, its beginning and end."""
    return f'"{text}"' if len(text) <= 120 else f'"{text[:50]} ... {text[-50:]}" ({len(text):,} characters)'


def _first(lines: list[str], of_what: str) -> list[str]:
    return lines[:_MOST] + ([f"{len(lines) - _MOST} {of_what}"] if len(lines) > _MOST else [])
