"""Where published weights lie on this machine, and what their files hold; nothing here opens a network connection.

Large files are fetched by the user, once, with the command that the error message prints: a 100 GB download
must never begin as the side effect of a typing mistake. Loads no torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic.dataclasses import dataclass

from storymem.config import STRICT
from storymem.io import FileError, NotFiniteError, check_regular, read_json_object

_PACKAGE = "package:"  # package:NAME/PATH is a path in the folder of an installed Python package
_SAMPLES = 16  # of a file, and the bytes of each
_SAMPLE_BYTES = 1 << 16
_LARGEST = 1e6  # of a weight: the largest in published networks are a few hundred
_LISTED = 8  # names in an error before the rest is only counted
_NOT_SAFETENSORS = {
    b"version https://git-lfs": "a Git LFS pointer and not the weights themselves: fetch them with git lfs pull",
    b"<": "a web page, of a broken download: fetch the file again",
    b"GGUF": "a GGUF file; for experts in GGUF use model.gguf",
    b"PK": "a pickle (.pth, .bin): use the .safetensors file in its place",
    b"\x80": "a pickle (.pth, .bin): use the .safetensors file in its place",
}


class MissingWeights(FileNotFoundError):
    """Weights that were asked for are not on this machine; the message says how to get them."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Weights:
    """One set of published weights.

    Args:
        name: what it is, for messages ("ViCLIP-L/14").
        source: a local file or folder, one that comes with this package ("package:toyworld/weights"), or a Hugging Face
            repository id ("owner/name").
        file: a file (or glob pattern) inside the repository; ``None`` means the whole repository.
        size_gb: size of the download in gigabytes (10^9 bytes), for messages.
        licence: one line on the licence of the weights, for messages; empty if nothing need be said.
        url: where the file is published, for what is on no hub; the download then goes to ``source``.
    """

    name: str
    source: str
    file: str | None = None
    size_gb: float = 0.0
    licence: str = ""
    url: str = ""

    @property
    def path(self) -> Path:
        """``source`` as a path."""
        if self.source.startswith(_PACKAGE):
            package, _, inside = self.source.removeprefix(_PACKAGE).partition("/")
            spec = importlib.util.find_spec(package) if package.isidentifier() else None
            where = next(iter(spec.submodule_search_locations or ()), None) if spec is not None else None
            return Path(where or package) / inside
        try:
            return Path(self.source).expanduser()
        except RuntimeError:  # ~somebody who has no home here
            return Path(self.source)

    @property
    def is_local(self) -> bool:
        """Whether ``source`` is a path: one that exists, or one that cannot be a repository id."""
        return _exists(self.path) or self.source.startswith((".", "/", "~", _PACKAGE)) or self.source.count("/") != 1

    @property
    def download_command(self) -> str:
        """The shell command that puts these weights into the local Hugging Face cache or in their place."""
        if self.url and self.is_local:
            target = self.path
            target = target / self.file if self.file is not None and target.is_dir() else target
            return f'curl --create-dirs -L -o "{target}" "{self.url}"'
        if self.file is None:
            return f"hf download {self.source}"
        flag = "--include " if "*" in self.file else ""
        quote = '"' if "*" in self.file else ""
        return f"hf download {self.source} {flag}{quote}{self.file}{quote}"


def locate(weights: Weights) -> Path:
    """The local path of ``weights``: a file if ``weights.file`` names one, else a folder.

    Looks at ``source`` as a path first, then in the local Hugging Face cache.

    Raises:
        MissingWeights: with the file's name, size, licence note and the exact download command.
        FileError: if a FIFO or a device lies there, or ``source`` is neither a path nor a repository id.
    """
    if not weights.source.strip():
        raise FileError(f"{weights.name}: source is empty: give a path or a Hugging Face repository id")
    if weights.file is not None and Path(weights.file).is_absolute():
        raise FileError(f"{weights.name}: file={weights.file} must be relative to source={weights.source}")
    if weights.is_local:
        return _locate_on_disk(weights)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    patterns = None if weights.file is None else [weights.file]
    try:
        folder = Path(snapshot_download(weights.source, allow_patterns=patterns, local_files_only=True))
    except (LocalEntryNotFoundError, FileNotFoundError):
        raise _missing(weights, "is not in the local Hugging Face cache") from None
    except HFValidationError:
        reason = "is neither a path nor a Hugging Face repository id"
        raise FileError(f"{weights.name}: {weights.source} {reason}") from None
    if weights.file is None:
        _check_shards(weights, folder)
        return folder
    if "*" in weights.file:
        if not any(folder.glob(weights.file)):
            raise _missing(weights, f"has no {weights.file} in the local Hugging Face cache")
        _check_shards(weights, folder, weights.file)
        return folder / _fixed_part(weights.file)
    if not (folder / weights.file).is_file():
        raise _missing(weights, f"has no {weights.file} in the local Hugging Face cache")
    return folder / weights.file


def sample_hash(*places: Path) -> str:
    """Twelve hexadecimal digits that tell whether weights are still the same.

    Names, sizes and samples of all files count, but for Markdown, which only describes them. Reading all of 57 GB at
    every start would take too long.

    Args:
        places: files, and folders with all that lies in them.
    """
    content = hashlib.sha256()
    for place in places:
        files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
        for path in files:
            if path.suffix == ".md" or path.name == "known_words.txt":
                continue
            size = path.stat().st_size
            content.update(f"{place.name}/{path.relative_to(place)} {size}\n".encode())
            with check_regular(path).open("rb") as file:
                for sample in range(_SAMPLES):
                    file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                    content.update(file.read(_SAMPLE_BYTES))
    return content.hexdigest()[:12]


class Header(NamedTuple):
    """What a weights file says of its tensors: shapes and the file's own names of their types, in the file's order."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """The header of a safetensors file; its weights are not read.

    Raises:
        FileNotFoundError, FileError: if there is no such file, or it is damaged, incomplete or of another format.
    """
    from safetensors import SafetensorError, safe_open

    path = check_regular(path)
    try:
        with safe_open(path, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            shapes = {name: tuple(found.get_shape()) for name, found in slices.items()}
            return Header(shapes, {name: found.get_dtype() for name, found in slices.items()}, opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} is not a readable safetensors file{_what_instead(path, error)}") from None


def _what_instead(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    for magic, what in _NOT_SAFETENSORS.items():
        if start.startswith(magic):
            return f", but {what}"
    return f" ({error}): its {path.stat().st_size:,} bytes may be a broken download; fetch it again"


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file beside ``path``, of a ``*.safetensors.index.json``.

    Raises:
        FileError: if it is damaged, or names a file in another folder.
    """
    files = read_json_object(path).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise FileError(f"{path} is not an index of weights: weight_map must say which file holds each tensor")
    for file in set(files.values()):
        if Path(file).name != file or "\0" in file:
            raise FileError(f"{path} names {file!r}, which is not a file beside it")
    return files


def check_values(tensors: Iterable[tuple[str, Any]], where: str | Path) -> None:
    """Raise NotFiniteError if a weight is NaN, infinite or too large to be one.

    One pass without a copy: 14 billion weights of 16 bits take about a second.

    Args:
        tensors: names and torch tensors; those that are not floating point pass.
        where: the file or folder they were read from.
    """
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if tensor.element_size() == 1:  # 8-bit floats, which know no minimum
            tensor = tensor.float()
        low, high = (value.item() for value in tensor.aminmax())  # NaN if any value is
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NotFiniteError(
                f"{where}: {name} holds NaN or infinite values as {str(tensor.dtype).removeprefix('torch.')}: the file "
                "is damaged or its training diverged; fetch it again or use an earlier checkpoint"
            )
        if max(-low, high) > _LARGEST:
            raise NotFiniteError(
                f"{where}: {name} holds values up to {max(-low, high):.3g}, which no trained network has: the file is "
                "damaged or its training diverged; fetch it again or use an earlier checkpoint"
            )


def check_tensors(
    found: Mapping[str, Sequence[int]],
    expected: Mapping[str, Sequence[int]],
    *,
    where: str,
    optional: Iterable[str] = (),
) -> None:
    """Raise FileError unless a file's tensors are exactly those of a network; ``optional`` ones may be absent."""
    problems = {
        "missing": sorted(expected.keys() - found.keys() - set(optional)),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{name} is {list(found[name])}, not {list(shape)}"
            for name, shape in expected.items()
            if name in found and list(found[name]) != list(shape)
        ],
    }
    if any(problems.values()):
        raise FileError(listed(where, problems))


def listed(title: str, problems: Mapping[str, Sequence[str]]) -> str:
    """``title`` and below it each kind of problem with its count and its first names."""
    lines = [title]
    for kind, names in problems.items():
        if names:
            more = [f"... and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
            lines += [f"  {kind} ({len(names)}):", *(f"    {name}" for name in [*names[:_LISTED], *more])]
    return "\n".join(lines)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _locate_on_disk(weights: Weights) -> Path:
    path = weights.path
    if not _exists(path):
        raise _missing(weights, "does not exist")
    if not path.is_dir():
        return check_regular(path)
    if weights.file is None:
        _check_shards(weights, path)
        return path
    if "*" in weights.file:
        # A folder downloaded whole, or only the part of it that is needed.
        for pattern in (weights.file, Path(weights.file).name):
            if any(path.glob(pattern)):
                _check_shards(weights, path, pattern)
                return path / _fixed_part(pattern)
        raise _missing(weights, f"holds no {weights.file}")
    if (path / weights.file).exists():
        return path / weights.file
    # A folder downloaded or copied flat: the file's own name is enough.
    if (path / Path(weights.file).name).is_file():
        return path / Path(weights.file).name
    raise _missing(weights, f"holds no {weights.file}")


def _fixed_part(pattern: str) -> Path:
    """The folders of a glob pattern before its first wildcard: "a/b*/c" -> "a"."""
    parts = Path(pattern).parts
    return Path(*parts[: next(i for i, part in enumerate(parts) if "*" in part)])


def _check_shards(weights: Weights, folder: Path, pattern: str = "**/*") -> None:
    """Raise if an index names shards that are not there: the sign of a download that was broken off."""
    for index in sorted(folder.glob(pattern)):
        if not index.name.endswith(".safetensors.index.json"):
            continue
        shards = set(read_index(index).values())
        absent = sorted(shard for shard in shards if not (index.parent / shard).exists())
        if absent:
            raise _missing(weights, f"is incomplete: {index.parent.name}/ lacks {', '.join(absent)}")


def _missing(weights: Weights, what: str) -> MissingWeights:
    lines = [f"{weights.name}: {weights.source} {what}."]
    if weights.file is not None:
        lines.append(f"  file:     {weights.file}")
    if weights.size_gb:
        small = weights.size_gb < 0.1
        lines.append(f"  size:     {weights.size_gb * (1000 if small else 1):g} {'MB' if small else 'GB'}")
    if weights.licence:
        lines.append(f"  licence:  {weights.licence}")
    if weights.is_local and not weights.url:
        lines.append("  Give the path of an existing file or folder, or a Hugging Face repository id.")
    else:
        lines.append(f"  download: {weights.download_command}")
        lines.append("  or give the path of a local copy.")
    return MissingWeights("\n".join(lines))
