"""A dress rehearsal: the real command on checkpoints of true layout, names, shapes and sizes that take no disk.

    python -m benchmarks.rehearsal model=wan2.2-a14b                       # every form of weights that fits here
    python -m benchmarks.rehearsal model=wan2.2-a14b form=gguf-q4_k        # one of them
    python -m benchmarks.rehearsal model=wan2.2-ti2v-5b
    python -m benchmarks.rehearsal model=wan2.2-a14b scale=tiny            # small sizes; memory is not compared

Weights are holes in files, which read as zeros (see ``benchmarks.true_size``). A film of two shots of 64x64 pixels, 5
frames and 2 steps is planned, made on the CPU with no and with three keyframes, and resumed. For each stage the table
has seconds, and the peak of resident memory (RSS: anonymous pages and pages of mapped files) above that of the process
before it, beside what the plan calculates. The command fails where the two differ by more than 10 % and 0.5 GB, and
where the second shot is given no keyframe or a resumed film makes anything again. With ``scale=tiny`` memory is not
compared: libraries take more than the networks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

_STORY = """\
title: A rehearsal
overview: A fox walks.
first_shot: m2v
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
_TOLERANCE, _FLOOR = 0.1, 0.5e9
#: Stage of the table -> of the calculation.
_STAGES = {"texts": "texts", "denoise": "denoise", "decode": "decode", "select": "score"}


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    from benchmarks.true_size import FORMS

    if unknown := given.keys() - {"model", "form", "scale", "json"}:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; known are model, form, scale and json\n{__doc__}")
    model, scale = given.get("model", "wan2.2-a14b"), given.get("scale", "true")
    forms = [given["form"]] if "form" in given else list(FORMS)
    if scale not in ("true", "tiny") or not {*forms} <= {*FORMS}:
        raise SystemExit(f"scale is true or tiny, form one of {', '.join(FORMS)}")
    results, failed = [], False
    for form in forms:
        run = subprocess.run([sys.executable, "-c", _CHILD, model, form, scale], stdout=subprocess.PIPE, text=True)
        result = json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else {"failed": run.returncode}
        results.append({"model": model, "form": form, "scale": scale, **result})
        failed |= run.returncode != 0 or _is_wrong(result)
        print(_table(results[-1]), flush=True)
    if "json" in given:
        Path(given["json"]).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    raise SystemExit(int(failed))


def _is_wrong(result: dict[str, Any]) -> bool:
    """Whether a film was made and is not as it should be."""
    return "stages" in result and (bool(result["differs"]) or not result["resumed"] or not result["recalled"][-1])


_CHILD = "import sys; from benchmarks.rehearsal import rehearse; rehearse(*sys.argv[1:])"


def _table(result: dict[str, Any]) -> str:
    title = f"\n{result['model']}, {result['form']}"
    if "failed" in result:
        return f"{title}: failed, see above"
    if "refused" in result:
        return f"{title}: {result['refused']}"
    lines = [f"{title}: {result['files_gb']:.1f} GB of files that take {result['disk_gb']:.2f} GB"]
    lines.append(f"{'stage':10} {'s':>8} {'peak GB':>8} {'anonymous':>10} {'calculated':>11}")
    for name, stage in result["stages"].items():
        calculated = "" if stage["calculated_gb"] is None else f"{stage['calculated_gb']:.2f}"
        marked = "  DIFFERS" if name in result["differs"] else ""
        numbers = f"{stage['seconds']:8.1f} {stage['peak_gb']:8.2f} {stage['anonymous_gb']:10.2f} {calculated:>11}"
        lines.append(f"{name:10} {numbers}{marked}")
    if result["scale"] == "tiny":
        lines.append("scale=tiny: memory is not compared with the calculation; it is at true size")
    return "\n".join([*lines, f"resumed: {result['resumed']}; keyframes recalled: {result['recalled']}"])


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
            entry["seconds"] += time.perf_counter() - began

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


def rehearse(name: str, form: str, scale: str) -> None:
    """Write one form, make the film, and print the result as a line of JSON; refused where RAM is short."""
    from benchmarks.true_size import TINY, on_disk, write_adapters, write_form, write_scorers
    from storymem.composition import composed
    from storymem.config import build_settings
    from storymem.film.generate import generate_films
    from storymem.film.settings import GenerateSettings
    from storymem.overrides import hydra_arguments
    from storymem.scorers import scorer_bytes
    from storymem.wan.estimate import estimate_shot
    from storymem.wan.placement import free_and_total_ram

    def settings_of(overrides: list[str]) -> tuple[GenerateSettings, dict[str, Any]]:
        config = composed("generate", hydra_arguments(overrides, None, GenerateSettings))
        return build_settings(GenerateSettings, config), config

    with tempfile.TemporaryDirectory(prefix="rehearsal-") as place:
        folder = Path(place)
        (folder / "story.yaml").write_text(_STORY.replace("first_shot: m2v\n", ""))
        plain = [f"model={name}", *(TINY if scale == "tiny" else ())]
        command = [f"story={folder / 'story.yaml'}", f"output={folder / 'film'}", *plain, *_SMALL, *_RUNTIME]
        model = settings_of(command)[0].model
        command += write_form(form, folder / "weights", model)
        one = len(model.spec.experts) == 1
        command += ["sampler.guidance=1"] if one else write_adapters(folder / "adapters", model)
        if scale == "true":
            command += write_scorers(folder / "scorers")
        command += ["sampler.steps=2", "scorer.quality.threshold=-100", "memory.selector.max_keyframes=3"]
        settings, config = settings_of(command)
        scorers = scorer_bytes(settings.scorer.clip, settings.scorer.quality)
        estimate = estimate_shot(
            settings.model, settings.runtime, sampler=settings.sampler, memory_frames=3, frames=5, scorers=scorers
        )
        files, disk = on_disk(folder)
        needed, free = max(estimate.ram, estimate.peak.total), free_and_total_ram()[0]
        generate_films(config | {"dry_run": True})
        if needed + 3e9 > free:
            refused = f"refused: needs {needed / 1e9:.1f} GB of RAM and 3 GB to spare, and {free / 1e9:.1f} GB are free"
            print(json.dumps({"refused": refused}))
            return
        memory = watch()
        generate_films(config)
        made = json.loads((folder / "film" / "film.json").read_text())
        with memory.stage("resume"):
            generate_films(config)
        again = json.loads((folder / "film" / "film.json").read_text())
        calculated = {stage.name: stage.total / 1e9 for stage in estimate.stages}
        for stage, entry in memory.stages.items():
            entry["calculated_gb"] = calculated.get(_STAGES.get(stage, ""))  # type: ignore[assignment]
        print(
            json.dumps(
                {
                    "files_gb": files / 1e9,
                    "disk_gb": disk / 1e9,
                    "stages": memory.stages,
                    "differs": [stage for stage, it in memory.stages.items() if scale == "true" and differs(it)],
                    "recalled": [len(take["memory"]) for take in made["takes"]],
                    "resumed": made["takes"] == again["takes"],
                }
            )
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
