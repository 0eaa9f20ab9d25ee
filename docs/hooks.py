"""Pages that are generated when the documentation is built: the configuration reference, the story schema, the
vocabulary of the embedded model. Needs no mkdocs until it runs inside it."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from storymem.commands.cli import COMMANDS
from storymem.composition import SETTINGS, arguments_of
from storymem.story.json_schema import story_schema

SCHEMA = Path(__file__).with_name("story.schema.json")
_VOCABULARY = Path(__file__).parents[1] / "toyworld/weights/tokenizer/known_words.txt"


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: add the generated page."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "reference/configuration.md", content=configuration()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs: insert the vocabulary."""
    return markdown.replace("<!-- vocabulary -->", vocabulary())


def configuration() -> str:
    """Every settings class of every command as a table, nested classes after those that hold them."""
    lines = [
        "# Configuration",
        "",
        "Generated from the settings classes. Write `key.subkey=value` on the command line.",
    ]
    seen: set[type] = set()
    for name, command in COMMANDS.items():
        if command.config is None:
            continue
        lines += ["", f"## storymem {name}", ""]
        lines += [f"`configs/{command.config}.yaml`; `storymem {name} --help` lists the groups.", ""]
        waiting = [("", resolve_name(SETTINGS[command.config]))]
        while waiting:
            path, cls = waiting.pop(0)
            if path:
                lines += ["", f"### `{path}` {{: #{name}-{path.replace('.', '-')} }}", ""]
            if path and cls in seen:
                lines.append(f"See [`{cls.__name__}` above](#{_anchor(cls)}).")
                continue
            seen.add(cls)
            lines += [f'<a id="{_anchor(cls)}"></a>', "", *_table(cls)]
            hints = typing.get_type_hints(cls)
            for field in dataclasses.fields(cls):
                inner = [kind for kind in _members(hints[field.name]) if dataclasses.is_dataclass(kind)]
                waiting += [(f"{path}.{field.name}".lstrip("."), kind) for kind in inner]
    return "\n".join(lines) + "\n"


def _table(cls: type) -> list[str]:
    meanings, hints = arguments_of(cls), typing.get_type_hints(cls)
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(cls):
        cells = [f"`{field.name}`", f"`{_type(hints[field.name])}`", _default(field), meanings.get(field.name, "")]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _type(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    if len(members := _members(annotation)) > 1:
        return " | ".join(map(_type, members))
    if arguments := typing.get_args(annotation):
        return f"{typing.get_origin(annotation).__name__}[{', '.join(map(_type, arguments))}]"
    return {type(None): "null", ...: "..."}.get(annotation) or getattr(annotation, "__name__", str(annotation))


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{json.dumps(field.default, default=str)}`"
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return "" if dataclasses.is_dataclass(made) else f"`{json.dumps(made, default=str)}`"
    return "required"


def _members(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _anchor(cls: type) -> str:
    return cls.__name__.lower()


def vocabulary() -> str:
    """The words that the embedded model knows, but for articles and the like."""
    return ", ".join(f"*{word}*" for word in _VOCABULARY.read_text(encoding="utf-8").split())


if __name__ == "__main__":  # writes the schema that the repository holds
    SCHEMA.write_text(json.dumps(story_schema(), indent=2) + "\n", encoding="utf-8")
