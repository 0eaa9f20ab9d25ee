"""What characters and camera do in a shot: an action and a starting state become poses and an end state."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toyworld.attributes import FRAMES, WIDTH
from toyworld.characters import Pose
from toyworld.draw import Array
from toyworld.places import ZOOM

MEETING = 11.5  # how far from the middle two characters stop
PAN = 4.0  # a pan runs from this far on one side of the middle to the other


@dataclass(frozen=True, kw_only=True)
class State:
    """Where everything stands at a cut or at the joint of two shots: positions and facings of the cast, the camera."""

    xs: tuple[float, ...]
    facings: tuple[float, ...]
    camera: float = 0.0


def half_width(framing: str) -> float:
    """How far the picture reaches to each side of its middle, in world units."""
    return WIDTH / 2 / ZOOM[framing]


def possible_actions(framing: str, state: State) -> tuple[str, ...]:
    """The actions a shot may have that goes on from `state`."""
    if len(state.xs) == 2:
        return ("waits", "jumps")
    room = 0.05 * half_width(framing)
    actions = ["jumps", "spins", "waits", "turns"]
    if state.xs[0] < room:
        actions.append("walks right")
    if state.xs[0] > -room:
        actions.append("walks left")
    return tuple(actions)


def possible_pans(camera: float) -> tuple[str, ...]:
    """The camera moves that keep the camera near the middle of the place."""
    return ("still",) + (("left",) if camera >= 0 else ()) + (("right",) if camera <= 0 else ())


def starting_state(rng: np.random.Generator, action: str, framing: str, pan: str) -> State:
    """Where a shot begins after a cut."""
    reach = half_width(framing)
    camera = {"still": 0.0, "left": PAN, "right": -PAN}[pan]
    if action == "meets":
        start = float(rng.uniform(0.72, 0.85)) * reach
        return State(xs=(-start, start), facings=(1.0, -1.0), camera=camera)
    facing = float(rng.choice([-1.0, 1.0]))
    x = float(rng.uniform(-0.35, 0.35)) * reach
    if action.startswith("walks"):
        facing = 1.0 if action == "walks right" else -1.0
        x = -facing * float(rng.uniform(0.35, 0.5)) * reach
    return State(xs=(x,), facings=(facing,), camera=camera)


def camera_path(pan: str, start: float) -> Array:
    """Camera positions [F]; the first is where the shot starts."""
    step = {"still": 0.0, "left": -2 * PAN, "right": 2 * PAN}[pan]
    end = float(np.clip(start + step, -PAN, PAN))
    return np.linspace(start, end, FRAMES, dtype=np.float32)


def act(rng: np.random.Generator, action: str, framing: str, state: State) -> tuple[Pose, ...]:
    """Poses of the whole cast; those of the first frame are the starting state's."""
    reach = half_width(framing)
    if action == "meets":
        return tuple(_walk(x, np.sign(x) * MEETING, f) for x, f in zip(state.xs, state.facings, strict=True))
    if action.startswith("walks"):
        way = 1.0 if action == "walks right" else -1.0
        return (_walk(state.xs[0], way * float(rng.uniform(0.32, 0.5)) * reach, way, state.facings[0]),)
    return tuple(_stay(action, x, f, framing) for x, f in zip(state.xs, state.facings, strict=True))


def end_state(poses: tuple[Pose, ...], camera: Array) -> State:
    """What the next shot goes on from."""
    return State(
        xs=tuple(float(pose.x[-1]) for pose in poses),
        facings=tuple(float(pose.facing[-1]) for pose in poses),
        camera=float(camera[-1]),
    )


def _time() -> Array:
    return np.linspace(0, 1, FRAMES, dtype=np.float32)


def _walk(start: float, end: float, way: float, facing: float | None = None) -> Pose:
    """A walk of four steps; the character looks round first where it faced elsewhere."""
    t, zero = _time(), np.zeros(FRAMES, dtype=np.float32)
    from_facing = way if facing is None else facing
    return Pose(
        x=np.float32(start) + np.float32(end - start) * t,
        lift=(1.4 * np.abs(np.sin(4 * np.pi * t)) * (t < 1)).astype(np.float32),
        size=zero + 1,
        facing=(from_facing + (way - from_facing) * np.clip(6 * t, 0, 1)).astype(np.float32),
        roll=zero,
        stride=(np.sin(4 * np.pi * t) * (t < 1)).astype(np.float32),
    )


def _stay(action: str, x: float, facing: float, framing: str) -> Pose:
    """The actions that happen on the spot."""
    t, zero = _time(), np.zeros(FRAMES, dtype=np.float32)
    pose = {"lift": zero, "size": zero + 1, "facing": zero + np.float32(facing), "roll": zero}
    if action == "jumps":
        height = {"wide": 9.0, "medium": 7.5, "close": 5.5}[framing]
        pose["lift"] = np.float32(height) * np.abs(np.sin(2 * np.pi * t)) * (t < 1)
    elif action == "spins":
        turn = t * t * (3 - 2 * t)
        pose["roll"] = np.float32(2 * np.pi * facing) * turn * (t < 1)
        pose["lift"] = (
            np.float32({"wide": 6.0, "medium": 5.0, "close": 3.5}[framing]) * np.sin(np.pi * turn) ** 2 * (t < 1)
        )
    elif action == "grows":
        pose["size"] = np.float32(0.6) + np.float32(0.4) * t
    elif action == "waits":
        pose["size"] = 1 + np.float32(0.02) * np.sin(2 * np.pi * t) * (t < 1)
    elif action == "turns":
        pose["facing"] = np.float32(facing) * np.clip(1 - 2 * (t - 0.25) / 0.5, -1, 1)
    pose = {name: values.astype(np.float32) for name, values in pose.items()}
    return Pose(x=zero + np.float32(x), stride=zero, **pose)
