"""The console command ``storymem`` and the scripts: Hydra behind a command line that needs no quoting."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

from storymem import __version__, io
from storymem.composition import SETTINGS, check_experiments, groups, reference, register_defaults
from storymem.config import CONFIGS, annotation_at, closest, did_you_mean, nearest
from storymem.overrides import hydra_arguments


def _prepare(config: Mapping[str, Any]) -> None:
    from storymem.data.prepare import prepare

    if (cache := prepare(config)) is not None:
        print(cache.folder)


def _evaluate(config: Mapping[str, Any]) -> None:
    from storymem.evaluation.choosing import of_command, with_method
    from storymem.evaluation.stbench import evaluate

    evaluate(of_command(config), with_method)


class Command(NamedTuple):
    """One command: what it runs, and for those that Hydra configures, with what."""

    help: str
    run: Callable[..., Any] | str  # takes the configuration as plain containers; or where it is found, "module:name"
    config: str | None = None  # a key of SETTINGS; None: `run` parses sys.argv
    positional: str | None = None  # the key that arguments without = stand for
    example: str = ""  # of such an argument; without a positional key, of what must be given
    flags: Mapping[str, str] = MappingProxyType({})  # shorthands for overrides, or with = for their beginning

    def expanded(self, argument: str, actions: Collection[str]) -> str:
        """``argument``, or what it is the shorthand of; one of the ``actions`` of its settings stands for itself."""
        key, sign, value = argument.partition("=")
        if argument in actions:
            return f"action={argument}"
        return self.flags.get(key + sign, key + sign) + value


_NO_LOG_FILES = ("hydra/job_logging=none", "hydra/hydra_logging=none")

COMMANDS = {
    "generate": Command(
        *("generate a film from a story", "storymem.film.generate:generate_films", "generate", "story", "story.yaml")
    ),
    "write": Command(
        *("have a language model write a story", "storymem.story.writing:write", "write", "idea", '"a lost seal"')
    ),
    "film": Command(
        *("show a film's takes; join, export or clean it", "storymem.film.command:film_command", "film", "folder"),
        example="films/TITLE",
    ),
    "studio": Command("see and edit a film in the browser", "storymem.studio.serve:main"),
    "memory": Command(
        *("show a film's memory; add, drop, pin or replace keyframes", "storymem.film.memory_command:memory_command"),
        *("memory", "folder", "films/TITLE"),
        flags={"for=": "character="},
    ),
    "prepare": Command("turn captioned videos into a training set", _prepare, "prepare_data"),
    "train": Command(
        *("train a memory adapter, or another system's", "storymem.training.run:train", "train"),
        example="experiment=NAME dataset=FOLDER",
    ),
    "evaluate": Command("score films, or the films of a method, on ST-Bench", _evaluate, "eval_stbench"),
    "download": Command(
        *("list or fetch the weights that settings need", "storymem.commands.download:download", "download"),
        flags={"--yes": "dry_run=false"},
    ),
    "benchmark": Command("measure a model at true size, random weights", "storymem.commands.benchmark:main"),
}


def main(name: str | None = None) -> None:
    """Run the command ``name``, or the one that the first argument names (the console command ``storymem``)."""
    if name is None:
        name, *sys.argv[1:] = sys.argv[1:] or ["--help"]
        if name in ("--version", "-V"):
            sys.exit(print(f"storymem {__version__}"))
        if name in ("--help", "-h"):
            sys.exit(print(_usage()))
        if name not in COMMANDS:
            sys.exit(_report(f"{name} is not a command of storymem{nearest(name, COMMANDS)}"))
    run_command(name, COMMANDS[name])


def _usage() -> str:
    lines = [f"  {name:<11}{command.help}" for name, command in COMMANDS.items()]
    usage = "usage: storymem COMMAND [key=value ...]; storymem COMMAND --help; storymem --version"
    return "\n".join([usage, "", *lines])


def run_command(name: str, command: Command) -> None:
    """Compose the configuration of ``command`` with the command line and run it.

    Mistakes of the user (``ValueError``, ``OSError``, Hydra's own errors) end the process with status 2 and their
    message only; faults of the program keep their traceback.
    """
    composed = False

    def task(config: Any) -> None:
        # Errors are reported inside Hydra's job, so that jobs on a cluster report them too.
        nonlocal composed
        composed = True
        from omegaconf import OmegaConf

        with reporting():
            run(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))

    @contextmanager
    def reporting() -> Iterator[None]:
        try:
            yield
            if sys.stdout is not None:
                sys.stdout.flush()  # writing what was printed may fail
        except KeyboardInterrupt as stop:  # stopping.Stopped is one
            notes = getattr(stop, "__notes__", ["the same command resumes"])
            print(f"\n{str(stop) or 'stopped'}; {'; '.join(notes)}", file=sys.stderr)
            sys.exit(getattr(stop, "status", 130))
        except BrokenPipeError:  # the reader of the output has closed it, as in `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(141)
        except Exception as error:
            message = None if composed else _describe_reading(error)
            message = message or _describe(error, name, command)
            if message is None:
                raise
            sys.exit(_report(message))

    never_raise_on_characters()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors of the composition reach us, and faults keep their traceback
    sys.path.append(os.getcwd())  # where a `_target_` of the user may lie
    with reporting():
        run = resolve_name(command.run) if isinstance(command.run, str) else command.run
        if command.config is None:
            return run()
        import hydra

        settings = resolve_name(SETTINGS[command.config])
        actions = get_args(annotation_at(settings, ["action"]))
        arguments = [command.expanded(argument, actions) for argument in sys.argv[1:]]
        check_experiments(command.config, arguments)
        register_defaults(command.config)
        with _folder_of_jobs(arguments, settings) as folder:
            sys.argv[1:] = [*hydra_arguments(arguments, command.positional, settings), *_NO_LOG_FILES, *folder]
            try:
                hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=command.config)(task)()
            finally:
                if not {"--help", "-h"}.isdisjoint(arguments):
                    print(reference(command.config))


@contextmanager
def _folder_of_jobs(arguments: list[str], settings: type) -> Iterator[list[str]]:
    """An override that has Hydra's record of several jobs of a dry run in this process deleted at the end."""
    values = dict(argument.partition("=")[::2] for argument in arguments)
    dry_run = values.get("dry_run", str(getattr(settings, "dry_run", False))).lower() == "true"
    if not dry_run or "hydra/launcher" in values or {"-m", "--multirun"}.isdisjoint(arguments):
        yield []
        return
    with TemporaryDirectory() as folder:
        yield [f"hydra.sweep.dir='{folder}'"]


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


def _report(message: str) -> int:
    """Print an error; returns the exit status. Of processes started together one per machine prints it."""
    process = os.environ.get("LOCAL_RANK", "0")
    distributed = sys.modules.get("torch.distributed")
    if process == "0":
        print(message, file=sys.stderr)
    elif distributed is not None and distributed.is_available() and distributed.is_initialized():
        print(f"process {process}: {message}", file=sys.stderr)  # once they work, each has errors of its own
    return 2


def _describe_reading(error: Exception) -> str | None:
    """An error from before the task: of a configuration file, or of flags that exclude each other; else None."""
    from yaml import YAMLError

    trace = error.__traceback__
    while trace is not None and isinstance(error, YAMLError | UnicodeError | RecursionError):
        if trace.tb_frame.f_code.co_name == "load_config" and "full_path" in trace.tb_frame.f_locals:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            return f"{trace.tb_frame.f_locals['full_path']} is not YAML in UTF-8: {reason}"
        trace = trace.tb_next
    return str(error) if isinstance(error, ValueError) else None


def _describe(error: Exception, name: str, command: Command) -> str | None:
    """The message for the user, or None if the error is a fault of the program."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, HydraException | OmegaConfBaseException):
        return _describe_composition(error, name, command)
    if isinstance(error, UnicodeEncodeError) and error.encoding == codecs.lookup(sys.getfilesystemencoding()).name:
        return f"this system cannot write file names with {error.object!a}: set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
    if isinstance(error, ValueError | FileNotFoundError) and _is_ours(error):
        return str(error)
    return io.describe_os_error(error) if isinstance(error, OSError) else None


def _is_ours(error: Exception) -> bool:
    """Whether an error comes from this package's checks: by its class, or by the module that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return any(module.split(".")[0] in ("storymem", "toyworld") for module in (type(error).__module__, raised_in))


def _describe_composition(error: Exception, name: str, command: Command) -> str:
    """The message for a Hydra or OmegaConf error, with the key and the nearest known one."""
    from hydra.errors import InstantiationException, MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

    cause: BaseException | None = error
    while cause is not None:
        key = str(getattr(cause, "full_key", None) or "")
        if isinstance(cause, OverrideParseException):
            return (
                f"{cause.override}: not a setting; write key=value, with a key that --help shows. Quote text that "
                "holds commas or brackets: 'key=\"a, b\"'"
            )
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
            group = cause.missing_cfg_file.rpartition("/")[0]
            choices = groups(command.config or name).get(group, cause.options or [])
            hint = did_you_mean(cause.missing_cfg_file.rpartition("/")[2], choices)
            return f"Could not find {cause.missing_cfg_file!r}; choices of {group}: {', '.join(sorted(choices))}{hint}"
        if isinstance(cause, MissingMandatoryValue):
            whole = command.example and command.positional in (key, None)
            argument = command.example if whole else f"{key}=..."
            return f"{key} is missing; write: storymem {name} {argument}"
        if isinstance(cause, ConfigAttributeError | ConfigKeyError) and "/" in key:
            close = closest(key, groups(command.config or name))
            hint = f"; did you mean {close}=...?" if close else ""
            return f"{key}=...: no such group (--help lists them), and no such file{hint}"
        if isinstance(cause, ConfigAttributeError | ConfigKeyError) and key:
            return f"{key}: unknown key{_nearest_key(key, cause.parent_node)}"
        if isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            return str(cause.__cause__)
        if isinstance(cause, OmegaConfBaseException) and key:
            return f"{key}: {str(cause.msg or cause).splitlines()[0]}"
        cause = cause.__cause__
    return str(error)


def _nearest_key(wrong: str, parent: Any) -> str:
    """The known key most like ``wrong``: one beside it, or one elsewhere if there is only one of that name.

    Where ``wrong`` is of no node, only the outermost keys of a name count.
    """
    from omegaconf import OmegaConf

    if parent is None:
        return ""
    name, beside = wrong.rpartition(".")[2], {str(key) for key in parent} - {"hydra"}
    places: dict[str, list[str]] = {}
    for key in _dotted_keys(OmegaConf.to_container(parent._get_root())):
        places.setdefault(key.rpartition(".")[2], []).append(key)
    if "." not in wrong:
        for one, keys in places.items():
            least = min(key.count(".") for key in keys)
            places[one] = [key for key in keys if key.count(".") == least]
    elsewhere = {one: keys[0] for one, keys in places.items() if len(keys) == 1}
    close = closest(name, beside | elsewhere.keys(), cutoff=0.75)
    return nearest(name, beside) if close is None or close in beside else f"; did you mean {elsewhere[close]!r}?"


def _dotted_keys(node: Any, path: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from (name := f"{path}{key}", *_dotted_keys(value, f"{name}."))
