"""Where published weights lie on this machine; nothing here ever opens a network connection.

Large files are fetched by the user, once, with the command that the error message prints: a 100 GB download
must never begin as the side effect of a typing mistake.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic.dataclasses import dataclass

from storymem.config import STRICT

_PACKAGE = "package:"  # what comes with the package needs no path
_SAMPLES = 16  # of a file, and the bytes of each
_SAMPLE_BYTES = 1 << 16


class MissingWeights(FileNotFoundError):
    """Weights that were asked for are not on this machine; the message says how to get them."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Weights:
    """One set of published weights.

    Args:
        name: what it is, for messages ("ViCLIP-L/14").
        source: a local file or folder, one that comes with this package ("package:toy/weights"), or a Hugging Face
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
            return Path(__file__).parent / self.source.removeprefix(_PACKAGE)
        return Path(self.source).expanduser()

    @property
    def is_local(self) -> bool:
        """Whether ``source`` is a path: one that exists, or one that cannot be a repository id."""
        return self.path.exists() or self.source.startswith((".", "/", "~", _PACKAGE)) or self.source.count("/") != 1

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
    """
    if weights.is_local:
        return _locate_on_disk(weights)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = None if weights.file is None else [weights.file]
    try:
        folder = Path(snapshot_download(weights.source, allow_patterns=patterns, local_files_only=True))
    except (LocalEntryNotFoundError, FileNotFoundError):
        raise _missing(weights, "is not in the local Hugging Face cache") from None
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
            if path.suffix == ".md":
                continue
            size = path.stat().st_size
            content.update(f"{place.name}/{path.relative_to(place)} {size}\n".encode())
            with path.open("rb") as file:
                for sample in range(_SAMPLES):
                    file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                    content.update(file.read(_SAMPLE_BYTES))
    return content.hexdigest()[:12]


def _locate_on_disk(weights: Weights) -> Path:
    path = weights.path
    if not path.exists():
        raise _missing(weights, "does not exist")
    if path.is_file():
        return path
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
        shards = set(json.loads(index.read_text())["weight_map"].values())
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
