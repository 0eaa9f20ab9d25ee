"""From a decoded video frame to the image that a player shows: uint8 [H, W, 3] in sRGB, upright, of square pixels.

The display matrix (rotation, mirroring), the pixel aspect ratio, the colour matrix, the colour range, wide gamuts, HDR
transfers and alpha are applied. What a file does not state is read as FFmpeg and OpenCV read it: BT.601, limited range.
"""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from functools import cache
from typing import Literal

import av
import numpy as np
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from storymem.media.images import MAX_PIXELS

Transfer = Literal["sdr", "pq", "hlg"]
Gamut = Literal["bt709", "bt2020", "p3"]

# The numbers are those of ITU-T H.273, which FFmpeg uses.
_MATRICES = {1: 1, 2: 5, 3: 5, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}  # of the file -> of swscale
_UNSTATED = (2, 3)
_SDR = (0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 14, 15)
_HDR: dict[int, Transfer] = {16: "pq", 18: "hlg"}
_GAMUTS: dict[int, Gamut] = {9: "bt2020", 11: "p3", 12: "p3"}  # others differ little from BT.709 and are read as it

# Linear RGB of the gamut -> linear RGB of BT.709; all have the white D65.
_TO_BT709 = {
    "bt2020": ((1.660491, -0.587641, -0.072850), (-0.124550, 1.132900, -0.008349), (-0.018151, -0.100579, 1.118730)),
    "p3": ((1.224940, -0.224940, 0.0), (-0.042057, 1.042057, 0.0), (-0.019638, -0.078636, 1.098274)),
}
_SDR_WHITE, _HDR_PEAK = 203.0, 1000.0  # cd/m2: BT.2408's reference white; the display that HDR is assumed to target
_SDR_GAMMA = 2.4  # of a display, BT.1886
_BT2020_LUMINANCE = np.array((0.2627, 0.6780, 0.0593), np.float32)


class FrameConverter:
    """Turns the frames of one stream into images.

    Args:
        first: a frame of the stream.
        pixel_aspect: of the stream, width over height; None or 0 for square.

    Attributes:
        size: height and width of the images.
        notes: what is done beyond reading 8-bit RGB as it is stored; each begins with a word to count by.

    Raises:
        ValueError: for a colour matrix or transfer that is not known, Dolby Vision without a compatible base, a
            rotation that is no quarter turn, or frames too large; the message is the reason, without the file's name.
    """

    def __init__(self, first: av.VideoFrame, pixel_aspect: Fraction | None) -> None:
        self._aspect = pixel_aspect
        self._scaler = VideoReformatter()
        self._adopt(first)

    def image(
        self, frame: av.VideoFrame, size: tuple[int, int] | None = None, interpolation: str | None = None
    ) -> np.ndarray:
        """uint8 [H, W, 3] of ``size`` (the attribute by default), scaled with this interpolation of swscale.

        Raises:
            ValueError: if the stream has changed its size.
        """
        if _tags(frame) != self._tags:
            before = self.size
            self._adopt(frame)
            if self.size != before:
                old, new = (f"{width}x{height}" for height, width in (before, self.size))
                raise ValueError(f"its frames change their size from {old} to {new}: cut it there")
        width, height = self._scaled
        if size is not None:
            height, width = size[::-1] if self._transposed else size
        is_scaled = (width, height) != (frame.width, frame.height)
        linear = self._transfer != "sdr" or self._gamut != "bt709"
        # 8 bits take swscale's fast conversion; it is off by up to 3 of 255 where there are more.
        pixels = self._scaler.reformat(
            frame,
            width=width,
            height=height,
            format="rgb48le" if linear else "rgba" if self._alpha else "gbrp" if self._deep else "rgb24",
            src_colorspace=self._matrix,
            dst_colorspace=self._matrix,
            interpolation=Interpolation[interpolation or "BICUBIC"] if is_scaled else None,
            src_color_range=None if self._matrix is None else ColorRange.JPEG if self._full else ColorRange.MPEG,
            dst_color_range=None if self._matrix is None else ColorRange.JPEG,
            threads=1,
        ).to_ndarray()
        if linear:
            pixels = to_sdr(pixels, self._transfer, self._gamut)
        elif self._alpha:
            pixels = _on_white(pixels)
        if self._transposed:
            pixels = pixels.swapaxes(0, 1)
        return np.ascontiguousarray(pixels[:: -1 if self._flipped else 1, :: -1 if self._mirrored else 1])

    def _adopt(self, frame: av.VideoFrame) -> None:
        """Read what ``frame`` states of its orientation, shape and colours."""
        notes: list[str] = []
        components = frame.format.components
        self._tags = _tags(frame)
        self._transposed, self._mirrored, self._flipped = _orientation(frame, notes)
        self._scaled = _square(frame, self._aspect, notes)
        self._matrix, self._full = _matrix(frame, notes)
        self._transfer, self._gamut = _colours(frame, notes)
        self._deep = max(component.bits for component in components) > 8
        self._alpha = any(component.is_alpha for component in components)
        if self._alpha:
            notes.append("alpha: transparent parts on white")
        width, height = self._scaled
        self.size = (width, height) if self._transposed else (height, width)
        self.notes = tuple(notes)


def _tags(frame: av.VideoFrame) -> tuple[object, ...]:
    colours = frame.colorspace, frame.color_range, frame.color_trc, frame.color_primaries
    return frame.width, frame.height, frame.format.name, *colours


def _orientation(frame: av.VideoFrame, notes: list[str]) -> tuple[bool, bool, bool]:
    """Whether to swap rows and columns, then left and right, then top and bottom.

    By the display matrix: x' = a x + c y and y' = b x + d y.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d, *_ = struct.unpack("9i", bytes(matrix)[:36])
    large, small = (max(a * a, b * b), min(a * a, b * b)) if a or b else (0, 0)
    if not large or small > large * math.tan(math.radians(2)) ** 2 or (abs(b) > abs(a)) != (abs(c) > abs(d)):
        raise ValueError("its display matrix is no quarter turn: rotate it with an editor")
    transposed = abs(b) > abs(a)
    mirrored, flipped = (c < 0, b < 0) if transposed else (a < 0, d < 0)
    # An even number of reflections is a rotation.
    if (transposed + mirrored + flipped) % 2:
        notes.append("mirrored: as its display matrix states")
    elif transposed or mirrored:
        angle = (90 if mirrored else 270) if transposed else 180
        notes.append(f"rotated: by {angle} degrees clockwise, as its display matrix states")
    return transposed, mirrored, flipped


def _square(frame: av.VideoFrame, aspect: Fraction | None, notes: list[str]) -> tuple[int, int]:
    """Width and height at which stored pixels are square."""
    width, height = frame.width, frame.height
    if aspect and aspect > 1:
        width = round(width * aspect)
    elif aspect and aspect > 0:
        height = round(height / aspect)
    if width * height > MAX_PIXELS:
        raise ValueError(f"its frames are {width}x{height}, and at most {MAX_PIXELS:,} pixels are read")
    if (width, height) != (frame.width, frame.height):
        stored = f"{frame.width}x{frame.height}"
        notes.append(f"pixel aspect: {aspect} made square, {stored} to {width}x{height}")
    return width, height


def _matrix(frame: av.VideoFrame, notes: list[str]) -> tuple[int | None, bool]:
    """swscale's colour matrix, None for RGB, and whether luma has the full range of values."""
    name, stated = frame.format.name, int(frame.colorspace)
    if frame.format.is_rgb or frame.format.has_palette:
        return None, True
    if name.startswith(("gray", "ya", "mono")):
        return 5, int(frame.color_range) != 1
    if stated not in _MATRICES:
        raise ValueError(f"its colour matrix (number {stated} of H.273) is not known: convert it to BT.709")
    if stated in _UNSTATED and any(frame.side_data.get(name) for name in ("DOVI_RPU_BUFFER", "DOVI_METADATA")):
        raise ValueError("it is Dolby Vision without an HDR10 or HLG base (profile 5): convert it to BT.709")
    if stated in _UNSTATED:
        notes.append("untagged: no colour matrix is stated, read as BT.601")
    return _MATRICES[stated], int(frame.color_range) == 2 or name.startswith("yuvj")


def _colours(frame: av.VideoFrame, notes: list[str]) -> tuple[Transfer, Gamut]:
    stated, gamut = int(frame.color_trc), _GAMUTS.get(int(frame.color_primaries), "bt709")
    if stated not in _SDR and stated not in _HDR:
        raise ValueError(f"its transfer function (number {stated} of H.273) is not known: convert it to BT.709")
    transfer = _HDR.get(stated, "sdr")
    if transfer != "sdr":
        notes.append(f"HDR: {transfer.upper()} tone-mapped to SDR (BT.2390)")
        return transfer, "bt2020" if gamut == "bt709" else gamut
    if gamut != "bt709":
        notes.append(f"wide gamut: {gamut} converted to BT.709")
    return "sdr", gamut


def _on_white(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 4] -> [H, W, 3]."""
    alpha = pixels[..., 3:].astype(np.uint16)
    return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def to_sdr(pixels: np.ndarray, transfer: Transfer, gamut: Gamut) -> np.ndarray:
    """HDR or wide-gamut RGB -> what an SDR video of the same scene holds.

    Light L in cd/m2 on a display of 1000 cd/m2, by SMPTE ST 2084 (PQ) or ARIB STD-B67 with the system gamma 1.2 (HLG);
    each pixel is multiplied by EETF(max(R, G, B)) / max(R, G, B), the roll-off of ITU-R BT.2390 from 1000 to 203 cd/m2
    (which leaves what is below 91 as it is); then primaries to BT.709, negative values cut, and (L / 203) ** (1 / 2.4).

    Args:
        pixels: uint16 [H, W, 3], full range.
        transfer: "sdr" is read as a gamma of 2.4 and needs no tone mapping.
        gamut: the primaries.

    Returns:
        uint8 [H, W, 3].
    """
    light = _light_table(transfer)[pixels]
    if transfer == "hlg":
        light *= _HDR_PEAK * np.maximum(light @ _BT2020_LUMINANCE, 1e-6)[..., None] ** 0.2
    if transfer != "sdr":
        brightest = light.max(axis=-1, keepdims=True)
        light *= _roll_off_table()[np.minimum(brightest * 16, 16 * _HDR_PEAK).astype(np.uint16)]
        light /= _SDR_WHITE
    if gamut != "bt709":
        light = light @ np.array(_TO_BT709[gamut], np.float32).T
    return (np.clip(light, 0, 1) ** np.float32(1 / _SDR_GAMMA) * 255 + 0.5).astype(np.uint8)


@cache
def _light_table(transfer: Transfer) -> np.ndarray:
    """Light of each 16-bit value: cd/m2 for PQ, else 0..1 (of the scene, for HLG)."""
    value = np.arange(65536) / 65535
    if transfer == "pq":
        light = _pq_light(value)
    elif transfer == "hlg":
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(value <= 0.5, value**2 / 3, (np.exp((value - c) / a) + b) / 12)
    else:
        light = value**_SDR_GAMMA
    return light.astype(np.float32)


@cache
def _roll_off_table() -> np.ndarray:
    """EETF(L) / L at L = 0, 1/16, 2/16 ... 1000 cd/m2 (BT.2390, section 5.4, with a black of 0)."""
    light = np.maximum(np.arange(16 * int(_HDR_PEAK) + 1), 0.5) / 16
    peak = _pq_value(_HDR_PEAK)
    e, top = _pq_value(light) / peak, _pq_value(_SDR_WHITE) / peak
    knee = 1.5 * top - 0.5
    t = (e - knee) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * top
    return (_pq_light(np.where(e < knee, e, spline) * peak) / light).astype(np.float32)


_PQ = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128


def _pq_light(value: np.ndarray) -> np.ndarray:
    m1, m2, c1, c2, c3 = _PQ
    power = value ** (1 / m2)
    return 10000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def _pq_value(light: np.ndarray | float) -> np.ndarray:
    m1, m2, c1, c2, c3 = _PQ
    power = (np.asarray(light) / 10000) ** m1
    return ((c1 + c2 * power) / (1 + c3 * power)) ** m2
