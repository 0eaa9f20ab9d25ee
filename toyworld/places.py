"""The six places of the toy world under four lights, with a landmark and a flag whose colours are a story's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from toyworld.attributes import HEIGHT, WIDTH, Scenery
from toyworld.draw import Array, Colour, box, coverage, disc, ellipse, mix, paint, rgb, tint, wedge

Shape = Callable[..., Array]  # signed distance over two coordinate arrays

FEET = -16.0  # the ground under the characters, in world units below the horizon
LANDMARK_AT, FLAG_AT = 33.0, 36.0  # distance from the middle of the place
ZOOM = {"medium": 1.05, "close": 1.3}  # pixels to a world unit
BASE = 60.0  # image row of the characters' feet

PROP_RGB = {
    "red": rgb(222, 52, 44),
    "yellow": rgb(250, 214, 60),
    "green": rgb(52, 160, 76),
    "blue": rgb(48, 104, 220),
    "purple": rgb(150, 70, 196),
    "white": rgb(248, 246, 240),
}


class Light:
    """A time of day.

    Args:
        colours: hexadecimal: sky from top to bottom, the same over the moon, and the sun.
        land, things, people: what the light multiplies their colours by.
        sun: column, rows above the horizon (`is_low`) or from the top, and radius.
        is_low: whether the sun stands at the horizon.
    """

    def __init__(
        self,
        colours: str,
        land: Colour,
        things: Colour,
        people: Colour,
        sun: tuple[float, float, float],
        is_low: bool,
    ) -> None:
        top, bottom, space_top, space_bottom, self.sun = (rgb(*bytes.fromhex(colour)) for colour in colours.split())
        self.sky, self.space = (top, bottom), (space_top, space_bottom)
        self.land, self.things, self.people = land, things, people
        self.sun_at, self.sun_radius, self.sun_low = sun[:2], sun[2], is_low


LIGHTS = {
    "dawn": Light(
        "96a0de ffcec4 16122c 704a76 fff0be", (1.0, 0.82, 0.86), (1.0, 0.9, 0.91), (1.0, 0.93, 0.94), (16, 7, 6.5), True
    ),
    "noon": Light(
        "56a6f0 c4e6fc 101634 36548c fff6aa", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (70, 9, 5.5), False
    ),
    "dusk": Light(
        "68428c ff9654 1a0a1a 8c3a28 ff603c", (0.93, 0.66, 0.6), (1.0, 0.8, 0.74), (1.0, 0.84, 0.78), (78, 6, 8.0), True
    ),
    "night": Light(
        "0e1236 303c74 04040e 0e1028 f4f2dc",
        (0.36, 0.42, 0.66),
        (0.68, 0.72, 0.9),
        (0.8, 0.82, 0.96),
        (74, 10, 5.0),
        False,
    ),
}

STARS = ((8, 6), (22, 14), (36, 5), (52, 12), (60, 4), (90, 20), (10, 22))


class Painter:
    """Paints shapes, in world units, of a place seen in a framing onto a canvas [3, 1, H, W] under a light.

    Heights count from the horizon up. There are two planes: near, where things stand, and far behind it.
    """

    def __init__(self, framing: str, light: Light) -> None:
        self.canvas = np.empty((3, 1, HEIGHT, WIDTH), dtype=np.float32)
        self.light, self.zoom, self.far_zoom = light, ZOOM[framing], ZOOM[framing] ** 0.6
        self.column = (np.arange(WIDTH, dtype=np.float32) + 0.5).reshape(1, 1, -1)
        self.row = (np.arange(HEIGHT, dtype=np.float32) + 0.5).reshape(1, -1, 1)
        self.horizon = BASE + FEET * self.zoom
        self.x = (self.column - WIDTH / 2) / np.float32(self.zoom)
        self.y = np.float32(FEET) + (np.float32(BASE) - self.row) / np.float32(self.zoom)
        self.far_x = (self.column - WIDTH / 2) / np.float32(self.far_zoom)
        self.far_y = (np.float32(self.horizon) - self.row) / np.float32(self.far_zoom)

    def far(self, colour: Colour, shape: Shape, at: tuple[float, float] = (0, 0)) -> None:
        """A shape on the far plane, given as a signed distance over coordinates about `at`."""
        distance = shape(self.far_x - at[0], self.far_y - at[1])
        paint(self.canvas, tint(colour, self.light.land), coverage(distance * self.far_zoom))

    def near(self, colour: Colour, shape: Shape, at: tuple[float, float] = (0, 0), light: Colour | None = None) -> None:
        """A shape on the near plane."""
        alpha = coverage(shape(self.x - at[0], self.y - at[1]) * self.zoom)
        paint(self.canvas, tint(colour, light or self.light.land), alpha)


def _sky(paints: Painter, place: str, time: str) -> None:
    """Sky gradient, sun or moon, stars at night and always over the moon (with the Earth)."""
    canvas, light = paints.canvas, paints.light
    top, bottom = light.space if place == "moon" else light.sky
    share = np.clip(paints.row / paints.horizon, 0, 1)
    canvas[:] = np.stack([np.float32(a) + np.float32(b - a) * share for a, b in zip(top, bottom, strict=True)])
    if time == "night" or place == "moon":
        for x, y in STARS:
            paint(canvas, rgb(250, 246, 225), 0.8 * coverage(disc(paints.column - x, paints.row - y, 0.7)))
    column, height = light.sun_at
    row = paints.horizon - height if light.sun_low else height
    glow = np.clip(1 - disc(paints.column - column, paints.row - row, light.sun_radius) / 9, 0, 1)
    paint(canvas, light.sun, 0.35 * glow**2)
    paint(canvas, light.sun, coverage(disc(paints.column - column, paints.row - row, light.sun_radius)))
    if time == "night":
        shadow = disc(paints.column - column - 2.6, paints.row - row + 1.6, light.sun_radius * 0.86)
        paint(canvas, mix(top, bottom, 0.25), coverage(shadow))
    if place == "moon":
        paint(canvas, rgb(70, 140, 220), coverage(disc(paints.column - 40, paints.row - 9, 5.5)))
        paint(canvas, rgb(110, 190, 120), coverage(ellipse(paints.column - 38.5, paints.row - 8.5, 2.6, 1.8)))


def _ground(paints: Painter, near: Colour, far: Colour) -> None:
    """Land from the horizon down, a little lighter or darker with distance."""
    light = paints.light.land
    share = np.clip((paints.row - paints.horizon) / (HEIGHT - paints.horizon), 0, 1)
    ends = zip(tint(far, light), tint(near, light), strict=True)
    colour = np.stack([np.float32(a) + np.float32(b - a) * share for a, b in ends])
    paint(paints.canvas, colour, coverage(paints.horizon - paints.row + np.zeros_like(paints.column)))


def _desert(paints: Painter) -> None:
    paints.far(rgb(228, 178, 112), lambda x, y: y - 8 - 3.5 * np.sin(0.085 * x + 0.8))
    paints.far(rgb(206, 148, 88), lambda x, y: y - 4 - 3.0 * np.sin(0.11 * x + 3.4))
    _ground(paints, rgb(246, 214, 146), rgb(232, 190, 122))
    for x, size in ((-22, 0.8), (19, 1.0)):
        cactus = rgb(70, 132, 84)
        paints.near(cactus, lambda u, v, s=size: box(u, v - 6 * s, 1.7 * s, 7 * s, 1.6 * s), (x, -4))
        paints.near(cactus, lambda u, v, s=size: box(u - 3.6 * s, v - 7 * s, 1.2 * s, 3 * s, 1.1 * s), (x, -4))
        paints.near(cactus, lambda u, v, s=size: box(u - 1.8 * s, v - 4.8 * s, 2.4 * s, 1.1 * s, 1 * s), (x, -4))


def _forest(paints: Painter) -> None:
    _ground(paints, rgb(128, 190, 92), rgb(92, 158, 80))
    for x in range(-66, 67, 12):
        tall = 15 + 4 * np.sin(x * 1.3)
        paints.far(rgb(44, 104, 72), lambda u, v, h=tall: wedge(u, v, 7.5, h), (x + 3, 0))
    for x in (-17, 20):
        paints.near(rgb(112, 78, 52), lambda u, v: box(u, v - 4, 1.3, 5), (x, -3))
        paints.near(rgb(64, 146, 78), lambda u, v: ellipse(u, v, 7.5, 8), (x, 10))


def _beach(paints: Painter) -> None:
    _ground(paints, rgb(250, 226, 168), rgb(240, 208, 146))
    paints.near(rgb(238, 244, 240), lambda x, y: np.abs(y + 3.6 - 0.5 * np.sin(0.3 * x)) - 4.6)
    paints.near(rgb(40, 148, 196), lambda x, y: np.abs(y + 3.4 - 0.5 * np.sin(0.3 * x)) - 3.6)
    palm, leaf = rgb(146, 104, 66), rgb(58, 150, 84)
    paints.near(palm, lambda u, v: box(u - 0.02 * v * v, v - 8, 1.2, 10, 1), (-20, -6))
    for dx, dy in ((-4, 0), (4, 0), (-1.5, 3), (3, 3)):
        paints.near(leaf, lambda u, v: ellipse(u, v, 4.6, 1.9), (dx - 16, dy + 12))
    paints.far(rgb(250, 250, 250), lambda u, v: wedge(u, v, 3.2, 7), (2, 1.2))
    paints.far(rgb(150, 88, 60), lambda u, v: box(u, v, 4, 1, 0.9), (2, 0.5))


def _city(paints: Painter) -> None:
    lit = paints.light is LIGHTS["night"] or paints.light is LIGHTS["dusk"]
    towers = ((-52, 15), (-37, 22), (-23, 13), (-9, 19), (5, 26), (19, 15), (33, 21), (47, 14))
    for i, (x, tall) in enumerate(towers):
        wall = (rgb(134, 144, 176), rgb(164, 150, 160), rgb(112, 128, 160))[i % 3]
        paints.far(wall, lambda u, v, h=tall: box(u, v - h / 2, 6.2, h / 2), (x, 0))
        window = rgb(255, 232, 150) if lit else rgb(206, 226, 240)
        light = (1.0, 1.0, 1.0) if lit else paints.light.land
        for level in range(5, tall - 2, 6):
            distance = box(np.abs(paints.far_x - x) - 2.6, paints.far_y - level, 1.1, 1.5)
            paint(paints.canvas, tint(window, light), 0.85 * coverage(distance * paints.far_zoom))
    _ground(paints, rgb(120, 122, 134), rgb(150, 150, 158))
    paints.near(rgb(196, 192, 184), lambda x, y: np.abs(y + 5.5 + 0 * x) - 2.0)
    paints.near(rgb(240, 232, 200), lambda x, y: box(np.mod(x, 16) - 8, y + 20.5, 4, 0.7))


def _snow(paints: Painter) -> None:
    for x, tall, wide in ((-44, 20, 30), (34, 24, 36), (-4, 16, 26)):
        paints.far(rgb(132, 150, 186), lambda u, v, h=tall, w=wide: wedge(u, v, w, h), (x, 0))
        paints.far(rgb(246, 250, 255), lambda u, v, h=tall, w=wide: wedge(u, v, w * 0.36, h * 0.36), (x, tall * 0.64))
    _ground(paints, rgb(250, 252, 255), rgb(214, 228, 244))
    for x, size in ((-20, 1.0), (18, 0.85)):
        for level in (0, 5):
            pine = lambda u, v, s=size: wedge(u, v, 5.6 * s, 9 * s)  # noqa: E731
            paints.near(rgb(58, 120, 104), pine, (x, -4 + level * size))


def _moon(paints: Painter) -> None:
    paints.far(rgb(128, 126, 138), lambda x, y: y - 5 - 3 * np.sin(0.07 * x) - 1.4 * np.sin(0.23 * x + 1))
    _ground(paints, rgb(196, 194, 204), rgb(158, 156, 170))
    for x, y, size in ((-36, -9, 6.0), (6, -7, 5.0), (38, -20, 8.0), (-18, -22, 7.0)):
        paints.near(rgb(128, 126, 140), lambda u, v, s=size: ellipse(u, v, s, s * 0.34), (x, y))
        paints.near(rgb(168, 166, 178), lambda u, v, s=size: ellipse(u, v, s * 0.8, s * 0.22), (x, y - 0.5))


LAND = {"desert": _desert, "forest": _forest, "beach": _beach, "city": _city, "snow field": _snow, "moon": _moon}


def _tent(paints: Painter, colour: Colour, at: tuple[float, float]) -> None:
    light = paints.light.things
    paints.near(colour, lambda u, v: wedge(u, v, 12, 18), at, light)
    paints.near(mix(colour, (0.1, 0.05, 0.1), 0.7), lambda u, v: wedge(u, v, 4, 11), at, light)


def _house(paints: Painter, colour: Colour, at: tuple[float, float], wall: Colour, steep: float) -> None:
    light, (x, y) = paints.light.things, at
    paints.near(wall, lambda u, v: box(u, v - 5, 8.5, 5.5), at, light)
    paints.near(colour, lambda u, v: wedge(u, v, 12, steep), (x, y + 9), light)
    paints.near(colour, lambda u, v: box(u, v - 3, 2.2, 4), at, light)


def _hut(paints: Painter, colour: Colour, at: tuple[float, float]) -> None:
    _house(paints, colour, at, rgb(176, 128, 84), 9.0)


def _cabin(paints: Painter, colour: Colour, at: tuple[float, float]) -> None:
    _house(paints, colour, at, rgb(124, 92, 80), 13.0)


def _parasol(paints: Painter, colour: Colour, at: tuple[float, float]) -> None:
    light = paints.light.things
    paints.near(rgb(236, 226, 210), lambda u, v: box(u, v - 8, 0.9, 9), at, light)
    paints.near(colour, lambda u, v: np.maximum(ellipse(u, v - 9, 12.5, 11), 9 - v), at, light)
    paints.near(mix(colour, (1, 1, 1), 0.45), lambda u, v: np.maximum(ellipse(u, v - 9, 4.2, 11), 9 - v), at, light)


def _bus(paints: Painter, colour: Colour, at: tuple[float, float]) -> None:
    light = paints.light.things
    paints.near(colour, lambda u, v: box(u, v - 8.5, 13, 6.5, 2.5), at, light)
    paints.near(rgb(190, 226, 244), lambda u, v: box(np.abs(np.abs(u) - 4.2) - 3.2, v - 11, 2.2, 2, 0.5), at, light)
    paints.near(rgb(40, 40, 48), lambda u, v: disc(np.abs(u) - 7, v - 2.2, 2.6), at, light)


def _rocket(paints: Painter, colour: Colour, at: tuple[float, float]) -> None:
    light = paints.light.things
    paints.near(mix(colour, (0, 0, 0), 0.35), lambda u, v: wedge(u, v, 10, 12), at, light)
    paints.near(colour, lambda u, v: ellipse(u, v - 11, 5.6, 12.5), at, light)
    paints.near(rgb(200, 236, 250), lambda u, v: disc(u, v - 14, 2.4), at, light)


LANDMARKS = {
    "desert": ("tent", _tent),
    "forest": ("hut", _hut),
    "beach": ("parasol", _parasol),
    "city": ("bus", _bus),
    "snow field": ("cabin", _cabin),
    "moon": ("rocket", _rocket),
}


def _flag(paints: Painter, colour: Colour, at: tuple[float, float], toward: float) -> None:
    light = paints.light.things
    paints.near(rgb(232, 226, 214), lambda u, v: box(u, v - 9, 0.9, 11), at, light)
    paints.near(colour, lambda u, v: box(u - toward * 6, v - 15, 6.2, 4.8, 0.8), at, light)


@lru_cache(maxsize=1024)
def draw_place(place: str, time: str, framing: str, scenery: Scenery | None) -> Array:
    """A place without characters, [3, H, W] in 0..1, not to be written to; without scenery: no landmark and no flag."""
    paints = Painter(framing, LIGHTS[time])
    _sky(paints, place, time)
    LAND[place](paints)
    if scenery is not None:
        sign = -1.0 if scenery.side == "left" else 1.0
        LANDMARKS[place][1](paints, PROP_RGB[scenery.landmark], (sign * LANDMARK_AT, -9))
        _flag(paints, PROP_RGB[scenery.flag], (-sign * FLAG_AT, -9), sign)
    paints.canvas.flags.writeable = False
    return paints.canvas[:, 0]
