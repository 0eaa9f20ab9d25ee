"""What the scripts share: Hydra behind a command line that a person can use."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from storymem.config import nearest

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

_FLAGS_WITH_VALUE = {
    *("--cfg", "-c", "--package", "-p", "--info", "-i"),
    *("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
}


def run_script(main: Callable[[Any], None], *, config_name: str, positional: str | None = None) -> None:
    """Compose ``configs/<config_name>.yaml`` with the command line and call ``main`` with it.

    Args:
        main: takes the composed ``DictConfig``.
        config_name: the primary configuration.
        positional: the key that an argument without ``=`` stands for.

    Mistakes of the user (``ValueError`` and ``FileNotFoundError``, Hydra's own errors) end the process with status 2
    and their message alone; faults of the program keep their traceback.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    def task(config: Any) -> None:
        # Errors are told here, inside Hydra's job, so that jobs on a cluster tell them too.
        try:
            main(config)
        except (HydraException, OmegaConfBaseException) as error:
            sys.exit(_said(_describe(error, config_name, positional)))
        except (ValueError, FileNotFoundError) as error:
            if not _is_the_users(error):
                raise
            sys.exit(_said(str(error)))
        except KeyboardInterrupt:
            print("\nstopped; the same command goes on from here", file=sys.stderr)
            sys.exit(130)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # faults keep their traceback, and mistakes in the composition reach us
    sys.argv[1:] = hydra_arguments(sys.argv[1:], positional)
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(_said(_describe(error, config_name, positional)))


def hydra_arguments(arguments: Sequence[str], positional: str | None) -> list[str]:
    """The command line with its positional arguments written as one Hydra override: one as itself, several as a list.

    An argument with ``=`` is an override, unless a file of that name exists.
    """
    flags: list[str] = []
    overrides: list[str] = []
    found: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument.startswith("-") or before in _FLAGS_WITH_VALUE:
            flags.append(argument)
        elif positional is None or _is_override(argument):
            overrides.append(argument)
        else:
            found.append(argument)
    if len(found) > 1:
        overrides.append(f"{positional}=[{','.join(map(_quoted, found))}]")
    elif found:
        overrides.append(f"{positional}={_quoted(found[0])}")
    return [*flags, *overrides]


def _is_override(argument: str) -> bool:
    return ("=" in argument or argument.startswith("~")) and not Path(argument).is_file()


def _quoted(value: str) -> str:
    """A path as a Hydra value: quoted, so that spaces, commas and brackets stay themselves."""
    # Hydra takes backslashes literally, except those right before a quote.
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"


def _is_the_users(error: Exception) -> bool:
    """Whether an error was raised by this package's own checks, and not somewhere inside a library."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("storymem")


def _describe(error: Exception, config_name: str, positional: str | None) -> str:
    """A Hydra or OmegaConf error in words that name the key and its nearest neighbour."""
    from hydra.errors import InstantiationException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MissingMandatoryValue) and positional:
            return f"which {positional}? Write: python scripts/{config_name}.py {positional}.yaml"
        if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
            return f"{cause.full_key}: unknown key{_nearest_key(str(cause.full_key), cause.parent_node)}"
        if isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            where = str(cause).splitlines()[-1].removeprefix("full_key: ") if "full_key" in str(cause) else ""
            return f"{where}: {cause.__cause__}" if where else str(cause.__cause__)
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
    # Processes that make one film find the same mistake; one on each machine says it.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(message, file=sys.stderr)
    return 2
