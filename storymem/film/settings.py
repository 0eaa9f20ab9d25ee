"""The settings of ``generate.yaml``, and how each shot of a story is made under them. Loads no torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from pkgutil import resolve_name
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator
from pydantic.dataclasses import dataclass

from storymem.config import STRICT, ConfigError, StoryPath, UserPath, build_settings, check_bounds, nearest
from storymem.scorers import ScorerSettings
from storymem.story import MAX_SHOTS, Shot, Story
from storymem.wan.combinations import check_combinations, check_reach
from storymem.wan.settings import (
    MAX_SEED,
    Continuity,
    ModelSettings,
    RuntimeSettings,
    SamplerSettings,
    VideoSettings,
)

FirstShot = Literal["auto", "t2v", "m2v"]
Mode = Literal["t2v", "i2v", "m2v", "mi2v", "mm2v"]

MAX_TAKES = 1000  # of one shot in one run
END_FRAMES = 5  # of a take, saved without loss

#: ``3`` or ``3,5-7``; see :func:`parse_shots`.
ShotNumbers = Annotated[str, BeforeValidator(lambda given: str(given) if type(given) is int else given)]


def _unquoted(given: object) -> object:
    if type(given) is int:  # YAML reads 9:16 as a number to the base of 60
        raise ValueError(f'write it in quotes: "{given // 60}:{given % 60}"')
    return given


#: ``9:16``; see :func:`parse_aspect`.
Aspect = Annotated[str, BeforeValidator(_unquoted)]

GIVEN_FRAMES: dict[Mode, int] = {"t2v": 0, "i2v": 0, "m2v": 0, "mi2v": 1, "mm2v": 5}
"""How many frames of the previous shot a shot begins with; they are cut from its video."""


def _checked(node: dict[str, Any]) -> dict[str, Any]:
    target, values = str(node.get("_target_")), {key: node[key] for key in node if not key.startswith("_")}
    try:
        cls = resolve_name(target) if target.startswith("storymem.memory.") else None
    except (ImportError, AttributeError):
        cls = None  # reported with its cause where the policy is built
    is_policy = hasattr(cls, "recall") or hasattr(cls, "select")
    if is_policy and isinstance(cls, type) and dataclasses.is_dataclass(cls):
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [key for key in values if key not in known]:
            raise ConfigError([f"{key}: unknown key{nearest(key, known)}" for key in unknown])
        build_settings(cls, values)
    return node


#: A ``_target_`` node of a policy; the arguments of the package's own are checked with all other settings.
PolicyNode = Annotated[dict[str, Any], AfterValidator(_checked)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MemorySettings:
    """The memory.

    Args:
        recall: the recall policy, a ``_target_`` node; see :class:`storymem.memory.RecallPolicy`.
        selector: the selection policy, a ``_target_`` node; see :class:`storymem.memory.SelectionPolicy`.
        reference_fit: how reference images are resized. cover: the edges are cut; contain: whole, on grey; auto:
            contain where more than a quarter would be cut, else cover with the top kept.
    """

    recall: PolicyNode
    selector: PolicyNode
    reference_fit: Literal["auto", "cover", "contain"] = "auto"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GenerateSettings:
    """The settings of ``storymem generate``; see :class:`storymem.film.storyteller.Storyteller`.

    ``model.video`` has the size that ``aspect`` or ``size`` give.

    Args:
        story: a story file or a folder of stories, or several of them.
        output: the film's folder, films/<title> by default; of several stories, the folder of their films.
        continuity: what a shot with ``cut: false`` is given of the previous one: none, mi2v (its last frame), mm2v (its
            last five).
        first_shot: t2v (text-to-video), m2v (memory-to-video, references as memory), auto (m2v if there are
            references).
        aspect: width to height of the film, such as 16:9 or 9:16, in multiples that the model can do and no more pixels
            than `model.video` has.
        size: WIDTHxHEIGHT of the film in pixels, such as 480x832.
        seed: of the first shot; each later shot uses the next number, unless the story gives it a seed.
        shot: of which shots to make another take (3 or 3,5-7), with the memory that they would see now.
        following: whether to regenerate the shots after it too.
        takes: how many takes to make of it, each from its own noise; the first is chosen.
        take: choose this take of the shot, and make nothing.
        resume: auto makes the shots that have no take; from_shot:N regenerates shots N, N + 1, ...
        dry_run: check everything and print the plan.
    """

    story: StoryPath | tuple[StoryPath, ...]
    model: ModelSettings
    sampler: SamplerSettings
    memory: MemorySettings
    scorer: ScorerSettings
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    output: UserPath | None = None
    continuity: Continuity = "mi2v"
    first_shot: FirstShot = "auto"
    aspect: Aspect | None = None
    size: str | None = None
    seed: int = 0
    shot: ShotNumbers | None = None
    following: bool = False
    takes: int = 1
    take: int | None = None
    resume: str = "auto"
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_bounds(self, seed=(0, MAX_SEED - MAX_SHOTS))
        if self.aspect is not None or self.size is not None:
            object.__setattr__(self, "model", replace(self.model, video=self._video()))
        if self.take is not None and (self.following or self.takes != 1 or self.shot is None):
            raise ValueError(f"take={self.take} chooses a take of one shot: write shot=3 take={self.take}, for example")
        if not self.model.spec.layouts:
            raise ValueError(f"model.base={self.model.base} cannot recall: shots with memory need wan2.2-a14b")
        if self.memory.recall.get("_target_") == "storymem.memory.Learned":
            object.__setattr__(self, "model", _with_query(self.model))
        check_combinations(self.model, self.sampler, self.runtime)
        if isinstance(capacity := self.memory.recall.get("capacity"), int):
            check_reach(self.model, capacity, "memory.recall.capacity")
        nodes = {"memory.recall": self.memory.recall, "memory.selector": self.memory.selector}
        nodes |= {"scorer.clip": self.scorer.clip, "scorer.quality": self.scorer.quality}
        if without := [name for name, node in nodes.items() if "_target_" not in node]:
            raise ValueError(f"{without[0]} names no class: write {without[0]}._target_=package.module.Class")

    def _video(self) -> VideoSettings:
        spec, video = self.model.spec, self.model.video
        if self.size is None:
            height, width = spec.nearest_size(parse_aspect(self.aspect or ""), video.height * video.width)
        elif self.aspect is not None:
            raise ValueError(f"aspect={self.aspect} and size={self.size} exclude each other: leave one of them out")
        else:
            height, width = parse_size(self.size, spec.multiple)
        return replace(video, height=height, width=width)


def parse_aspect(text: str) -> float:
    """``"9:16"`` -> 0.5625, width / height, from 1:8 to 8:1. ``ValueError`` for anything else."""
    found = re.fullmatch(r"(\d{1,5}(?:\.\d{1,5})?):(\d{1,5}(?:\.\d{1,5})?)", text.strip(), re.ASCII)
    width, height = map(float, found.groups()) if found else (0.0, 0.0)
    if not (width and height and 1 / 8 <= width / height <= 8):
        raise ValueError(f"aspect={text}: write width:height, such as 16:9 or 9:16, from 1:8 to 8:1")
    return width / height


def parse_size(text: str, multiple: int) -> tuple[int, int]:
    """``"480x832"``, width and height in pixels -> (832, 480). ``ValueError`` if they are no multiples."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip(), re.ASCII)
    if found is None:
        raise ValueError(f"size={text}: write WIDTHxHEIGHT in pixels, such as 832x480 or 480x832")
    width, height = map(int, found.groups())
    if width % multiple or height % multiple or not width * height:
        nearest = "x".join(str(max(1, round(side / multiple)) * multiple) for side in (width, height))
        raise ValueError(f"size={text}: width and height must be multiples of {multiple}; write size={nearest}")
    return height, width


def _with_query(model: ModelSettings) -> ModelSettings:
    """``model`` whose adapter must hold a KeyframeQuery, with which keyframes are recalled."""
    if model.adapter is None and model.weights is not None:
        raise ValueError("memory.recall=learned uses the KeyframeQuery of model.adapter, which is null")
    return model if model.adapter is None else replace(model, adapter=replace(model.adapter, query=True))


def build_part(node: Mapping[str, Any], key: str) -> Any:
    """The object of a ``_target_`` node. ``ValueError`` names ``key`` if its class refuses an argument."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node)
    except InstantiationException as error:
        if type(error.__cause__) not in (TypeError, ValueError):  # others name their file
            raise
        raise ValueError(f"{key}: {error.__cause__}") from None


def build_policy(node: Mapping[str, Any], key: str, needs: Sequence[str]) -> Any:
    """The policy of a ``_target_`` node. ``ValueError`` if it lacks an attribute that its protocol ``needs``."""
    policy = build_part(node, key)
    if lacking := [name for name in needs if not hasattr(policy, name)]:
        raise ValueError(f"{key}: {node['_target_']} has no {' and no '.join(lacking)}; see docs/extending.md")
    return policy


def mode_of(shot: Shot, story: Story, *, continuity: Continuity, first_shot: FirstShot) -> Mode:
    """How a shot is made (paper sections 3.3 and 3.5).

    The first shot: by text-to-video ("t2v"), or by memory-to-video with the story's references as memory ("m2v", then
    called MR2V); "auto" is the latter if there are references. A shot with ``cut: false``: ``continuity``. Others:
    "m2v".
    """
    if shot.index == 0:
        has_references = bool(story.references or shot.references)
        return "t2v" if first_shot == "t2v" or (first_shot == "auto" and not has_references) else "m2v"
    return "m2v" if shot.cut or continuity == "none" else continuity


def uses_text_to_video(story: Story, settings: GenerateSettings) -> bool:
    """Whether the film's first shot needs the text-to-video model."""
    first = story.shots[0]
    return mode_of(first, story, continuity=settings.continuity, first_shot=settings.first_shot) == "t2v"


def check_lengths(story: Story, *, frames: int, continuity: Continuity, first_shot: FirstShot) -> None:
    """Raise ``ValueError`` for shots too short for the next one to continue from, or to show anything new.

    ``frames`` is the length of shots without one of their own.
    """
    problems = []
    for shot in story.shots:
        mode = mode_of(shot, story, continuity=continuity, first_shot=first_shot)
        least = max(GIVEN_FRAMES["mm2v"], GIVEN_FRAMES[mode] + 4)
        if (length := shot.frames or frames) < least:
            problems.append(f"{shot.label} has {length} frames; with continuity={continuity} it needs at least {least}")
    if problems:
        raise ValueError("\n".join(problems))


@dataclass(frozen=True, kw_only=True)
class Work:
    """Which takes a run makes.

    Args:
        shots: of which shots (from 0); None: of those that have none.
        onwards: of this shot and of all later ones, with the noise that they had.
        takes: how many of each of ``shots``, with noise of their own.
        words: the settings that ask for it.
    """

    shots: tuple[int, ...] | None = None
    onwards: int | None = None
    takes: int = 1
    words: str = ""


def work_of(settings: GenerateSettings, total: int) -> Work:
    """What the settings ask for, of a story of ``total`` shots; see :func:`parse_work`."""
    asked = {name: getattr(settings, name) for name in ("resume", "shot", "following", "takes")}
    return parse_work(total, **asked)


def parse_work(total: int, *, resume: str = "auto", shot: str | None, following: bool, takes: int) -> Work:
    """The settings of these names, for a story of ``total`` shots. ``ValueError`` for what is not understood."""
    if shot is None:
        if following or takes != 1:
            raise ValueError(f"{'following' if following else 'takes'} needs a shot: write shot=3 too, for example")
        return Work(onwards=parse_resume(resume, total), words="" if resume == "auto" else f"resume={resume}")
    if resume != "auto":
        raise ValueError(f"shot={shot} and resume={resume} exclude each other: leave one of them out")
    if not 1 <= takes <= MAX_TAKES:
        raise ValueError(f"takes={takes}: write a number from 1 to {MAX_TAKES}")
    shots = parse_shots(shot, total)
    words = [f"shot={shot}", *(["following=true"] if following else []), *([f"takes={takes}"] if takes > 1 else [])]
    return Work(shots=shots, onwards=shots[0] if following else None, takes=takes, words=" ".join(words))


def parse_shots(text: str, total: int) -> tuple[int, ...]:
    """``"3,5-7"`` -> (2, 4, 5, 6), for a story of ``total`` shots. ``ValueError`` for anything else."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        numbers = (first, last if dash else first)
        if not all(number.isdecimal() and 1 <= int(number[:9]) <= total for number in numbers) or int(first) > int(
            numbers[1]
        ):
            raise ValueError(f"shot={text}: write numbers from 1 to {total}, such as 3 or 3,5-7")
        found |= set(range(int(first) - 1, int(numbers[1])))
    return tuple(sorted(found))


def parse_resume(resume: str, shots: int) -> int | None:
    """``"auto"`` -> None; ``"from_shot:N"`` -> N - 1. ``ValueError`` for anything else."""
    if resume == "auto":
        return None
    name, _, number = resume.partition(":")
    if name == "from_shot" and number.isdecimal() and 1 <= int(number) <= shots:
        return int(number) - 1
    raise ValueError(f"resume={resume}: write auto, or from_shot:N with N from 1 to {shots}")


def estimated_bytes(frames: int, height: int, width: int) -> int:
    """Upper estimate of the disk space for a take: its video, its copy in the film, last frames and keyframes.

    0.15 bytes per pixel of video, and lossless images uncompressed.
    """
    pixels = height * width
    return int(2 * 0.15 * frames * pixels + (END_FRAMES + 3) * 3 * pixels)
