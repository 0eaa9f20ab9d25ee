"""The JSON schema of a story in our format, for editors and language models."""

from __future__ import annotations

from typing import Any

from storymem.story import schema


def story_schema() -> dict[str, Any]:
    """The JSON schema, from the parser's keys and limits."""
    text: dict[str, Any] = {"type": "string", "pattern": r"\S", "maxLength": 20_000}
    name = text | {"maxLength": schema.MAX_NAME}
    paths = {"type": "array", "items": text | {"maxLength": schema.MAX_PATH}}
    whole = {"type": "integer", "minimum": 0}
    shot = {
        "prompt": text | {"description": "what is seen, one to four sentences"},
        "cut": {"type": "boolean", "default": True, "description": "false: begins where the shot before ended"},
        "characters": {"type": "array", "items": name, "description": "names out of the story's characters"},
        "frames": whole | {"minimum": 1, "maximum": schema.MAX_FRAMES, "description": "length, 4n + 1"},
        "seed": whole,
        "negative_prompt": {"type": "string", "maxLength": 20_000},
        "references": paths | {"description": "images that join the memory just before this shot"},
    }
    shots = {"type": "array", "minItems": 1, "items": _object(shot, schema._SHOT_KEYS, ["prompt"])}
    look = text | {"description": "the look; follows every prompt of a shot that lists the character"}
    character = {"name": name, "description": look, "references": paths}
    story = {
        "title": name,
        "overview": text,
        "style": name | {"description": "begins every prompt that the model is given"},
        "genre": name | {"description": "a label; changes nothing"},
        "reconstruct_target": text | {"description": "the looks of all characters, one a line, for method=memento"},
        "characters": {"type": "array", "items": _object(character, schema._CHARACTER_KEYS, ["name"])},
        "scenes": {"type": "array", "minItems": 1, "items": _object({"shots": shots}, schema._SCENE_KEYS, ["shots"])},
    }
    required = ["title", "overview", "scenes"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "StoryMem story",
        **_object(story, schema._STORY_KEYS, required),
    }


def _object(properties: dict[str, Any], keys: tuple[str, ...], required: list[str]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {key: properties[key] for key in keys},
        "required": required,
        "additionalProperties": False,
    }
