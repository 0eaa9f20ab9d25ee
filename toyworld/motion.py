"""What characters do in a shot: an action and a starting state become poses, whose last frame is the end state."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toyworld.attributes import FRAMES
from toyworld.characters import Pose
from toyworld.draw import Array

SPOT = {"medium": 16.0, "close": 11.0}  # a character stands in the middle or so many pixels beside it
TOGETHER, APART = 20.0, 30.0  # how far from the middle two characters stand, and from where they come to meet
JUMP = {"medium": 9.0, "close": 6.0}  # pixels


@dataclass(frozen=True, kw_only=True)
class State:
    """Where the characters stand at a cut or where two shots join: positions in pixels, and facings."""

    xs: tuple[float, ...]
    facings: tuple[float, ...]


def possible_actions(state: State) -> tuple[str, ...]:
    """The actions of a shot that goes on from `state`."""
    if len(state.xs) == 2:
        return "waits", "jumps"
    (x,) = state.xs
    return ("jumps", "waits", "turns") + (("walks right",) if x <= 0 else ()) + (("walks left",) if x >= 0 else ())


def starting_state(rng: np.random.Generator, action: str, framing: str) -> State:
    """Where a shot begins after a cut."""
    if action == "meets":
        return State(xs=(-APART, APART), facings=(1.0, -1.0))
    facing, spots = float(rng.choice([-1.0, 1.0])), [-1.0, 0.0, 1.0]
    if action.startswith("walks"):
        facing = 1.0 if action == "walks right" else -1.0
        spots.remove(facing)
    return State(xs=(SPOT[framing] * float(rng.choice(spots)),), facings=(facing,))


def act(action: str, framing: str, state: State) -> tuple[Pose, ...]:
    """Poses of the whole cast; those of the first frame are the starting state's."""
    if action == "meets":
        return tuple(_walk(x, float(np.sign(x)) * TOGETHER, f, f) for x, f in zip(state.xs, state.facings, strict=True))
    if action.startswith("walks"):
        way = 1.0 if action == "walks right" else -1.0
        return (_walk(state.xs[0], state.xs[0] + way * SPOT[framing], way, state.facings[0]),)
    return tuple(_stay(action, x, f, framing) for x, f in zip(state.xs, state.facings, strict=True))


def end_state(poses: tuple[Pose, ...]) -> State:
    """What the next shot goes on from."""
    return State(
        xs=tuple(round(float(pose.x[-1]), 3) for pose in poses), facings=tuple(float(pose.facing[-1]) for pose in poses)
    )


def _time() -> Array:
    return np.linspace(0, 1, FRAMES, dtype=np.float32)


def _walk(start: float, end: float, way: float, facing: float) -> Pose:
    """A walk of two steps; the character looks round first where it faced elsewhere."""
    t = _time()
    return Pose(
        x=np.float32(start) + np.float32(end - start) * t,
        lift=(1.2 * np.abs(np.sin(2 * np.pi * t)) * (t < 1)).astype(np.float32),
        facing=(facing + (way - facing) * np.clip(6 * t, 0, 1)).astype(np.float32),
        stride=(np.sin(2 * np.pi * t) * (t < 1)).astype(np.float32),
    )


def _stay(action: str, x: float, facing: float, framing: str) -> Pose:
    """The actions that happen on the spot; "waits" stands still."""
    t, zero = _time(), np.zeros(FRAMES, dtype=np.float32)
    lift, faces = zero, zero + np.float32(facing)
    if action == "jumps":
        lift = (np.float32(JUMP[framing]) * np.sin(np.pi * t) * (t < 1)).astype(np.float32)
    if action == "turns":
        faces = (np.float32(facing) * np.clip(1 - 2 * (t - 0.25) / 0.5, -1, 1)).astype(np.float32)
    return Pose(x=zero + np.float32(x), lift=lift, facing=faces, stride=zero)
