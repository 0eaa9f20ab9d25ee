"""Published weights on this machine: finding them, and reading and checking their files. Never opens a connection.

Large files are downloaded by the user, once, with the command that the error message prints: a 100 GB download must
not start as the side effect of a typing mistake. Imports no torch until tensors are read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import zipfile
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
#: Formats, as :func:`other_format` names them.
PICKLE = "a pickle (.pth, .bin): use the .safetensors file in its place"
GGUF = "a GGUF file; for experts in GGUF use model.gguf"
_FORMATS = {  # by their first bytes
    b"version https://git-lfs": "a Git LFS pointer and not the weights themselves: fetch them with git lfs pull",
    b"<": "a web page, of a broken download: fetch the file again",
    b"GGUF": GGUF,
    b"PK": PICKLE,
    b"\x80": PICKLE,
}


class MissingWeights(FileNotFoundError):
    """Weights that are needed are not on this machine; the message contains the command that downloads them."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Weights:
    """One set of published weights.

    Args:
        name: for messages ("ViCLIP-L/14").
        source: a local file or folder, a path in an installed Python package ("package:toyworld/weights"), or a Hugging
            Face repository id ("owner/name").
        file: a file (or glob pattern) inside the repository; ``None`` means the whole repository.
        include: without ``file``, patterns of the files to download, where the repository holds more than is needed.
        size_gb: size of the download in gigabytes (10^9 bytes), for messages.
        licence: one line on the licence of the weights, for messages; may be empty.
        url: of a file that is not on the Hugging Face hub; it is downloaded to ``source``.
    """

    name: str
    source: str
    file: str | None = None
    include: tuple[str, ...] = ()
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
        except RuntimeError:  # ~user, where there is no such user
            return Path(self.source)

    @property
    def patterns(self) -> list[str] | None:
        """Patterns of the files to download; None: all."""
        return [self.file] if self.file is not None else list(self.include) or None

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
            return " ".join([f"hf download {self.source}", *(f'--include "{pattern}"' for pattern in self.include)])
        flag = "--include " if "*" in self.file else ""
        quote = '"' if "*" in self.file else ""
        return f"hf download {self.source} {flag}{quote}{self.file}{quote}"


def locate(weights: Weights) -> Path:
    """The local path of ``weights``: a file if ``weights.file`` names one, else a folder.

    ``source`` is first taken as a path, then searched for in the local Hugging Face cache.

    Raises:
        MissingWeights: with the file's name, size, licence note and the exact download command.
        FileError: for a FIFO or a device, or a ``source`` that is neither a path nor a repository id.
    """
    if not weights.source.strip():
        raise FileError(f"{weights.name}: source is empty: give a path or a Hugging Face repository id")
    if weights.file is not None and Path(weights.file).is_absolute():
        raise FileError(f"{weights.name}: file={weights.file} must be relative to source={weights.source}")
    here = " in the local Hugging Face cache" if not weights.is_local else ""
    place = weights.path if weights.is_local else _cached(weights)
    if place is None or not _exists(place):
        raise _missing(weights, "does not exist" if weights.is_local else f"is not{here}")
    if not place.is_dir():
        return check_regular(place)
    if weights.file is None:
        _check_shards(weights, place)
        return place
    # A folder of the user's may hold the repository, or only the part that is needed, without the folders around it.
    for pattern in (weights.file, Path(weights.file).name) if weights.is_local else (weights.file,):
        if "*" not in pattern and _exists(place / pattern):
            return place / pattern
        if "*" in pattern and any(place.glob(pattern)):
            _check_shards(weights, place, pattern)
            parts = Path(pattern).parts
            return place.joinpath(*parts[: next(i for i, part in enumerate(parts) if "*" in part)])
    raise _missing(weights, f"holds no {weights.file}{here}")


def _cached(weights: Weights) -> Path | None:
    """The repository in the local Hugging Face cache; None if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(weights.source, allow_patterns=weights.patterns, local_files_only=True))
    except (LocalEntryNotFoundError, FileNotFoundError):
        return None
    except HFValidationError:
        reason = "is neither a path nor a Hugging Face repository id"
        raise FileError(f"{weights.name}: {weights.source} {reason}") from None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _check_shards(weights: Weights, folder: Path, pattern: str = "**/*") -> None:
    """Raise MissingWeights if an index names files that are absent: the sign of an interrupted download."""
    for index in sorted(folder.glob(pattern)):
        if index.name.endswith(".safetensors.index.json"):
            files = set(read_index(index).values())
            if absent := sorted(file for file in files if not (index.parent / file).exists()):
                raise _missing(weights, f"is incomplete: {index.parent.name}/ lacks {', '.join(absent)}")


def _missing(weights: Weights, what: str) -> MissingWeights:
    lines = [f"{weights.name}: {weights.source} {what}."]
    if weights.file is not None:
        lines.append(f"  file:     {weights.file}")
    if weights.size_gb:
        lines.append(f"  size:     {size_text(weights.size_gb)}")
    if weights.licence:
        lines.append(f"  licence:  {weights.licence}")
    if weights.is_local and not weights.url:
        lines.append("  Give the path of an existing file or folder, or a Hugging Face repository id.")
    else:
        lines += [f"  download: {weights.download_command}", "  or give the path of a local copy."]
    return MissingWeights("\n".join(lines))


def size_text(gigabytes: float) -> str:
    """A size in GB, or in MB if it is small."""
    return f"{gigabytes:.3g} GB" if gigabytes >= 0.1 or not gigabytes else f"{gigabytes * 1000:.3g} MB"


def sample_hash(*places: Path) -> str:
    """Twelve hexadecimal digits over names, sizes and samples of files, and of all files in folders.

    Reading all of 57 GB at every start would take too long. Markdown and lists of known words do not count.
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
    """Shapes and data types (by the format's own names) of the tensors of a file, in its order, and its metadata."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """The header of a safetensors file; tensors are not read.

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
        size = f"its {path.stat().st_size:,} bytes may be a broken download; fetch it again"
        what = other_format(path) or f" ({error}): {size}"
        raise FileError(f"{path} is not a readable safetensors file{what}") from None


def read_pickle(path: Path) -> Any:
    """The content of a file of ``torch.save``: tensors are mapped into CPU memory, code does not run.

    Raises:
        FileNotFoundError, FileError: if there is no such file, or it is damaged or contains more than plain data.
    """
    import torch

    path = check_regular(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch.load documents none; a dozen types were seen on damaged files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = other_format(path, but=PICKLE) or (
            f": it is damaged, or contains more than tensors ({reason}). Use the .safetensors file in its place"
        )
        raise FileError(f"{path} is not a readable file of tensors{what}") from None


def other_format(path: Path, *, but: str = "") -> str:
    """Which format a file has, in words; empty if it is ``but`` or not known."""
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    return next((f", but {it}" for magic, it in _FORMATS.items() if start.startswith(magic) and it != but), "")


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file beside ``path``, of a ``*.safetensors.index.json``.

    Raises:
        FileError: if it is damaged, or names a file in another folder.
    """
    files = read_json_object(path).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise FileError(f"{path} is not an index of weights: weight_map must map tensors to files")
    for file in set(files.values()):
        if Path(file).name != file or "\0" in file:
            raise FileError(f"{path} names {file!r}, which is not a file beside it")
    return files


def check_values(tensors: Iterable[tuple[str, Any]], where: str | Path) -> None:
    """Raise NotFiniteError if a weight, read from ``where``, is NaN, infinite or too large to be one.

    Tensors that are not floating point are skipped. 14 billion weights of 16 bits take about a second.
    """
    import torch

    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # Floats of 8 bits have no aminmax; these kinds are ordered as their bits, which takes no copy.
        if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            ends = tensor.view(torch.int8).amax().clamp(min=0), tensor.view(torch.uint8).amax()
            tensor = torch.stack([end.view(tensor.dtype).float() for end in ends])
        elif tensor.element_size() == 1:
            tensor = tensor.float()
        low, high = (value.item() for value in tensor.aminmax())  # NaN if any value is
        if not (math.isfinite(low) and math.isfinite(high)):
            problem = f"NaN or infinite values as {str(tensor.dtype).removeprefix('torch.')}"
        elif max(-low, high) > _LARGEST:
            problem = f"values up to {max(-low, high):.3g}, which no trained network has"
        else:
            continue
        raise NotFiniteError(
            f"{where}: {name} holds {problem}: the file is damaged or its training diverged; fetch it again or use an "
            "earlier checkpoint"
        )


def check_tensors(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], *, where: str) -> None:
    """Raise FileError, which begins with ``where``, unless names and shapes are exactly the expected ones."""
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
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
