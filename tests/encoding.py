"""Videos as cameras, phones and other encoders write them: exact planes, tags, display matrices, missing pieces."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

HEIGHT, WIDTH = 64, 96
COLOURS = np.array(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [128, 128, 128], [200, 120, 40], [30, 90, 160]]
)
_LUMA = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
_QUIET = {"libx265": {"x265-params": "log-level=none:crf=1"}, "libx264": {"crf": "1"}}


def chart() -> np.ndarray:
    """Eight plain patches in two rows, float [64, 96, 3] in 0..255; see :func:`patches`."""
    return COLOURS.reshape(2, 4, 3).repeat(HEIGHT // 2, 0).repeat(WIDTH // 4, 1).astype(float)


def patches(frame: np.ndarray) -> np.ndarray:
    """The colours in the middles of the patches, [8, 3]."""
    height, width = frame.shape[:2]
    rows, columns = [height // 4, height * 3 // 4], [round(width * (number + 0.5) / 4) for number in range(4)]
    return np.array([frame[y - 3 : y + 3, x - 3 : x + 3].mean(axis=(0, 1)) for y in rows for x in columns])


def corners(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """An image that shows its orientation: red at the top left, green at the top right, blue at the bottom left."""
    image = np.full((height, width, 3), 128.0)
    y, x = height // 4, width // 4
    image[:y, :x], image[:y, -x:], image[-y:, :x] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return image


def corner_names(frame: np.ndarray) -> str:
    """The colours of the corners from the top left, clockwise: r, g, b, or - for grey."""
    found = ""
    for y, x in ((4, 4), (4, -5), (-5, -5), (-5, 4)):
        pixel = frame[y, x].astype(int)
        found += "-" if np.ptp(pixel) < 60 else "rgb"[int(pixel.argmax())]
    return found


def yuv_frame(image: np.ndarray, pixels: str, matrix: str, *, full: bool = False) -> av.VideoFrame:
    """A frame whose planes are computed here and not by FFmpeg.

    Args:
        image: float [H, W, 3] in 0..255, non-linear.
        pixels: ``yuv420p``, ``yuv444p``, ``yuv420p10le`` and their like.
        matrix: bt601, bt709 or bt2020.
        full: range.
    """
    bits = 10 if "10" in pixels else 8
    (kr, kb), (r, g, b) = _LUMA[matrix], np.moveaxis(image / 255, -1, 0)
    y = kr * r + (1 - kr - kb) * g + kb * b
    scale, middle = 2 ** (bits - 8), 2 ** (bits - 1)
    top, span = (2**bits - 1, 2**bits - 1) if full else (219 * scale, 224 * scale)
    planes = [y * top + (0 if full else 16 * scale), (b - y) / 2 / (1 - kb) * span + middle]
    planes.append((r - y) / 2 / (1 - kr) * span + middle)
    if "420" in pixels:
        planes[1:] = [plane[::2, ::2] for plane in planes[1:]]
    kind = np.uint8 if bits == 8 else np.dtype("<u2")
    frame = av.VideoFrame(image.shape[1], image.shape[0], pixels)
    for plane, values in zip(frame.planes, planes, strict=True):
        rows = np.zeros((plane.height, plane.line_size // np.dtype(kind).itemsize), kind)
        rows[:, : plane.width] = np.clip(values.round(), 0, 2**bits - 1)
        plane.update(rows.tobytes())
    return frame


def encode(
    path: Path,
    frames: Iterable[np.ndarray | av.VideoFrame],
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    options: Mapping[str, str] | None = None,
    tags: Mapping[str, int] | None = None,
    aspect: Fraction | None = None,
    fps: int = 8,
    stamps: Iterable[int] | None = None,
    format: str | None = None,
) -> Path:
    """Encode uint8 [H, W, 3] in RGB, or frames as they are.

    Args:
        path: of the file.
        frames: all of one size.
        codec: of FFmpeg.
        pixels: format of the stream.
        options: of the codec; those of high quality by default.
        tags: ``colorspace``, ``color_range``, ``color_primaries``, ``color_trc``, by their numbers in H.273.
        aspect: of a pixel.
        fps: frames per second.
        stamps: presentation times in units of 1 / fps; counting up by default.
        format: of the container, if not by the suffix.
    """
    times = iter(range(1_000_000) if stamps is None else stamps)
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.pix_fmt, stream.options = pixels, dict(options or _QUIET.get(codec, {}))
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for number, given in enumerate(frames):
            frame = given if isinstance(given, av.VideoFrame) else av.VideoFrame.from_ndarray(given, format="rgb24")
            if number == 0:
                stream.width, stream.height = frame.width, frame.height
            frame.pts, frame.time_base = next(times), Fraction(1, fps)
            for name in ("colorspace", "color_range"):
                if name in (tags or {}):
                    setattr(frame, name, tags[name])  # type: ignore[index]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def turned(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Write a display matrix into an MP4 file: x' = a x + c y, y' = b x + d y."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44
    one = 1 << 16
    content[place : place + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def pq_from_sdr(image: np.ndarray) -> np.ndarray:
    """An SDR image (0..255, BT.709, white at 203 cd/m2, gamma 2.4) as PQ values in BT.2020, 0..255."""
    return 255 * pq(_bt2020_light(image) / 10000)


def hlg_from_sdr(image: np.ndarray) -> np.ndarray:
    """Likewise as HLG for a display of 1000 cd/m2."""
    light = _bt2020_light(image) / 1000
    luminance = np.maximum(light @ (0.2627, 0.678, 0.0593), 1e-9)[..., None]
    scene = light / luminance ** (0.2 / 1.2)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    coded = np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c)
    return 255 * coded


def pq(light: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084, of light in 0..1 (10,000 cd/m2)."""
    power = np.maximum(light, 0) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def _bt2020_light(image: np.ndarray) -> np.ndarray:
    to_bt2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    return 203 * (image / 255) ** 2.4 @ to_bt2020.T
