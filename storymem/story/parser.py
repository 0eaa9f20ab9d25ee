"""Reading a story file: its text, its syntax, and YAML nodes with their line numbers.

YAML is composed into nodes and never constructed, so every value keeps its position in the file. JSON is read as YAML.
Each mistake becomes one line: where, what is wrong, what was expected, what to write.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from storymem.config import closest, first_of
from storymem.io import FileError, check_regular, folded, folded_siblings, read_bytes
from storymem.story.json_schema import BENCH_STORY, STORY

STORY_SUFFIXES = (".yaml", ".yml", ".json")
MAX_BYTES = 8 << 20
MAX_VALUES = 100_000  # in lists and mappings; those of an alias count at every use
MAX_PROBLEMS = 100
_OF_THE_COMMAND = ("aspect", "size", "model", "seed")  # what is not in a story, and authors may look for
# YAML 1.1 also breaks lines where editors show none.
_LINE_BREAKS = {ord(sign): " " for sign in "\x85\u2028\u2029"}

_KINDS = {"int": "a number", "float": "a number", "bool": "true or false", "timestamp": "a date", "null": "empty"}

# Likely causes of syntax errors: a part of the parser's message, what is expected, what to do.
_QUOTE = "put the whole text in double quotes"
_LOOK = "look for a missing comma, colon, bracket or quote here or just above"
_SYNTAX = (
    ("mapping values are not", 'no ": " inside text without quotes', _QUOTE),
    ("'\\t'", "spaces at the start of lines", "replace the tab with spaces"),
    ("cannot start any token", "quotes around text that begins with this character", _QUOTE),
    ("alphabetic or numeric character", "quotes around text that begins with * or &", _QUOTE),
    ("end of stream", "a closing quote", "close the quote that opens on this line"),
    ("unknown escape", "\\\\ for a backslash inside double quotes", "write \\\\, or use single quotes"),
    ("found undefined alias", "quotes around text that begins with *", _QUOTE),
    ("<block end>", "one entry a line, in one column", "look for a wrong indent or quote here or above"),
    ("expected ','", "a comma between entries", _LOOK),
    ("could not find expected ':'", "key: value", _LOOK),
    ("found another document", "one story in a file", "remove the line ---"),
)


class StoryError(ValueError):
    """A story that cannot be read; ``problems`` has one line per mistake, in the file's order."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class StoryFile:
    """One story file. Mistakes in the content are collected and reported together.

    Args:
        path: the file.
        text: its text, if that is not what the file holds.

    Attributes:
        root: the whole content.
        is_bench: whether it has the form of ST-Bench.

    Raises:
        StoryError: if the file cannot be read, or its syntax is invalid.
    """

    def __init__(self, path: Path, text: str | None = None) -> None:
        self.path = path
        self.problems: list[tuple[int, str]] = []
        self._values = 0
        text = (_read_text(path) if text is None else text).translate(_LINE_BREAKS)
        self.text = _blank_comments(text) if path.suffix.lower() == ".json" else text
        root = _compose(path, self.text)
        if root is None:
            raise _refusal(path, 1, "the file is empty", "a story", "write at least title, overview and scenes")
        is_mapping = isinstance(root, yaml.MappingNode)
        self.is_bench = is_mapping and any(key.value in ("story_name", "story_overview") for key, _ in root.value)
        self.root = Value(self, root, BENCH_STORY if self.is_bench else STORY)

    def add_problem(self, line: int, problem: str) -> None:
        """Record a problem at a line of the file."""
        self.problems.append((line, f"{self.path}:{line}: {problem}"))
        if len(self.problems) == MAX_PROBLEMS:
            self.raise_if_faulty(f"{self.path}: reading stopped here, at {MAX_PROBLEMS} problems")

    def raise_if_faulty(self, *more: str) -> None:
        """Raise StoryError with all recorded problems in the order of the file's lines, then ``more`` lines."""
        if self.problems:
            raise StoryError([*(text for _, text in sorted(self.problems, key=lambda found: found[0])), *more])

    def count(self, collection: Value) -> None:
        """Add the values of a list or a mapping to those read so far; ``StoryError`` if they are too many."""
        self._values += len(collection.node.value)
        if self._values > MAX_VALUES:
            wrong = f"the story has more than {MAX_VALUES:,} values (those of an alias *name count at every use)"
            raise collection.refusal(wrong, "a smaller story", "divide it into several")


@dataclass(frozen=True)
class Value:
    """A value in a story file, or the place for one. What is wrong with it is recorded in its file.

    Args:
        file: the file.
        node: of YAML; None if it is not given.
        schema: what it may be, from :mod:`storymem.story.json_schema`.
        where: what it belongs to, for messages, such as "shot 3 (scene 2, shot 1)".
        key: its key, or that of the list that it is in.
        is_item: whether it is in a list.
    """

    file: StoryFile
    node: Any
    schema: Mapping[str, Any] = field(default_factory=dict)
    where: str = "story"
    key: str = ""
    is_item: bool = False

    def at(self, where: str) -> Value:
        """The same value, of ``where``."""
        return replace(self, where=where)

    @property
    def line(self) -> int:
        """Where it begins in the file, from 1."""
        return self.node.start_mark.line + 1

    @property
    def kind(self) -> str:
        """The short name of its YAML type: str, int, bool, null, mapping, list, ..."""
        if isinstance(self.node, yaml.ScalarNode):
            return str(self.node.tag).rsplit(":", 1)[-1]
        return "mapping" if isinstance(self.node, yaml.MappingNode) else "list"

    @property
    def excerpt(self) -> str:
        """The beginning of its text in the file, for messages."""
        begin, end = self.node.start_mark.index, self.node.end_mark.index
        return shorten(" ".join(self.file.text[begin : min(end, begin + 1000)].split())) or "empty"

    def note(self, wrong: str, expected: str, cure: str) -> None:
        """Record that it is wrong."""
        self.file.add_problem(self.line, f"{self.where}: {wrong}; expected {expected}; {cure}")

    def refusal(self, wrong: str, expected: str, cure: str) -> StoryError:
        """The error to raise where reading cannot continue."""
        return _refusal(self.file.path, self.line, wrong, expected, cure)

    def mapping(self, where: str, example: str = "") -> dict[str, Value]:
        """The entries of a mapping, which is ``where``, by all its keys. A misspelt key does not count as missing."""
        keys, required, whole = [*self.schema["properties"]], self.schema["required"], self.at(where)
        entries = {key: Value(self.file, None, schema, where, key) for key, schema in self.schema["properties"].items()}
        if not isinstance(self.node, yaml.MappingNode):
            text = quoted(self.node.value) if isinstance(self.node, yaml.ScalarNode) else '"..."'
            example = example or f"- {{{required[0]}: {text}}}"
            whole.note(f"found {self.excerpt}", f"a mapping of {listing(keys)}", f"write {example}")
            return entries
        self.file.count(self)
        lines: dict[str, int] = {}
        misspelt = set()
        for key_node, node in self.node.value:
            name, value = (replace(whole, node=one) for one in (key_node, node))
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else name.excerpt
            if key in lines:
                wrong = f"{shorten(key)} is repeated, first on line {lines[key]}"
                name.note(wrong, "each key once", "remove one of the two")
            elif key in keys:
                entries[key] = replace(entries[key], node=node)
            else:
                near = None if key in _OF_THE_COMMAND else closest(key, keys)
                misspelt.add(near)
                cure = f"write {near} instead" if near else "remove it"
                if key in _OF_THE_COMMAND:
                    cure = f"remove it, and add {key}={value.excerpt} to the command"
                if value.kind == "null" and self.node.flow_style and not near:
                    cure = "put text that contains a comma in double quotes"
                name.note(f"unknown key {shorten(key)}", listing(keys), cure)
            lines.setdefault(key, name.line)
        for key in required:
            if entries[key].node is None and key not in misspelt:
                whole.note(f"{key} is missing", listing(required), f"write {key}: ...")
        return entries

    def items(self) -> list[Value]:
        """The items of a list; of an absent one none."""
        if self.node is None:
            return []
        if not isinstance(self.node, yaml.SequenceNode):
            cure = f"write {self.key}: [...] instead"
            if self.kind == "str":
                cure = f"write {self.key}: [{self.excerpt}] instead"
            elif self.kind == "null" and "minItems" not in self.schema:
                cure = "leave the key out"
            self.note(f"{self.key} is {self.excerpt}", "a list", cure)
            return []
        self.file.count(self)
        if len(self.node.value) < self.schema.get("minItems", 0):
            self.note(f"{self.key} is empty", "at least one", f"write {self.key}: [...]")
        return [replace(self, node=node, schema=self.schema["items"], is_item=True) for node in self.node.value]

    def string(self, *, verbatim: bool = False) -> str | None:
        """The text; None if absent or invalid. White space is collapsed, or preserved if ``verbatim``, as in paths."""
        if self.node is None:
            return None
        key, prefix = self.key, "write " if self.is_item else f"write {self.key}: "
        if comment := self._comment():
            whole = self.file.text[self.node.start_mark.index : self.node.end_mark.index] + comment
            self.note(
                f"{key} ends before #, which begins a comment: {shorten(comment.strip())} would not be read",
                "quotes around text that contains #",
                f"{prefix}{quoted(' '.join(whole.split()))} instead, or the comment on a line of its own",
            )
            return None
        if self.kind != "str":
            meant = '"..."' if self.kind == "null" else quoted(self.excerpt.strip("\"'"))
            wrong = f"{key} is read as {_KINDS.get(self.kind, f'a {self.kind}')}"
            self.note(wrong, "text", f"{prefix}{meant} instead")
            return None
        try:  # PyYAML leaves the two halves of JSON's escaped surrogate pairs apart.
            text = self.node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self.note(f"{key} contains half of a character (\\ud800 to \\udfff)", "text", "remove it")
            return None
        text = text if verbatim else " ".join(text.split())
        shown = text.replace("\t", " ")  # which file names may contain
        control = next((sign for sign in shown if unicodedata.category(sign) == "Cc"), None)
        if not text.strip() and "pattern" in self.schema:
            self.note(f"{key} is empty", "text", f'{prefix}"..."')
        elif len(text) > (at_most := self.schema["maxLength"]):
            self.note(f"{key} has {len(text):,} characters", f"at most {at_most:,}", "shorten it")
        elif control is not None:
            self.note(f"{key} contains the control character {control!a}", "plain text", "remove it")
        else:
            return text
        return None

    def _comment(self) -> str:
        """What YAML reads as a comment after a text without quotes; empty if there is none."""
        if not isinstance(self.node, yaml.ScalarNode) or self.node.style:
            return ""
        text = self.file.text
        end = text.find("\n", self.node.end_mark.index)
        rest = text[self.node.end_mark.index : None if end < 0 else end]
        return rest.rstrip() if re.match(r"[ \t]+#", rest) else ""

    def integer(self) -> int | None:
        """A whole number from 0, in plain decimal digits; None if absent or invalid."""
        if self.node is None:
            return None
        if self.kind == "int" and re.fullmatch(r"0|[1-9][0-9]{0,17}", self.node.value):
            return int(self.node.value)
        value = self.node.value if isinstance(self.node, yaml.ScalarNode) else ""
        one = re.fullmatch(r"[^0-9-]*([0-9][0-9_]*)(\.0*)?[^0-9]*", value)  # not 12:30, in which there are two
        digits = one[1].replace("_", "")[:18] if one else ""
        cure = f"write {self.key}: {int(digits)} instead" if digits else f"write a number or leave {self.key} out"
        self.note(f"{self.key} is {self.excerpt}", "a whole number from 0", cure)
        return None


def nearest_file(path: Path, suffixes: Collection[str]) -> Path | None:
    """The file in the folder of ``path``, with one of the ``suffixes``, that has the most similar name."""
    beside = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    names = {one.stem: one.name for one in beside if one.suffix.lower() in suffixes and one.exists()}
    near = closest(path.stem, names)
    return None if near is None else path.with_name(names[near])


def image_fault(path: Path) -> tuple[str, str] | None:
    """Why ``path`` cannot be used as a reference image and what to do about it, or None."""
    try:
        check_regular(path)
    except FileNotFoundError:
        alike = folded_siblings(path)  # several: a single one is used
        near = nearest_file(path, (".png", ".jpg", ".jpeg", ".webp"))
        names = " or ".join(as_written(one.name) for one in alike or ([near] if near else []))
        return "does not exist", f"write {names} instead" if names else "put the image there or correct the path"
    except FileError as error:
        return f"cannot be used: {error}", "write the path of an image"
    from storymem.media.images import ImageError, read_image

    try:
        read_image(path)
    except ImageError as error:
        return error.reason, error.cure
    return None


def listing(words: Sequence[str]) -> str:
    return first_of(words, 20)


def shorten(text: str) -> str:
    text = text if len(text) <= 60 else text[:57] + "..."
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def as_written(name: str) -> str:
    """A file's name as a story can write it; characters that look like others, such as some spaces, are escaped."""
    if re.fullmatch(r"[\w./-]+", name) and folded(name) == name:
        return name
    escaped = json.dumps(name, ensure_ascii=folded(name) != name)
    return re.sub("(?<= ) ", r"\\u0020", escaped)


def quoted(text: str) -> str:
    return '"' + shorten(text).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _refusal(path: Path, line: int | None, wrong: str, expected: str, cure: str) -> StoryError:
    place = f"{path}" if line is None else f"{path}:{line}"
    return StoryError([f"{place}: {wrong}; expected {expected}; {cure}"])


def _read_text(path: Path) -> str:
    """The file's text. ``StoryError`` if it cannot be read."""
    if path.is_dir():
        raise _refusal(path, None, "this is a folder", "a story file", "write the path of a file in it instead")
    if path.is_symlink() and not path.exists():
        raise _refusal(path, None, "this is a broken link", "a story file", "write the path of the file itself")
    if not path.exists():
        near = nearest_file(path, STORY_SUFFIXES)
        cure = f"write {near} instead" if near else "check the path"
        raise _refusal(path, None, "the file does not exist", "a story file", cure)
    if path.suffix.lower() not in STORY_SUFFIXES:
        expected = f"a name that ends in {listing(STORY_SUFFIXES)}"
        raise _refusal(path, None, "this is not the name of a story file", expected, "rename it if it is a story")
    try:
        content = read_bytes(path, limit=MAX_BYTES)
    except FileError as error:
        raise StoryError([str(error)]) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _refusal(path, line, "the file is not UTF-8 text", "UTF-8", "save the file as UTF-8") from None


def _blank_comments(text: str) -> str:
    """JSON with comments and tabs replaced by spaces, so that YAML can read it with the same line numbers."""
    # An unclosed comment or string reaches to the end; else the time would be quadratic in the number of openings.
    token = re.compile(r'"(?:\\.|[^"\\])*+"?|//[^\n]*|/\*.*?(?:\*/|\Z)|\t', re.DOTALL)
    return token.sub(lambda found: found[0] if found[0][0] == '"' else re.sub(r"[^\n]", " ", found[0]), text)


def _compose(path: Path, text: str) -> yaml.Node | None:
    """The file's nodes, by libyaml if installed; error messages come from the parser in Python."""
    try:
        try:
            return yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except yaml.YAMLError:
            return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise _syntax_error(path, text, error) from None
    except RecursionError:
        raise _refusal(path, None, "the file is nested too deeply", "a story", "look for too many [ or {") from None


def _syntax_error(path: Path, text: str, error: yaml.YAMLError) -> StoryError:
    """The parser's error as a message for authors of stories."""
    language = "JSON" if path.suffix.lower() == ".json" else "YAML"
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return _refusal(path, line, "found an invisible control character", "plain text", "remove it")
    assert isinstance(error, yaml.MarkedYAMLError), error
    problem = error.problem or error.context or ""
    mark = error.problem_mark
    # An unclosed bracket or quote is reported where it was opened.
    if mark is None or any(piece in problem for piece in ("end of stream", "stream end", "expected ':'")):
        mark = error.context_mark or mark
    example = (
        'JSON in which every {, [ and " is closed' if language == "JSON" else "YAML as in examples/the_keeper.yaml"
    )
    default = (example, "check this line and the one above")
    expected, cure = next((rest for piece, *rest in _SYNTAX if piece in problem), default)
    if language == "YAML" and _holds_comment(text, [error.context_mark, error.problem_mark]):
        cure += "; text that contains # needs double quotes"
    return _refusal(path, mark.line + 1 if mark else 1, f"this is not valid {language} ({problem})", expected, cure)


def _holds_comment(text: str, marks: Sequence[yaml.Mark | None]) -> bool:
    """Whether a comment follows text on a marked line, or on the line before the last mark."""
    lines = text.split("\n")
    numbers = [mark.line for mark in marks if mark is not None]
    near = {*numbers, *(number - 1 for number in numbers[-1:])}
    return any(re.search(r"\S\s+#", lines[number]) for number in near if 0 <= number < len(lines))
