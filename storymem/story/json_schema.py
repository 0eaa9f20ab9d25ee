"""The keys of story files and their limits, as JSON schemas: for reading, for editors and for language models."""

from __future__ import annotations

from typing import Any

MAX_TEXT = 20_000  # characters
MAX_FRAMES = 4093  # of one shot: 1023 latent frames after the first, the limit of the networks' positions


def _text(limit: int = MAX_TEXT, **more: Any) -> dict[str, Any]:
    return {"type": "string", "pattern": r"\S", "maxLength": limit, **more}


def _list(items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


def _object(*required: str, **properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


_NAME, _PATHS, _WHOLE = _text(300), _list(_text(4096)), {"type": "integer", "minimum": 0}
_LOOKS = _text(description="the looks of all characters, one a line, for method=memento")

CHARACTER = _object(
    "name",
    name=_NAME,
    references=_PATHS,
    description=_text(description="the look; follows every prompt of a shot that lists the character"),
)
SHOT = _object(
    "prompt",
    prompt=_text(description="what is seen, one to four sentences"),
    cut={"type": "boolean", "default": True, "description": "false: begins where the shot before ended"},
    characters=_list(_NAME, description="names out of the story's characters"),
    frames={"type": "integer", "minimum": 1, "maximum": MAX_FRAMES, "description": "length, 4n + 1"},
    seed=_WHOLE,
    negative_prompt={"type": "string", "maxLength": MAX_TEXT},
    references=_PATHS | {"description": "images that join the memory just before this shot"},
)
STORY = _object(
    *("title", "overview", "scenes"),
    title=_NAME,
    overview=_text(),
    style=_NAME | {"description": "begins every prompt that the model is given"},
    genre=_NAME | {"description": "a label; changes nothing"},
    characters=_list(CHARACTER),
    scenes=_list(_object("shots", shots=_list(SHOT, minItems=1)), minItems=1),
    reconstruct_target=_LOOKS,
)

#: ST-Bench's form, whose cuts may also be texts.
BENCH_SCENE = _object(
    "video_prompts",
    scene_num=_WHOLE,
    video_prompts=_list(_text(), minItems=1),
    first_frame_prompt={},
    cut=_list({"type": "boolean"}),
)
BENCH_STORY = _object(
    *("story_name", "story_overview", "scenes"),
    story_name=_NAME,
    story_overview=_text(),
    scenes=_list(BENCH_SCENE, minItems=1),
    reconstruct_target=_LOOKS,
)


def story_schema() -> dict[str, Any]:
    """The JSON schema of a story in our form."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "StoryMem story", **STORY}
