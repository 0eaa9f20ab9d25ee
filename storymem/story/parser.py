"""Reading a story file: its text, its syntax, and YAML nodes with their line numbers.

YAML is composed into nodes and never constructed, so every value keeps its position in the file. JSON is read as YAML.
Each mistake becomes one line: where, what is wrong, what was expected, what to write.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path

import yaml

from storymem.config import closest, first_of
from storymem.io import FileError, check_regular, folded, folded_siblings, read_bytes

STORY_SUFFIXES = (".yaml", ".yml", ".json")
MAX_BYTES = 8 << 20
MAX_VALUES = 100_000  # in lists and mappings; those of an alias count at every use
MAX_TEXT = 20_000  # characters of one text
MAX_PROBLEMS = 100
_OF_THE_COMMAND = ("aspect", "size", "model", "seed")  # what is not in a story, and authors may look for
# YAML 1.1 also breaks lines where editors show none.
_LINE_BREAKS = {ord(sign): " " for sign in "\x85\u2028\u2029"}

_KINDS = {
    "int": "a number",
    "float": "a number",
    "bool": "true or false",
    "timestamp": "a date",
    "null": "empty",
}

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

    Raises:
        StoryError: if the file cannot be read, or its syntax is invalid.
    """

    def __init__(self, path: Path, text: str | None = None) -> None:
        self.path = path
        self.problems: list[tuple[int, str]] = []
        self._values = 0
        text = (_read_text(path) if text is None else text).translate(_LINE_BREAKS)
        self._text = _blank_comments(text) if path.suffix.lower() == ".json" else text
        root = _compose(path, self._text)
        if root is None:
            raise _refusal(path, 1, "the file is empty", "a story", "write at least title, overview and scenes")
        self.root: yaml.Node = root

    def note(self, node: yaml.Node, where: str, wrong: str, expected: str, cure: str) -> None:
        """Record a problem of ``where``, such as "shot 3 (scene 2, shot 1)", at the line of ``node``."""
        line = node.start_mark.line + 1
        self.problems.append((line, f"{self.path}:{line}: {where}: {wrong}; expected {expected}; {cure}"))
        if len(self.problems) == MAX_PROBLEMS:
            self.raise_if_faulty(f"{self.path}: reading stopped here, at {MAX_PROBLEMS} problems")

    def raise_if_faulty(self, *more: str) -> None:
        """Raise StoryError with all recorded problems in the order of the file's lines, then ``more`` lines."""
        if self.problems:
            raise StoryError([*(text for _, text in sorted(self.problems, key=lambda found: found[0])), *more])

    def refuse(self, node: yaml.Node, wrong: str, expected: str, cure: str) -> StoryError:
        """The error to raise where reading cannot continue."""
        return _refusal(self.path, node.start_mark.line + 1, wrong, expected, cure)

    def _count(self, node: yaml.CollectionNode) -> None:
        self._values += len(node.value)
        if self._values > MAX_VALUES:
            wrong = f"the story has more than {MAX_VALUES:,} values (those of an alias *name count at every use)"
            raise self.refuse(node, wrong, "a smaller story", "divide it into several")

    def mapping(
        self,
        node: yaml.Node,
        where: str,
        keys: tuple[str, ...],
        required: tuple[str, ...],
        example: str,
    ) -> dict[str, yaml.Node]:
        """The entries of a mapping by key; problems are recorded, and a misspelt key does not count as missing."""
        if not isinstance(node, yaml.MappingNode):
            self.note(node, where, f"found {self.excerpt(node)}", f"a mapping of {listing(keys)}", f"write {example}")
            return {}
        self._count(node)
        entries: dict[str, yaml.Node] = {}
        lines: dict[str, int] = {}
        misspelt = set()
        for key_node, value in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else self.excerpt(key_node)
            if key in lines:
                wrong = f"{shorten(key)} is repeated, first on line {lines[key]}"
                self.note(key_node, where, wrong, "each key once", "remove one of the two")
            elif key in keys:
                entries[key] = value
            else:
                near = None if key in _OF_THE_COMMAND else closest(key, keys)
                misspelt.add(near)
                cure = f"write {near} instead" if near else "remove it"
                if key in _OF_THE_COMMAND:
                    cure = f"remove it, and add {key}={self.excerpt(value)} to the command"
                if kind(value) == "null" and node.flow_style and not near:
                    cure = "put text that contains a comma in double quotes"
                self.note(key_node, where, f"unknown key {shorten(key)}", listing(keys), cure)
            lines.setdefault(key, key_node.start_mark.line + 1)
        for key in required:
            if key not in entries and key not in misspelt:
                self.note(node, where, f"{key} is missing", listing(required), f"write {key}: ...")
        return entries

    def items(self, node: yaml.Node | None, where: str, key: str, at_least: int = 0) -> list[yaml.Node]:
        """The items of a list; an absent key is an empty list."""
        if node is None:
            return []
        if not isinstance(node, yaml.SequenceNode):
            cure = f"write {key}: [...] instead"
            if kind(node) == "str":
                cure = f"write {key}: [{self.excerpt(node)}] instead"
            elif kind(node) == "null" and not at_least:
                cure = "leave the key out"
            self.note(node, where, f"{key} is {self.excerpt(node)}", "a list", cure)
            return []
        self._count(node)
        if len(node.value) < at_least:
            self.note(node, where, f"{key} is empty", "at least one", f"write {key}: [...]")
        return list(node.value)

    def string(
        self,
        node: yaml.Node | None,
        where: str,
        key: str,
        *,
        item: bool = False,
        empty: bool = False,
        verbatim: bool = False,
        at_most: int = MAX_TEXT,
    ) -> str | None:
        """The text of a node; None if absent or invalid.

        Args:
            node: the text.
            where: for messages, see :meth:`note`.
            key: its key in the story.
            item: whether it is an item of the list ``key``.
            empty: whether it may be empty.
            verbatim: whether white space is preserved, as in paths; otherwise it is collapsed.
            at_most: how many characters it may have.
        """
        if node is None:
            return None
        prefix = "write " if item else f"write {key}: "
        found = kind(node)
        if comment := self._comment_after(node):
            whole = self._text[node.start_mark.index : node.end_mark.index] + comment
            self.note(
                node,
                where,
                f"{key} ends before #, which begins a comment: {shorten(comment.strip())} would not be read",
                "quotes around text that contains #",
                f"{prefix}{quoted(' '.join(whole.split()))} instead, or the comment on a line of its own",
            )
            return None
        if found != "str":
            meant = '"..."' if found == "null" else quoted(self.excerpt(node).strip("\"'"))
            wrong = f"{key} is read as {_KINDS.get(found, f'a {found}')}"
            self.note(node, where, wrong, "text", f"{prefix}{meant} instead")
            return None
        try:  # PyYAML leaves the two halves of JSON's escaped surrogate pairs apart.
            text = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self.note(node, where, f"{key} contains half of a character (\\ud800 to \\udfff)", "text", "remove it")
            return None
        text = text if verbatim else " ".join(text.split())
        if not text.strip() and not empty:
            self.note(node, where, f"{key} is empty", "text", f'{prefix}"..."')
            return None
        if len(text) > at_most:
            self.note(node, where, f"{key} has {len(text):,} characters", f"at most {at_most:,}", "shorten it")
            return None
        shown = text.replace("\t", " ")  # which file names may contain
        if (control := next((sign for sign in shown if unicodedata.category(sign) == "Cc"), None)) is not None:
            self.note(node, where, f"{key} contains the control character {control!a}", "plain text", "remove it")
            return None
        return text

    def _comment_after(self, node: yaml.Node) -> str:
        """What YAML reads as a comment after a text without quotes; empty if there is none."""
        if not isinstance(node, yaml.ScalarNode) or node.style:
            return ""
        end = self._text.find("\n", node.end_mark.index)
        rest = self._text[node.end_mark.index : None if end < 0 else end]
        return rest.rstrip() if re.match(r"[ \t]+#", rest) else ""

    def integer(self, node: yaml.Node | None, where: str, key: str) -> int | None:
        """A whole number from 0, in plain decimal digits; None if absent or invalid."""
        if node is None:
            return None
        if kind(node) == "int" and re.fullmatch(r"0|[1-9][0-9]{0,17}", node.value):
            return int(node.value)
        digits = re.search(r"(?<![0-9-])[0-9]+", node.value) if isinstance(node, yaml.ScalarNode) else None
        cure = f"write {key}: {int(digits[0][:18])} instead" if digits else f"write a number or leave {key} out"
        self.note(node, where, f"{key} is {self.excerpt(node)}", "a whole number from 0", cure)
        return None

    def excerpt(self, node: yaml.Node) -> str:
        """The beginning of a node's text in the file, for messages."""
        raw = self._text[node.start_mark.index : min(node.end_mark.index, node.start_mark.index + 1000)]
        return shorten(" ".join(raw.split())) or "empty"


def kind(node: yaml.Node) -> str:
    """The short name of a node's YAML type: str, int, bool, null, mapping, list, ..."""
    if isinstance(node, yaml.ScalarNode):
        return str(node.tag).rsplit(":", 1)[-1]
    return "mapping" if isinstance(node, yaml.MappingNode) else "list"


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
