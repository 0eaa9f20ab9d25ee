"""What the scripts share: Hydra behind a command line that a person can use."""

from __future__ import annotations

import codecs
import difflib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from storymem import io
from storymem.commands.overrides import hydra_arguments
from storymem.config import nearest

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def run_script(
    main: Callable[[Any], None], *, config_name: str, positional: str | None = None, settings: type | None = None
) -> None:
    """Compose ``configs/<config_name>.yaml`` with the command line and call ``main`` with it.

    Args:
        main: takes the composed ``DictConfig``.
        config_name: the primary configuration.
        positional: the key that an argument without ``=`` stands for.
        settings: the settings class of the configuration; values of its text keys need no quotes.

    Mistakes of the user (``ValueError``, ``OSError``, Hydra's own errors) end the process with status 2 and their
    message alone; faults of the program keep their traceback.
    """
    import hydra

    composed = False

    def task(config: Any) -> None:
        # Errors are told here, inside Hydra's job, so that jobs on a cluster tell them too.
        nonlocal composed
        composed = True
        with telling():
            main(config)

    @contextmanager
    def telling() -> Iterator[None]:
        try:
            yield
            if sys.stdout is not None:
                sys.stdout.flush()  # what was printed may not be written
        except KeyboardInterrupt as stop:  # stopping.Stopped is one
            notes = getattr(stop, "__notes__", ["the same command goes on from here"])
            print(f"\n{str(stop) or 'stopped'}; {'; '.join(notes)}", file=sys.stderr)
            sys.exit(getattr(stop, "status", 130))
        except BrokenPipeError:  # who reads the output has seen enough, as in `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(141)
        except Exception as error:
            message = None if composed else _describe_reading(error)
            message = message or _describe(error, config_name, positional)
            if message is None:
                raise
            sys.exit(_said(message))

    never_raise_on_characters()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # faults keep their traceback, and mistakes in the composition reach us
    sys.path.append(os.getcwd())  # where a `_target_` of the user's own may lie
    with telling():
        sys.argv[1:] = hydra_arguments(sys.argv[1:], positional, settings)
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(task)()


def never_raise_on_characters() -> None:
    """Let the standard streams write ``\\u6797`` for what their encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, TextIOWrapper):
            continue
        try:
            "\u6797".encode(stream.encoding, "backslashreplace")
        except (UnicodeError, LookupError):  # an encoding without error handlers
            stream.reconfigure(encoding="utf-8")
        stream.reconfigure(errors="backslashreplace")


def _describe_reading(error: Exception) -> str | None:
    """An error from before the task: of a configuration file, or of flags that do not go together; else None."""
    from yaml import YAMLError

    trace = error.__traceback__
    while trace is not None and isinstance(error, YAMLError | UnicodeError | RecursionError):
        if trace.tb_frame.f_code.co_name == "load_config" and "full_path" in trace.tb_frame.f_locals:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            return f"{trace.tb_frame.f_locals['full_path']} is not YAML in UTF-8: {reason}"
        trace = trace.tb_next
    return str(error) if isinstance(error, ValueError) else None


def _describe(error: Exception, config_name: str, positional: str | None) -> str | None:
    """What an error says to the user, or None if it is a fault of the program."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, HydraException | OmegaConfBaseException):
        return _describe_composition(error, config_name, positional)
    if isinstance(error, UnicodeEncodeError) and error.encoding == codecs.lookup(sys.getfilesystemencoding()).name:
        return f"this system cannot write file names with {error.object!a}: set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
    if isinstance(error, ValueError | FileNotFoundError) and _is_the_users(error):
        return str(error)
    return io.describe_os_error(error) if isinstance(error, OSError) else None


def _is_the_users(error: Exception) -> bool:
    """Whether an error is of this package's own checks, and not from somewhere inside a library.

    Its class says so, or else the innermost frame, where it was raised.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return any(name.split(".")[0] == "storymem" for name in (type(error).__module__, raised_in))


def _describe_composition(error: Exception, config_name: str, positional: str | None) -> str:
    """A Hydra or OmegaConf error in words that name the key and its nearest neighbour."""
    from hydra.errors import InstantiationException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OverrideParseException):
            return (
                f"{cause.override}: this is no setting; write key=value, with a key that --help shows. A value that "
                "holds commas or brackets as text stands in quotes of its own: 'key=\"a, b\"'"
            )
        if isinstance(cause, MissingMandatoryValue):
            key = str(cause.full_key)
            argument = f"{positional}.yaml" if key == positional else f"{key}=..."
            return f"which {key}? Write: python scripts/{config_name}.py {argument}"
        if isinstance(cause, ConfigAttributeError | ConfigKeyError) and "/" in str(cause.full_key):
            return f"{cause.full_key}=...: there is no group of this name (--help shows them), and no such file"
        if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
            return f"{cause.full_key}: unknown key{_nearest_key(str(cause.full_key), cause.parent_node)}"
        if isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            where = str(cause).splitlines()[-1].removeprefix("full_key: ") if "full_key" in str(cause) else ""
            return f"{where}: {cause.__cause__}" if where else str(cause.__cause__)
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return f"{cause.full_key}: {str(cause.msg or cause).splitlines()[0]}"
        cause = cause.__cause__
    return str(error)


def _nearest_key(wrong: str, parent: Any) -> str:
    """The known key most like ``wrong``: beside it, else anywhere in the configuration."""
    from omegaconf import OmegaConf

    beside = [str(key) for key in parent] if parent is not None else []
    hint = nearest(wrong.rpartition(".")[2], beside)
    if "did you mean" in hint or parent is None:
        return hint
    whole = OmegaConf.to_container(parent._get_root(), resolve=False)
    elsewhere = {key.rpartition(".")[2]: key for key in _dotted_keys(whole)}
    close = difflib.get_close_matches(wrong.rpartition(".")[2], elsewhere, n=1, cutoff=0.75)
    return f"; did you mean {elsewhere[close[0]]!r}?" if close else hint


def _dotted_keys(node: Any, path: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from (name := f"{path}{key}", *_dotted_keys(value, f"{name}."))


def _said(message: str) -> int:
    # Processes that make one film find the same mistake at the start, and one on each machine says it. Later each
    # speaks for itself.
    process = os.environ.get("LOCAL_RANK", "0")
    distributed = sys.modules.get("torch.distributed")
    if process == "0":
        print(message, file=sys.stderr)
    elif distributed is not None and distributed.is_available() and distributed.is_initialized():
        print(f"process {process}: {message}", file=sys.stderr)
    return 2
