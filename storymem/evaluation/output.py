"""The folder of results: whose it is, and who writes to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from storymem.evaluation.workers import Workers
from storymem.io import FileError, folder_lock, read_json, write_text

MARK = ".eval_stbench"  # a file by which an unfinished folder of results is known
_BESIDES = (".lock", "jobs")  # what may lie in a new one: ours, and Hydra's for jobs on a cluster
_SHOWN = 3  # names in a message before the rest is only counted
_WAIT_S = 60  # for another job that writes its tables into the same output


def check_output(output: Path) -> None:
    """Raise ``FileError`` unless ``output`` is new, empty or a folder of results."""
    if not output.exists():
        return
    if not output.is_dir():
        raise FileError(f"output={output} is a file: name a folder")
    others = sorted(path.name for path in output.iterdir() if path.name not in _BESIDES)
    if others and not (output / MARK).is_file() and not _is_results(output / "results.json"):
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        raise FileError(
            f"output={output} is not empty and not a folder of results: it holds {', '.join(others[:_SHOWN])}{more}. "
            "Nothing was written; choose a new or empty folder"
        )


def written_by_one(output: Path) -> AbstractContextManager[Path]:
    """A lock on what lies in ``output`` itself, for which another job is waited for."""
    return folder_lock(output, "writing tables to", wait=_WAIT_S)


@contextmanager
def owned_output(output: Path, systems: Sequence[str], workers: Workers) -> Iterator[None]:
    """The output folder with our mark in it, and the first worker's lock on what is written of each system.

    Jobs for other systems may write into the same output at the same time.

    Raises:
        FileError: if the folder is somebody else's or cannot be written, or another job scores one of the systems.
    """
    with ExitStack() as locks:
        problem = None
        try:
            if workers.is_first:
                with written_by_one(output):
                    check_output(output)
                    write_text(output / MARK, "This folder holds results of eval_stbench.\n")
                for system in systems:
                    locks.enter_context(folder_lock(output / "stories" / system, "scoring films in"))
        except FileError as error:
            problem = str(error)
        if (problem := workers.all_hear(problem)) is not None:
            raise FileError(problem)
        yield


def _is_results(path: Path) -> bool:
    try:
        content = read_json(path)
    except (FileNotFoundError, FileError):
        return False
    return isinstance(content, dict) and {"benchmark", "metrics", "systems"} <= content.keys()
