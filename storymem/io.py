"""Reading and writing files: what is read is a regular file with a size limit, what is written is whole or absent.

Every error names the file. Loads no torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import yaml

logger = logging.getLogger(__name__)

MAX_TEXT_BYTES = 64 << 20
MAX_DEPTH = 64  # of nested lists and mappings in JSON
_LEFTOVERS = re.compile(r"^(\..+\.partial|\.tmp[A-Za-z0-9]{6})$")  # this module's, and those of safetensors
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this process may write",
}
_AGAIN = "make room and run the same command again"


class FileError(ValueError):
    """A file that cannot be read or written; the message names it and what to do."""


# --- reading --------------------------------------------------------------------------------------------------------


def check_regular(path: str | Path) -> Path:
    """``path``, if it is a regular file that exists and can be opened; never blocks on a FIFO or a device.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        FileError: for a folder, FIFO, device or socket, a name no file can have, or missing permission.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise FileError(f"{path} cannot be opened: {_reason(error)}") from None
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "not a regular file (a FIFO, device or socket)"
        raise FileError(f"{path} is {what}: name a file")
    if not os.access(path, os.R_OK):
        raise FileError(f"{path} cannot be read: permission denied; ask its owner for chmod a+r")
    return path


def read_bytes(path: str | Path, *, limit: int = MAX_TEXT_BYTES) -> bytes:
    """The content of a regular file of at most ``limit`` bytes. Raises as :func:`check_regular`."""
    path = check_regular(path)
    if (size := path.stat().st_size) > limit:
        raise FileError(f"{path} has {size:,} bytes; at most {limit:,} are read")
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"{path} cannot be read: {_reason(error)}") from None


def read_text(path: str | Path, *, limit: int = MAX_TEXT_BYTES) -> str:
    """The text of a UTF-8 file; a byte order mark is dropped, and line ends become newlines.

    Raises:
        FileNotFoundError, FileError: as :func:`check_regular`; also naming the line that is not UTF-8.
    """
    content = read_bytes(path, limit=limit)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise FileError(f"{path}:{line}: this is not UTF-8 text: save the file as UTF-8") from None
    if "\0" in text:
        raise FileError(f"{path} holds NUL characters, as UTF-16 does: save the file as UTF-8")
    return text.replace("\r\n", "\n")


def text_lines(text: str) -> list[str]:
    """Lines split on newline only (``str.splitlines`` also splits on U+2028 and others, which JSON may hold)."""
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def parse_json(text: str, where: str) -> Any:
    """JSON of bounded depth, without NaN or Infinity; ``where`` names the file (and line) in messages.

    Raises:
        FileError: with the line and column, or what is not allowed.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise FileError(f"{where} is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise FileError(f"{where} is nested too deeply: at most {MAX_DEPTH} levels are read") from None
    except ValueError as error:  # a number of thousands of digits, NaN
        raise FileError(f"{where} cannot be read: {error}") from None
    _check_value(value, where)
    return value


def read_json(path: str | Path, *, limit: int = MAX_TEXT_BYTES) -> Any:
    """The content of a JSON file. Raises as :func:`read_text` and :func:`parse_json`."""
    return parse_json(read_text(path, limit=limit), str(path))


def read_json_object(path: str | Path, *, limit: int = MAX_TEXT_BYTES) -> dict[str, Any]:
    """The content of a JSON file that holds one object. Raises as :func:`read_json`."""
    value = read_json(path, limit=limit)
    if not isinstance(value, dict):
        raise FileError(f"{path} holds {type(value).__name__} where a JSON object is expected")
    return value


class _StrictLoader(yaml.SafeLoader):
    """YAML without aliases, which can multiply what is written, and without keys written twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"the alias *{event.anchor} is not read; write the value in both places"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is written twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """YAML of bounded depth, without tags, aliases and keys written twice; ``where`` names the file.

    Raises:
        FileError: with the line, or what is not allowed.
    """
    try:
        value = yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise FileError(f"{where}{line}: this is not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:  # control characters; a date or number that does not exist
        raise FileError(f"{where} is not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise FileError(f"{where} is nested too deeply: at most {MAX_DEPTH} levels are read") from None
    _check_value(value, where)
    return value


def read_yaml(path: str | Path, *, limit: int = 1 << 20) -> Any:
    """The content of a YAML file. Raises as :func:`read_text` and :func:`parse_yaml`."""
    return parse_yaml(read_text(path, limit=limit), str(path))


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _check_value(value: Any, where: str) -> None:
    """Refuse depth beyond ``MAX_DEPTH`` and numbers that are not finite (1e999), without recursion."""
    stack = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise FileError(f"{where} is nested too deeply: at most {MAX_DEPTH} levels are read")
        if isinstance(item, float) and not math.isfinite(item):
            raise FileError(f"{where} holds a number that is not finite")
        if isinstance(item, dict):
            stack.extend((child, depth + 1) for child in item.values())
        elif isinstance(item, list):
            stack.extend((child, depth + 1) for child in item)


def folded(name: str) -> str:
    """A name in NFKC, with white space of any kind and length as one space.

    For comparison where exact comparison found nothing, and only where exactly one candidate matches.
    """
    return " ".join(unicodedata.normalize("NFKC", name).split())


def find_sibling(path: str | Path) -> Path | None:
    """``path`` if it exists, else the one file of an equal name after :func:`folded`, of its folders too, or None."""
    path = Path(path)
    if os.path.exists(path):
        return path
    parent = None if path.parent == path else find_sibling(path.parent)
    same = [] if parent is None else folded_siblings(parent / path.name)
    return same[0] if len(same) == 1 else None


def folded_siblings(path: Path) -> list[Path]:
    """What lies beside ``path`` and has an equal name after :func:`folded`, in order."""
    if not os.path.isdir(path.parent):
        return []
    return sorted(other for other in path.parent.iterdir() if folded(other.name) == folded(path.name))


def files_below(folder: str | Path) -> Iterator[Path]:
    """The files in a folder and its sub-folders, also through links; hidden folders are skipped."""
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(files))


# --- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary file beside ``path``, which replaces ``path`` at the end of the block.

    If the block raises, ``path`` stays as it was. The file's mode obeys the umask. A process killed inside the block
    leaves the temporary file, which the next write of the same file overwrites and :func:`remove_leftovers` deletes.
    One writer at a time: see :func:`folder_lock`.

    Raises:
        FileError: if the disk is full or ``path`` cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with naming_full_disk(path):
            partial.unlink(missing_ok=True)
            partial.touch()
            mode = stat.S_IMODE(partial.stat().st_mode)
            yield partial
            partial.chmod(mode)  # safetensors writes with mode 600
            _flush(partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a whole file in one step. Raises as :func:`replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file in one step. Raises as :func:`replacing`."""
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, value: Any, *, indent: int | None = 1) -> None:
    """Write a JSON file in one step; ``ValueError`` for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path``, which replaces ``path`` at the end of the block.

    Its files are flushed to the disk before that. If the block raises, ``path`` stays as it was. Files that only the
    former folder has are moved into the new one: they may be the user's own. What a killed process left
    is cleaned up by the next call. One writer at a time.

    Raises:
        FileError: if the disk is full or ``path`` cannot be written.
    """
    path = Path(path).resolve()  # a link to a folder on another disk stays a link
    partial, old = _beside(path)
    with naming_full_disk(path):
        settle_folder(path)
        partial.mkdir(parents=True)
        try:
            yield partial
            for inside in [*partial.rglob("*"), partial]:
                _flush(inside)
            if path.exists():
                path.rename(old)
            partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _flush(path.parent)
        _merge(old, path)


def settle_folder(path: str | Path) -> None:
    """Remove what a process killed in :func:`replacing_folder` left beside ``path``, or put the former folder back."""
    path = Path(path)
    partial, old = _beside(path)
    if old.exists() and not path.exists():  # killed between the two renames
        old.rename(path)
    _merge(old, path)
    if partial.exists():
        shutil.rmtree(partial)


def set_aside(path: Path) -> None:
    """Give a file that the user changed, and that is written again, another name; a warning says which."""
    aside = next(p for n in count(1) if not os.path.lexists(p := path.with_stem(f"{path.stem}_{n}")))
    path.rename(aside)
    logger.warning(f"{path} was changed since it was written: it is now {aside.name}, and {path.name} is written again")


def _beside(path: Path) -> tuple[Path, Path]:
    return path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old.partial")


def _merge(old: Path, new: Path) -> None:
    """Move what ``new`` does not have out of ``old``, and delete the rest of ``old``."""
    if not old.exists():
        return
    for path in sorted(old.rglob("*")):
        target = new / path.relative_to(old)
        if (path.is_file() or path.is_symlink()) and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    shutil.rmtree(old)


def _flush(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming_full_disk(path: str | Path) -> Iterator[None]:
    """Turn the many errors of writers on a full disk or past a file size limit into a FileError with the reason.

    torch, safetensors and codecs report such an error as RuntimeError with a text of their own.
    """
    try:
        yield
    except FileError:
        raise
    except Exception as error:
        if (reason := _write_failure(error, Path(path))) is not None:
            raise FileError(f"{path} could not be written: {reason}") from error
        raise


def describe_os_error(error: OSError) -> str | None:
    """An error of the operating system in one line that names the file; None for others, such as of a network."""
    if error.errno is None or isinstance(error, ConnectionError | TimeoutError):
        return None
    if (known := _FULL.get(error.errno)) is not None:
        reason = f"{known}; {_AGAIN}"
    elif isinstance(error, PermissionError):
        reason = "permission denied; choose another path, or ask its owner"
    else:
        reason = _reason(error)
    return reason if error.filename is None else f"{os.fsdecode(error.filename)}: {reason}"


def _write_failure(error: BaseException, path: Path) -> str | None:
    cause: BaseException | None = error
    while cause is not None:
        number, text = getattr(cause, "errno", None), str(cause)
        for known, reason in _FULL.items():
            if number == known or os.strerror(known) in text or f"os error {known}" in text:
                return f"{reason}; {_AGAIN}"
        if isinstance(cause, PermissionError) or "os error 13" in text:
            return "permission denied; choose another output"
        if isinstance(cause, IsADirectoryError | NotADirectoryError | FileExistsError):
            return "something of another kind has that name; move it away"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, OSError | RuntimeError) or type(error).__name__ == "SafetensorError":
        folder = path if path.is_dir() else path.parent
        if folder.is_dir() and shutil.disk_usage(folder).free < 1 << 16:
            return f"the disk is full; {_AGAIN}"
    return None


@contextmanager
def folder_lock(folder: str | Path, doing: str, *, name: str = ".lock", wait: float = 0.0) -> Iterator[Path]:
    """Create ``folder`` if necessary and lock it against other processes until the end of the block.

    The lock is the operating system's, so a killed process leaves none behind. Temporary files that killed processes
    left directly in the folder are deleted.

    Args:
        folder: to lock.
        doing: for the message, such as "making the film in" or "training in".
        name: of the lock's file.
        wait: seconds to wait for another process that holds the lock.

    Raises:
        FileError: if the folder cannot be written, or another process holds the lock.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    lock = FileLock(folder / name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=wait)
    except Timeout:  # a subclass of OSError
        raise FileError(f"another process is {doing} {folder}: wait for it or choose another folder") from None
    except (OSError, ValueError) as error:
        cure = _AGAIN if getattr(error, "errno", None) in _FULL else "choose another folder, or ask its owner"
        raise FileError(f"{folder} cannot be written ({_reason(error)}): {cure}") from None
    try:
        remove_leftovers(folder)
        yield folder
    finally:
        lock.release()


def remove_leftovers(folder: str | Path) -> None:
    """Delete temporary files directly in ``folder`` that killed processes left; call it under the folder's lock."""
    for path in Path(folder).iterdir():
        if _LEFTOVERS.match(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def check_room(folder: str | Path, needed_bytes: int, what: str) -> None:
    """Raise FileError if the disk of ``folder`` has less than ``needed_bytes`` free; ``what`` needs them."""
    folder = Path(folder)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise FileError(
            f"the disk of {folder} has {_size(free)} free and {what} needs about {_size(needed_bytes)}: "
            "make room or choose another output"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


# --- digests --------------------------------------------------------------------------------------------------------


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(content: Any) -> str:
    """SHA-256 of anything that JSON can hold, as 64 hexadecimal digits; the order of keys makes no difference."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


# --- numbers --------------------------------------------------------------------------------------------------------


class NotFiniteError(ValueError):
    """NaN or infinity in the output of a network, or in a file that one reads."""


def check_finite(values: Any, what: str, causes: str = "") -> None:
    """Raise NotFiniteError if a torch tensor or numpy array of floating point holds NaN or infinity.

    ``what`` and ``causes`` are for the message: what the values are, of which shot or file; likely causes and cures.
    """
    if hasattr(values, "is_floating_point"):
        if not values.is_floating_point():
            return
        finite = bool(values.isfinite().all())
    else:
        import numpy as np

        if not np.issubdtype(np.asarray(values).dtype, np.floating):
            return
        finite = bool(np.isfinite(values).all())
    if not finite:
        raise NotFiniteError(f"{what}: NaN or infinite values" + (f"; {causes}" if causes else ""))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
