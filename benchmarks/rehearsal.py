"""The real command on checkpoints of the true layout, names, shapes and sizes that take no disk.

    python -m benchmarks.rehearsal model=wan2.2-a14b                       # every form of weights that fits here
    python -m benchmarks.rehearsal model=wan2.2-a14b form=gguf-q4_k        # one of them
    python -m benchmarks.rehearsal model=wan2.2-a14b form=gguf-q4_k quality=hpsv3
    python -m benchmarks.rehearsal model=wan2.2-ti2v-5b
    python -m benchmarks.rehearsal model=wan2.2-a14b scale=tiny            # small sizes; RAM is not compared

Weights are holes in files, which read as zeros (see ``benchmarks.true_size``). A film of two shots of 64x64 pixels, 5
frames and 2 steps is planned, generated on the CPU (the second shot recalls keyframes of the first), and resumed.

Columns of the report: seconds of each stage; the peak of resident memory (RSS: anonymous pages and pages of mapped
files) above that of the process before the film; of which anonymous pages, which the system cannot drop; what the plan
calculates. The stage "load" includes an adapter's file, which is mapped while it is converted.

The command fails where peak and calculation differ by more than 10 % and 0.5 GB, where the second shot recalls no
keyframe, and where a resumed film is generated again. A form that needs more RAM than is free is refused. With
``report=FILE`` the results are written to a Markdown file and replace earlier ones of the same form. With
``scale=tiny`` RAM is not compared: libraries take more than the networks.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any

from benchmarks.tables import markdown
from benchmarks.true_size import FORMS, TINY, on_disk, write_adapters, write_form, write_scorers
from storymem.composition import composed
from storymem.config import build_settings
from storymem.film.settings import GenerateSettings
from storymem.overrides import hydra_arguments
from storymem.scorers import scorer_bytes
from storymem.wan.estimate import Estimate, estimate_shot

_STORY = """\
title: A rehearsal
overview: A fox walks.
scenes:
  - shots:
      - prompt: A fox walks in the snow.
      - prompt: The fox sleeps.
"""
_SMALL = ("model.video={height: 64, width: 64, frames: 5, fps: 16}", "model.network.text_tokens=32", "continuity=none")
_RUNTIME = (
    "first_shot=m2v",
    "runtime=cpu",
    "runtime.offload=none",
    "runtime.experts=in_turn",
    "model.has_text_to_video=false",
)
_TOLERANCE, _FLOOR, _SPARE = 0.1, 0.5e9, 3e9
#: Stage of the table -> of the calculation.
_STAGES = {"texts": "texts", "encode": "encode", "denoise": "denoise", "decode": "decode", "select": "score"}
_DEFAULTS = {"model": "wan2.2-a14b", "form": "", "scale": "true", "quality": "laion-v1", "report": ""}
_TITLE = """\
# Rehearsals at true size

By `python -m benchmarks.rehearsal`, which explains the columns. RAM is that of the process; seconds include other
work of the machine.
"""


def main() -> None:
    given = _DEFAULTS | dict(argument.split("=", 1) for argument in sys.argv[1:])
    if unknown := given.keys() - _DEFAULTS.keys():
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(_DEFAULTS)}\n{__doc__}")
    forms = [given["form"]] if given["form"] else list(FORMS)
    choices = {"scale": ("true", "tiny"), "quality": ("laion-v1", "hpsv3"), "form": ("", *FORMS)}
    for name, known in choices.items():
        if given[name] not in known:
            raise SystemExit(f"{name} is one of {', '.join(filter(None, known))}")
    failed = False
    for form in forms:
        asked = given | {"form": form}
        run = subprocess.run([sys.executable, "-c", _CHILD, json.dumps(asked)], stdout=subprocess.PIPE, text=True)
        result = json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else {"failed": run.returncode}
        failed |= run.returncode != 0 or _is_wrong(result)
        print(f"\n{(section := _section(asked, result))}", flush=True)
        if given["report"]:
            _put(Path(given["report"]), section)
    raise SystemExit(int(failed))


def _is_wrong(result: dict[str, Any]) -> bool:
    """Whether a film was generated and is not as it should be."""
    return "stages" in result and (bool(result["differs"]) or not result["resumed"] or not result["recalled"][-1])


def _section(asked: dict[str, str], result: dict[str, Any]) -> str:
    """The result of one form, in Markdown."""
    arguments = [f"{name}={asked[name]}" for name in ("model", "form", "quality", "scale")]
    machine = f"{os.cpu_count()} cores, {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB of RAM"
    lines = [
        f"## {asked['model']}, {asked['form']}, {asked['quality']}\n",
        f"`python -m benchmarks.rehearsal {' '.join(arguments)}`, {datetime.now(UTC):%Y-%m-%d}, {machine}\n",
    ]
    if "stages" not in result:
        return "\n".join([*lines, result.get("refused", "failed, see above"), ""])
    lines.append(f"{result['files_gb']:.1f} GB of files, which take {result['disk_gb']:.2f} GB of disk\n")
    rows = []
    for name, stage in result["stages"].items():
        peaks = [stage[f"{kind}_gb"] for kind in ("peak", "anonymous", "calculated")]
        numbers = ["" if number is None else f"{number:.2f}" for number in peaks]
        rows.append([name, f"{stage['seconds']:.1f}", *numbers, "differs" if name in result["differs"] else ""])
    lines.append(markdown(["stage", "s", "peak GB", "of which anonymous", "calculated", ""], rows))
    lines.append(f"\nResumed: {result['resumed']}. Keyframes recalled: {result['recalled']}.")
    if asked["scale"] == "tiny":
        lines.append("With scale=tiny RAM is not compared with the calculation, which is for true sizes.")
    return "\n".join([*lines, ""])


def _put(report: Path, section: str) -> None:
    """Write a section to the report, in the place of the one with the same heading."""
    before = report.read_text(encoding="utf-8") if report.exists() else _TITLE
    title, *sections = re.split(r"^(?=## )", before, flags=re.MULTILINE)
    found = {text.splitlines()[0]: text.strip() for text in [*sections, section]}
    report.write_text("\n\n".join([title.strip(), *found.values()]) + "\n", encoding="utf-8")


_CHILD = "import json, sys; from benchmarks.rehearsal import rehearse; rehearse(json.loads(sys.argv[1]))"


# In a process of its own for each form


class Memory:
    """Peaks of resident memory by stage, sampled by a thread, above what the process had at first."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self._current: list[str] = []
        self._base = resident()
        threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        entry = self.stages.setdefault(name, {"seconds": 0.0, "peak_gb": 0.0, "anonymous_gb": 0.0})
        self._current.append(name)
        try:
            yield
        finally:
            self._sample()
            self._current.pop()
            entry["seconds"] += (seconds := time.perf_counter() - began)
            print(f"{name}: {seconds:.0f} s, peak so far {entry['peak_gb']:.2f} GB", file=sys.stderr, flush=True)

    def timed(self, owner: Any, attribute: str, name: str) -> None:
        """Make the calls of ``owner.attribute`` a stage."""
        call: Callable[..., Any] = getattr(owner, attribute)

        @wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return call(*args, **kwargs)

        setattr(owner, attribute, run)

    def _watch(self) -> None:
        while True:
            self._sample()
            time.sleep(0.02)

    def _sample(self) -> None:
        if not self._current:
            return
        entry, now = self.stages[self._current[-1]], resident()
        for key, kind in (("peak_gb", "VmRSS"), ("anonymous_gb", "RssAnon")):
            entry[key] = max(entry[key], (now[kind] - self._base[kind]) / 1e9)


def resident() -> dict[str, int]:
    """Bytes of this process in RAM: all of them, and those of no file."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    values = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "RssAnon"))}
    return {name: int(value) * 1024 for name, value in values.items()}


def rehearse(asked: dict[str, str]) -> None:
    """Write one form, generate the film, and print the result as a line of JSON; refused where RAM is short."""
    from storymem.film.generate import generate_films
    from storymem.wan.placement import free_and_total_ram

    with tempfile.TemporaryDirectory(prefix="rehearsal-") as place:
        folder = Path(place)
        settings, config = _written(asked, folder)
        estimate = _estimated(settings)
        files, disk = on_disk(folder)
        # Adapters in float32 are mapped while they are converted: pages that the system may drop.
        converted = max((path.stat().st_size for path in folder.glob("adapters/memory/*/*")), default=0)
        needed, free = estimate.shared_ram, free_and_total_ram()[0]
        generate_films(config | {"dry_run": True})
        if needed + _SPARE > free:
            gigabytes = f"{needed / 1e9:.1f} GB of RAM and {_SPARE / 1e9:.0f} GB to spare, and {free / 1e9:.1f} GB are"
            print(json.dumps({"refused": f"refused: needs {gigabytes} free"}))
            return
        ctypes.CDLL(None).malloc_trim(0)  # what was freed after writing the files does not count
        memory = watch()
        generate_films(config)
        made = json.loads((folder / "film" / "film.json").read_text())
        with memory.stage("resume"):
            generate_films(config)
        again = json.loads((folder / "film" / "film.json").read_text())
    (waiting,) = scorer_bytes(settings.scorer.clip)  # in RAM from the start; the quality filter only while it scores
    calculated = {stage.name: (stage.total + waiting) / 1e9 for stage in estimate.stages}
    denoise = next(stage for stage in estimate.stages if stage.name == "denoise")
    calculated["load"] = (denoise.weights + waiting + converted) / 1e9
    for stage, entry in memory.stages.items():
        entry["calculated_gb"] = calculated.get(_STAGES.get(stage, stage))  # type: ignore[assignment]
    result = {
        "files_gb": files / 1e9,
        "disk_gb": disk / 1e9,
        "stages": memory.stages,
        "differs": [stage for stage, it in memory.stages.items() if asked["scale"] == "true" and differs(it)],
        "recalled": [len(take["memory"]) for take in made["takes"]],
        "resumed": made["takes"] == again["takes"],
    }
    print(json.dumps(result))


def _written(asked: dict[str, str], folder: Path) -> tuple[GenerateSettings, dict[str, Any]]:
    """Settings of the film, after its story and the files that they name were written to ``folder``."""
    (folder / "story.yaml").write_text(_STORY)
    tiny = asked["scale"] == "tiny"
    plain = [f"model={asked['model']}", *(TINY if tiny else ())]
    command = [f"story={folder / 'story.yaml'}", f"output={folder / 'film'}", *plain, *_SMALL, *_RUNTIME]
    model = _settings_of(command)[0].model
    command += write_form(asked["form"], folder / "weights", model)
    one = len(model.spec.experts) == 1
    command += ["sampler.guidance=1"] if one else write_adapters(folder / "adapters", model)
    command += [] if tiny else write_scorers(folder / "scorers", asked["quality"])
    command += ["sampler.steps=2", "scorer.quality.threshold=-100", "memory.selector.max_keyframes=3"]
    return _settings_of(command)


def _settings_of(overrides: list[str]) -> tuple[GenerateSettings, dict[str, Any]]:
    config = composed("generate", hydra_arguments(overrides, None, GenerateSettings))
    return build_settings(GenerateSettings, config), config


def _estimated(settings: GenerateSettings) -> Estimate:
    return estimate_shot(
        settings.model,
        settings.runtime,
        sampler=settings.sampler,
        memory_frames=3,
        frames=5,
        scorers=scorer_bytes(settings.scorer.clip, settings.scorer.quality),
    )


def differs(entry: dict[str, Any]) -> bool:
    """Whether a stage's peak is not as calculated."""
    if entry["calculated_gb"] is None:
        return False
    error = abs(entry["peak_gb"] - entry["calculated_gb"]) * 1e9
    return error > max(_FLOOR, _TOLERANCE * entry["calculated_gb"] * 1e9)


def watch() -> Memory:
    """Measure the stages of films from now on."""
    import storymem.wan.shots as shots
    from storymem.film.folder import Film
    from storymem.film.storyteller import Storyteller
    from storymem.wan.pipeline import WanMemoryToVideoPipeline

    memory = Memory()
    for owner, attribute, name in (
        (shots.WanShotGenerator, "prepare", "texts"),
        (shots.WanShotGenerator, "_memory_to_video", "load"),
        (WanMemoryToVideoPipeline, "take_turn", "load"),
        (WanMemoryToVideoPipeline, "_denoise", "denoise"),
        (WanMemoryToVideoPipeline, "_shot", "encode"),
        (shots, "decode_video", "decode"),
        (Storyteller, "select", "select"),
        (Film, "write_take", "save"),
    ):
        memory.timed(owner, attribute, name)
    return memory


if __name__ == "__main__":
    main()
