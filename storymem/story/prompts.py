"""What a model does not read of a story: ends of prompts that are cut, and words it does not know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from storymem.story import Story
from storymem.wan.settings import ModelSettings, SamplerSettings
from storymem.wan.texts import TextReader

_MOST = 20  # lines of one kind, and words in a line


def remarks_on(stories: Sequence[Story], model: ModelSettings, sampler: SamplerSettings) -> list[str]:
    """:func:`story_remarks` of several stories, each line with its story's title."""
    reader = TextReader.of(model)
    if model.weights is None:  # random networks read nothing, and their default negative prompt is for others
        sampler = replace(sampler, negative_prompt="")
    told = [(story, story_remarks(story, reader, sampler, model=model.name)) for story in stories]
    return [line if len(stories) == 1 else f"{story.title}: {line}" for story, lines in told for line in lines]


def story_remarks(story: Story, reader: TextReader | None, sampler: SamplerSettings, *, model: str) -> list[str]:
    """What a person should know of a story before it is filmed, a line each; empty if all is read as written.

    Args:
        story: what is told.
        reader: of the model; None if its tokenizer is not on this machine.
        sampler: with its negative prompt.
        model: the model's name, for messages.
    """
    remarks = list(story.remarks)
    if reader is None:
        return [*remarks, f"prompts are not counted: the tokenizer of {model} is not on this machine"]
    readings = [(name, reader.read(text)) for name, text in _texts(story, sampler)]
    cut = [
        f"{name} has {reading.tokens} tokens, and {model} reads {reader.limit}: not read is {_ends(reading.cut)}"
        for name, reading in readings
        if reading.cut
    ]
    unknown: dict[str, list[str]] = {}
    for name, reading in readings:
        for word in reading.unknown:
            unknown.setdefault(word, []).append(name)
    return [*remarks, *_first(cut, "more texts are cut"), *_unknown(unknown, reader, model)]


def _texts(story: Story, sampler: SamplerSettings) -> Iterable[tuple[str, str]]:
    """Every text that is encoded, with the name under which people know it."""
    for shot in story.shots:
        yield f"{shot.label}: the prompt", shot.prompt
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
    shown = [f"{word} ({near}?)" if (near := reader.nearest(word)) else word for word in list(found)[:_MOST]]
    more = f" and {len(found) - _MOST} more" if len(found) > _MOST else ""
    places = list(dict.fromkeys(name.split(":")[0] for names in found.values() for name in names))
    where = ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
    line = f"words that {model} does not know: {', '.join(shown)}{more}; in {where}"
    if reader.words is None:
        return [line]
    known = ", ".join(sorted(reader.words, key=str.lower))
    return [line, f"{model} knows only these words (model=wan2.2-a14b is for any): {known}"]


def _ends(text: str) -> str:
    """A text by its beginning and its end."""
    return f'"{text}"' if len(text) <= 120 else f'"{text[:50]} ... {text[-50:]}" ({len(text):,} characters)'


def _first(lines: list[str], of_what: str) -> list[str]:
    return lines[:_MOST] + ([f"{len(lines) - _MOST} {of_what}"] if len(lines) > _MOST else [])
