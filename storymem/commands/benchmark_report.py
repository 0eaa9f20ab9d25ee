"""What :mod:`storymem.commands.benchmark` measured, as a table for people and as JSON with what it depends on."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch

from storymem.commands.benchmark import Case, Row, ShotRow
from storymem.film.progress import format_table
from storymem.io import write_json
from storymem.wan.settings import ModelSettings, SamplerSettings

#: What others have published, each for 81 frames and 40 steps without memory; (inferred) where a figure is not stated.
PUBLISHED = (
    ("Wan2.2 I2V-A14B 480p, official, offload", "1x H100", "327.8 s, 41.0 GB"),
    ("the same at 720p", "1x H100", "1055.9 s, 59.7 GB"),
    ("the same 480p, Ulysses and FSDP", "8x H100", "52.9 s"),
    ("Wan2.2 480p: official", "1x H200", "366 s"),
    ("Wan2.2 480p: best open engine, bf16", "1x H200", "216 s"),
    ("Wan2.2 480p: the same, fp8", "1x H200", "191 s"),
    ("Wan2.2 480p: the same, with TeaCache", "1x H200", "107 s"),
    ("Wan2.2 480p: the same, 4 steps", "1x H200", "14 s"),
    ("Wan2.1-I2V-14B 480p: diffusers", "1x H100", "9.77 s a step"),
    ("Wan2.1-I2V-14B 480p: best open engine", "1x H100", "5.18 s a step"),
)


def table(rows: Sequence[Row], model: ModelSettings, sampler: SamplerSettings) -> str:
    """The rows, with what is calculated and what is not."""
    cells = [("case", "memory", "tokens", "s", "floor s", "TFLOP/s", "of ceiling", "s a shot", "floor", "GB", "calc.")]
    for row in rows:
        if row.refused:
            continue
        cells.append(
            (
                *(row.case, str(row.memory), str(row.tokens), f"{row.seconds:.3g}", f"{row.floor:.3g}"),
                *(f"{row.tflops:.3g}", f"{row.share:.0%}", f"{row.shot:.3g}", f"{row.floor_shot:.3g}"),
                *(f"{row.measured_gb:.3g}", f"{row.predicted_gb:.3g}"),
            )
        )
    passes = "two passes" if sampler.guidance > 1 else "one pass"
    video = model.video
    lines = [
        f"{model.name}: {model.network.transformer['num_layers']} layers, {video.width}x{video.height}, "
        f"{video.frames} frames, random weights",
        format_table(cells),
        f"s: one forward. A shot is calculated: {sampler.steps} steps of {passes}, both experts being of one size; "
        "without texts, encoding and decoding. Floor: the same operations at the measured ceiling of matrix products.",
    ]
    lines += [f"not measured: {row.case}: {row.refused}" for row in rows if row.refused]
    return "\n".join(lines)


def published() -> str:
    """What others measured, for orientation."""
    return "published by others, not measured here\n" + format_table([("what", "where", "figure"), *PUBLISHED])


def circumstances(device: torch.device) -> dict[str, Any]:
    """What figures depend on besides the code: device, versions, date and commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or None,
    }


def save(path: Path, device: torch.device, results: Sequence[dict[str, Any]]) -> None:
    """Write results and circumstances as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**circumstances(device), "results": list(results)}, indent=2)


def as_result(model: ModelSettings, case: Case, rows: Sequence[Row | ShotRow], ceiling: float) -> dict[str, Any]:
    """What is kept of a case."""
    return {
        "model": model.name,
        "video": asdict(model.video),
        "layers": model.network.transformer["num_layers"],
        "runtime": asdict(case.runtime),
        "memory_attention": case.model.memory_attention,
        "ceiling_tflops": ceiling,
        "rows": [asdict(row) for row in rows],
    }
