"""The six places of the toy world under four lights, with a landmark and a flag whose colours are a story's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from toyworld.attributes import HEIGHT, WIDTH, Scenery
from toyworld.draw import Array, Colour, box, coverage, disc, ellipse, mix, paint, rgb, tint, wedge

Shape = Callable[..., Array]  # signed distance over two coordinate arrays

FEET = -16.0  # where characters stand, in world units below the horizon
LANDMARK_AT, FLAG_AT = 24.0, 31.0  # distance from the middle of the place
ZOOM = {"wide": 1.0, "medium": 1.45, "close": 1.9}
BASE = {"wide": 54.0, "medium": 58.0, "close": 61.0}  # image row of the characters' feet

PROP_RGB = {
    "red": rgb(222, 52, 44),
    "yellow": rgb(250, 214, 60),
    "green": rgb(52, 160, 76),
    "blue": rgb(48, 104, 220),
    "purple": rgb(150, 70, 196),
    "white": rgb(248, 246, 240),
}


@dataclass(frozen=True, kw_only=True)
class Light:
    """A time of day: the sky from top to bottom, the sun, and what the light does to colours."""

    sky: tuple[Colour, Colour]
    space: tuple[Colour, Colour]  # the sky over the moon
    land: Colour
    things: Colour
    people: Colour
    sun: Colour
    sun_at: tuple[float, float]  # column, and rows above the horizon (dawn and dusk) or from the top
    sun_low: bool
    sun_radius: float


LIGHTS = {
    "dawn": Light(
        sky=(rgb(150, 160, 222), rgb(255, 206, 196)),
        space=(rgb(22, 18, 44), rgb(112, 74, 118)),
        land=(1.0, 0.82, 0.86),
        things=(1.0, 0.9, 0.91),
        people=(1.0, 0.93, 0.94),
        sun=rgb(255, 240, 190),
        sun_at=(16, 7),
        sun_low=True,
        sun_radius=6.5,
    ),
    "noon": Light(
        sky=(rgb(86, 166, 240), rgb(196, 230, 252)),
        space=(rgb(16, 22, 52), rgb(54, 84, 140)),
        land=(1.0, 1.0, 1.0),
        things=(1.0, 1.0, 1.0),
        people=(1.0, 1.0, 1.0),
        sun=rgb(255, 246, 170),
        sun_at=(70, 9),
        sun_low=False,
        sun_radius=5.5,
    ),
    "dusk": Light(
        sky=(rgb(104, 66, 140), rgb(255, 150, 84)),
        space=(rgb(26, 10, 26), rgb(140, 58, 40)),
        land=(0.93, 0.66, 0.6),
        things=(1.0, 0.8, 0.74),
        people=(1.0, 0.84, 0.78),
        sun=rgb(255, 96, 60),
        sun_at=(78, 6),
        sun_low=True,
        sun_radius=8.0,
    ),
    "night": Light(
        sky=(rgb(14, 18, 54), rgb(48, 60, 116)),
        space=(rgb(4, 4, 14), rgb(14, 16, 40)),
        land=(0.36, 0.42, 0.66),
        things=(0.58, 0.62, 0.84),
        people=(0.68, 0.71, 0.9),
        sun=rgb(244, 242, 220),
        sun_at=(74, 10),
        sun_low=False,
        sun_radius=5.0,
    ),
}

STARS = ((8, 6), (22, 13), (35, 4), (47, 10), (58, 5), (64, 15), (88, 7), (92, 17), (14, 20), (41, 18))


@dataclass(frozen=True, kw_only=True)
class View:
    """Where the camera looks: coordinates of every pixel on the near plane (where things stand) and the far one.

    Heights count from the horizon up, in world units; one unit is one pixel of a wide shot.
    """

    zoom: float
    far_zoom: float
    x: Array  # [F, 1, W]
    y: Array  # [1, H, 1]
    far_x: Array
    far_y: Array
    column: Array  # [1, 1, W], pixels
    row: Array  # [1, H, 1], pixels
    horizon: float  # image row


def view(framing: str, camera: Array) -> View:
    """The view of a framing from camera positions [F] in world units to the right of the place's middle."""
    zoom, base = ZOOM[framing], BASE[framing]
    far_zoom = zoom**0.6
    column = (np.arange(WIDTH, dtype=np.float32) + 0.5).reshape(1, 1, -1)
    row = (np.arange(HEIGHT, dtype=np.float32) + 0.5).reshape(1, -1, 1)
    camera = camera.astype(np.float32).reshape(-1, 1, 1)
    horizon = base + FEET * zoom
    return View(
        zoom=zoom,
        far_zoom=far_zoom,
        x=(column - WIDTH / 2) / np.float32(zoom) + camera,
        y=np.float32(FEET) + (np.float32(base) - row) / np.float32(zoom),
        far_x=(column - WIDTH / 2) / np.float32(far_zoom) + np.float32(0.4) * camera,
        far_y=(np.float32(horizon) - row) / np.float32(far_zoom),
        column=column,
        row=row,
        horizon=horizon,
    )


class Painter:
    """Paints world-sized shapes of a place onto a canvas, under its light."""

    def __init__(self, canvas: Array, look: View, light: Light) -> None:
        self.canvas, self.view, self.light = canvas, look, light

    def far(self, colour: Colour, shape: Shape, at: tuple[float, float] = (0, 0)) -> None:
        """A shape on the far plane, given as a signed distance over coordinates about `at`."""
        distance = shape(self.view.far_x - at[0], self.view.far_y - at[1])
        paint(self.canvas, tint(colour, self.light.land), coverage(distance * self.view.far_zoom))

    def near(
        self,
        colour: Colour,
        shape: Shape,
        at: tuple[float, float] = (0, 0),
        light: Colour | None = None,
    ) -> Array:
        """A shape on the near plane; returns its alpha."""
        alpha = coverage(shape(self.view.x - at[0], self.view.y - at[1]) * self.view.zoom)
        paint(self.canvas, tint(colour, light or self.light.land), alpha)
        return alpha


def paint_sky(canvas: Array, look: View, place: str, time: str) -> None:
    """Sky gradient, sun or moon, stars at night and always over the moon (with the Earth)."""
    light = LIGHTS[time]
    top, bottom = light.space if place == "moon" else light.sky
    share = np.clip(look.row / look.horizon, 0, 1)
    gradient = np.stack([np.float32(a) + np.float32(b - a) * share for a, b in zip(top, bottom, strict=True)])
    canvas[:] = gradient
    if time == "night" or place == "moon":
        for x, y in STARS:
            paint(canvas, rgb(250, 246, 225), 0.8 * coverage(disc(look.column - x, look.row - y, 0.5)))
    column, height = light.sun_at
    row = look.horizon - height if light.sun_low else height
    glow = np.clip(1 - disc(look.column - column, look.row - row, light.sun_radius) / 9, 0, 1)
    paint(canvas, light.sun, 0.35 * np.clip(glow, 0, 1) ** 2)
    paint(canvas, light.sun, coverage(disc(look.column - column, look.row - row, light.sun_radius)))
    if time == "night":
        shade = mix(top, bottom, 0.25)
        paint(canvas, shade, coverage(disc(look.column - column - 2.6, look.row - row + 1.6, light.sun_radius * 0.86)))
    if place == "moon":
        paint(canvas, rgb(70, 140, 220), coverage(disc(look.column - 40, look.row - 9, 5.5)))
        paint(canvas, rgb(110, 190, 120), coverage(ellipse(look.column - 38.5, look.row - 8.5, 2.6, 1.8)))


def _ground(paints: Painter, near: Colour, far: Colour) -> None:
    """Land from the horizon down, a little lighter or darker with distance."""
    light, look = paints.light.land, paints.view
    share = np.clip((look.row - look.horizon) / (HEIGHT - look.horizon), 0, 1)
    ends = zip(tint(far, light), tint(near, light), strict=True)
    colour = np.stack([np.float32(a) + np.float32(b - a) * share for a, b in ends])
    paint(paints.canvas, colour, coverage(look.horizon - look.row + np.zeros_like(look.column)))


def _desert(paints: Painter) -> None:
    paints.far(rgb(228, 178, 112), lambda x, y: y - 8 - 3.5 * np.sin(0.085 * x + 0.8))
    paints.far(rgb(206, 148, 88), lambda x, y: y - 4 - 3.0 * np.sin(0.11 * x + 3.4))
    _ground(paints, rgb(246, 214, 146), rgb(232, 190, 122))
    for x, size in ((-41, 1.0), (43, 0.8), (3, 0.55)):
        cactus = rgb(70, 132, 84)
        paints.near(cactus, lambda u, v, s=size: box(u, v - 6 * s, 1.7 * s, 7 * s, 1.6 * s), (x, -4))
        paints.near(cactus, lambda u, v, s=size: box(u - 3.6 * s, v - 7 * s, 1.2 * s, 3 * s, 1.1 * s), (x, -4))
        paints.near(cactus, lambda u, v, s=size: box(u - 1.8 * s, v - 4.8 * s, 2.4 * s, 1.1 * s, 1 * s), (x, -4))


def _forest(paints: Painter) -> None:
    _ground(paints, rgb(128, 190, 92), rgb(92, 158, 80))
    for x in range(-66, 67, 12):
        tall = 15 + 4 * np.sin(x * 1.3)
        paints.far(rgb(44, 104, 72), lambda u, v, h=tall: wedge(u, v, 7.5, h), (x + 3, 0))
    for x in (-45, 0, 46):
        paints.near(rgb(112, 78, 52), lambda u, v: box(u, v - 4, 1.3, 5), (x, -3))
        paints.near(rgb(64, 146, 78), lambda u, v: ellipse(u, v, 7.5, 8), (x, 10))


def _beach(paints: Painter) -> None:
    _ground(paints, rgb(250, 226, 168), rgb(240, 208, 146))
    paints.near(rgb(238, 244, 240), lambda x, y: np.abs(y + 3.6 - 0.5 * np.sin(0.3 * x)) - 4.6)
    paints.near(rgb(40, 148, 196), lambda x, y: np.abs(y + 3.4 - 0.5 * np.sin(0.3 * x)) - 3.6)
    palm, leaf = rgb(146, 104, 66), rgb(58, 150, 84)
    for x in (-44, 45):
        paints.near(palm, lambda u, v: box(u - 0.02 * v * v, v - 8, 1.2, 10, 1), (x, -6))
        for dx, dy in ((-4, 0), (4, 0), (-1.5, 3), (3, 3)):
            paints.near(leaf, lambda u, v: ellipse(u, v, 4.6, 1.9), (x + 4 + dx, 12 + dy))
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
            distance = box(np.abs(paints.view.far_x - x) - 2.6, paints.view.far_y - level, 1.1, 1.5)
            paint(paints.canvas, tint(window, light), 0.85 * coverage(distance * paints.view.far_zoom))
    _ground(paints, rgb(120, 122, 134), rgb(150, 150, 158))
    paints.near(rgb(196, 192, 184), lambda x, y: np.abs(y + 5.5 + 0 * x) - 2.0)
    paints.near(rgb(240, 232, 200), lambda x, y: box(np.mod(x, 16) - 8, y + 20.5, 4, 0.7))


def _snow(paints: Painter) -> None:
    for x, tall, wide in ((-44, 20, 30), (34, 24, 36), (-4, 16, 26)):
        paints.far(rgb(132, 150, 186), lambda u, v, h=tall, w=wide: wedge(u, v, w, h), (x, 0))
        paints.far(rgb(246, 250, 255), lambda u, v, h=tall, w=wide: wedge(u, v, w * 0.36, h * 0.36), (x, tall * 0.64))
    _ground(paints, rgb(250, 252, 255), rgb(214, 228, 244))
    for x, size in ((-42, 1.0), (41, 0.85), (4, 0.6)):
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
    paints.near(rgb(232, 226, 214), lambda u, v: box(u, v - 8, 0.8, 9), at, light)
    paints.near(colour, lambda u, v: box(u - toward * 5.5, v - 13, 5.2, 3.6, 0.8), at, light)


def paint_place(canvas: Array, look: View, place: str, time: str, scenery: Scenery | None) -> None:
    """Everything of a shot but its characters. Without scenery the landmark and flag are left out."""
    paint_sky(canvas, look, place, time)
    paints = Painter(canvas, look, LIGHTS[time])
    LAND[place](paints)
    if scenery is None:
        return
    sign = -1.0 if scenery.side == "left" else 1.0
    LANDMARKS[place][1](paints, PROP_RGB[scenery.landmark], (sign * LANDMARK_AT, -7))
    _flag(paints, PROP_RGB[scenery.flag], (-sign * FLAG_AT, -8), sign)
