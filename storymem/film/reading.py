"""``film.json`` is read and checked here, and converted if an older version wrote it. Loads no torch."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from storymem.film.manifest import MANIFEST, MANIFEST_TYPE, SCHEMA, FilmError, Manifest, new_slots, scripts
from storymem.film.settings import GIVEN_FRAMES
from storymem.io import FileError, check_regular, parse_json, read_text

_CURE = "put it back from a copy, or choose another output"


def read_manifest(folder: Path) -> tuple[Manifest, dict[str, Any]]:
    """The manifest of the film in ``folder``, and the JSON object that it was read from.

    Raises:
        FilmError: if there is none, or it is not understood.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        raise FilmError(f"{folder} holds no film: there is no {MANIFEST}")
    check_regular(path)
    try:
        written = parse_json(read_text(path), MANIFEST)
        if not isinstance(written, dict) or "schema" not in written:
            raise FileError("it is not the manifest of a film")
        if written["schema"] not in range(1, SCHEMA + 1) or isinstance(written["schema"], bool):
            known = f"this version reads 1 to {SCHEMA}"
            raise FilmError(f"{path}: schema {written['schema']!r:.60} is not known; {known}: update storymem")
        if missing := sorted({"story", "config", "shots", "video"} - written.keys()):
            raise FileError(f"{missing[0]} is missing")
        content = _converted(written)
        return MANIFEST_TYPE.validate_json(json.dumps(content), strict=True), written
    except FilmError:
        raise
    except FileError as error:
        raise FilmError(f"{path} is damaged ({error}): {_CURE}") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise FilmError(f"{path} is damaged ({where}: {problem['msg']}): {_CURE}") from None


def _converted(written: dict[str, Any]) -> dict[str, Any]:
    """The content of an older schema as this one."""
    try:
        content = _counted_from_1(written) if written["schema"] == 1 else written
        return _with_takes(content) if written["schema"] < SCHEMA else content
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise FileError(f"schema {written['schema']} is not read: {error!r:.60}") from None


def _counted_from_1(written: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 as schema 2."""
    shots = []
    for shot in written["shots"]:
        keyframes = [{**keyframe, "frame": keyframe["frame"] + 1} for keyframe in shot["keyframes"]]
        others = {name: value for name, value in shot.items() if name != "index"}
        shots.append({**others, "shot": shot["index"] + 1, "keyframes": keyframes})
    return {**written, "shots": shots}


def _with_takes(written: dict[str, Any]) -> dict[str, Any]:
    """Schema 2 as schema 3: its shots are the chosen takes, whose files keep their names."""
    now, slots = scripts(written["story"]), new_slots(written["story"])
    takes: list[dict[str, Any]] = []
    for place, record in enumerate(written["shots"]):
        take = re.search(r"_take(\d{1,6})\.mp4$", record["file"])
        before = takes[-1] if takes and GIVEN_FRAMES[record["mode"]] else None
        takes.append(
            {
                **{name: value for name, value in record.items() if name != "prompt"},
                "shot": place + 1,
                "folder": slots[place].folder,
                "take": int(take[1]) if take else 1,
                "script": {**now[place].content, "prompt": record["prompt"]},
                "follows": None if before is None else before.get("sha256", {}).get(before["file"]),
            }
        )
    chosen = [take["take"] for take in takes] + [None] * (len(slots) - len(takes))
    shots = [{"folder": slot.folder, "take": take} for slot, take in zip(slots, chosen, strict=True)]
    return {**written, "shots": shots, "takes": takes}
