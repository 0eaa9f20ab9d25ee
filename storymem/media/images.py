"""Images <-> files: uint8 arrays [H, W, 3] in sRGB."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageCms, ImageOps

from storymem.io import FileError, check_regular, write_atomically

MAX_PIXELS = 1 << 26  # of an image or a frame: 8192 x 8192

Fit = Literal["auto", "cover", "contain"]

_MOST_CUT = 0.25  # share of an image that "auto" may cut off
_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}
_UNDECODABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error),  # Pillow's decoders raise all of these
    *(KeyError, IndexError, TypeError, OverflowError, NotImplementedError),
)


class ImageError(FileError):
    """A file that cannot be used as an image: ``reason`` and ``cure`` are parts of the message, without its name."""

    def __init__(self, path: Path, reason: str, cure: str) -> None:
        super().__init__(f"{path} {reason}: {cure}")
        self.reason, self.cure = reason, cure


def read_image(path: str | Path) -> np.ndarray:
    """Read an image of any format Pillow knows -> uint8 [H, W, 3], sRGB; see :func:`read_image_with_notes`."""
    return read_image_with_notes(path)[0]


def is_image(path: Path) -> bool:
    """Whether a file is an image, by its header and a PNG's checksums; pixels are not decoded."""
    try:
        with Image.open(check_regular(path)) as image:
            image.verify()
    except (FileError, Image.DecompressionBombError, *_UNDECODABLE):
        return False
    return True


def read_image_with_notes(path: str | Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read an image of any format Pillow knows, as a viewer shows it.

    The EXIF orientation is applied, an embedded colour profile is converted to sRGB, what is transparent becomes white,
    and of an animation the first image is read.

    Returns:
        uint8 [H, W, 3] in sRGB, and what was done beyond decoding, each to follow the file's name in a sentence.

    Raises:
        FileNotFoundError: if there is no such file.
        FileError: naming the file, if it cannot be opened.
        ImageError: if it is not an image, is cut off, has more than 8 bits per channel or too many pixels.
    """
    path = check_regular(path)
    notes: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, for which the limit here is lower, and of odd metadata
            with Image.open(path) as image:
                _check_size(path, image.width * image.height)
                with Image.open(path) as stored:
                    stored.verify()  # the checksums of PNG, which loading does not compare for pixels
                if getattr(image, "is_animated", False) and image.format != "MPO":
                    notes.append("is animated: its first image is used")
                if any(";16" in str(tile) for tile in image.tile):
                    notes.append("has 16 bits per channel: cut to 8")
                image.load()
                _check_complete(path, image)
                before = image.getexif().get(0x0112, 1)
                ImageOps.exif_transpose(image, in_place=True)
    except FileError:
        raise
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))
        _check_size(path, int(found[0]) if found else MAX_PIXELS + 1)
        raise
    except _UNDECODABLE as error:
        cure = f"save it again as PNG, JPEG or WebP ({error})"
        raise ImageError(path, "cannot be read as an image", cure) from error
    if image.mode.startswith(("I", "F")):
        raise ImageError(path, "has more than 8 bits per channel", "save it with 8 bits")
    if before != 1:
        notes.append("is rotated by its EXIF orientation")
    return np.array(_on_white(image, notes)), tuple(notes)


def _check_complete(path: Path, image: Image.Image) -> None:
    """Raise ``OSError`` for pixels that end early, of which Pillow leaves the rest black (PNG) or grey (JPEG)."""
    with Image.open(path) as again:
        complete = True
        if image.format == "PNG":
            again.im = Image.new(again.mode, again.size, 1).im  # a row that is not in the file stays as it is here
            complete = again.tobytes() == image.tobytes()
        elif image.format == "JPEG" and again.fp is not None:
            complete = b"\xff\xd9" in again.fp.read()  # after the header; a file that was not saved ends in zeros
    if not complete:
        raise OSError("its pixels end early")


def _check_size(path: Path, pixels: int) -> None:
    if pixels > MAX_PIXELS:
        raise ImageError(
            path,
            f"has {pixels:,} pixels, and at most {MAX_PIXELS:,} are read",
            "save it smaller, at 4000 pixels a side",
        )


def _on_white(image: Image.Image, notes: list[str]) -> Image.Image:
    profile = image.info.get("icc_profile") or None
    if not image.has_transparency_data:
        return _in_srgb(image, profile, notes)
    transparent = image.convert("LA" if image.mode in ("L", "LA") else "RGBA")
    alpha = transparent.getchannel("A")
    if alpha.getextrema() != (255, 255):
        notes.append("is transparent in places: they become white")
    shown = Image.new("RGB", image.size, "white")
    shown.paste(_in_srgb(transparent.convert(transparent.mode[:-1]), profile, notes), mask=alpha)
    return shown


def _in_srgb(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """An image of any mode -> RGB, sRGB."""
    if not profile and image.mode == "RGB":
        return image
    if not profile and image.mode != "LAB":
        if image.mode == "CMYK":
            notes.append("is CMYK without a colour profile: its colours are a guess")
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile) if profile else ImageCms.createProfile("LAB"))
        name = " ".join(ImageCms.getProfileDescription(source).split())[:60]
        mode = _PROFILE_MODES.get(source.profile.xcolor_space)
        if mode is None or (image.mode != mode and (mode != "RGB" or image.mode in ("CMYK", "LAB"))):
            raise ImageCms.PyCMSError(f"it is for {source.profile.xcolor_space.strip()}, not for {image.mode}")
        converted = ImageCms.profileToProfile(
            image.convert(mode),
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        if profile is None:
            raise
        notes.append(f"has a colour profile that cannot be used ({error}): it is ignored")
        return _in_srgb(image, None, notes)
    assert converted is not None
    if profile and not name.startswith("sRGB"):
        notes.append(f"has the colour profile {name}: converted to sRGB")
    return converted


def fit_image(image: np.ndarray, height: int, width: int, how: Fit) -> np.ndarray:
    """An image at another size, without stretching it.

    Args:
        image: uint8 [H, W, 3].
        height, width: of the result, in pixels.
        how: "cover" fills the frame and cuts what protrudes, evenly on both sides; "contain" shows the whole image and
            fills the rest with mid-grey, the value of the blank video; "auto" is "contain" if more than a quarter of
            the image would be cut off, else "cover" aligned to the top, so that no head is cut off.
    """
    source, size = Image.fromarray(image), (width, height)
    top = 0.0 if how == "auto" else 0.5
    if chosen_fit(image.shape[0], image.shape[1], height, width, how) == "cover":
        return np.array(ImageOps.fit(source, size, Image.Resampling.LANCZOS, centering=(0.5, top)))
    scale = min(width / source.width, height / source.height)
    whole = source.resize(
        (max(1, round(source.width * scale)), max(1, round(source.height * scale))), Image.Resampling.LANCZOS
    )
    padded = Image.new("RGB", size, (128, 128, 128))
    padded.paste(whole, (round((width - whole.width) / 2), round((height - whole.height) / 2)))
    return np.array(padded)


def chosen_fit(own_height: int, own_width: int, height: int, width: int, how: Fit) -> Literal["cover", "contain"]:
    """``how``, with "auto" replaced by what it means for an image and a frame of these sizes."""
    if how != "auto":
        return how
    return "contain" if _difference(own_height, own_width, height, width) > _MOST_CUT else "cover"


def fit_note(own_height: int, own_width: int, height: int, width: int, how: Fit) -> str | None:
    """What :func:`fit_image` does to an image, to follow its name in a sentence; None for less than 1 %."""
    share = round(100 * _difference(own_height, own_width, height, width))
    if share < 1:
        return None
    if chosen_fit(own_height, own_width, height, width, how) == "contain":
        return f"is shown whole: grey fills {share} % of the frame"
    upright = own_height * width > own_width * height
    where = ("at the bottom" if how == "auto" else "at the top and bottom") if upright else "at the sides"
    return f"is cropped: {share} % of it is cut off {where}"


def _difference(own_height: int, own_width: int, height: int, width: int) -> float:
    """The share of the image that "cover" cuts off, which is the share of the frame that "contain" leaves grey."""
    aspect = own_width / own_height * height / width
    return 1 - min(aspect, 1 / aspect)


def encode_png(image: np.ndarray) -> bytes:
    """Encode uint8 [H, W, 3] without loss."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"an image must be uint8 [H, W, 3], is {image.dtype} {list(image.shape)}")
    written = io.BytesIO()
    Image.fromarray(image).save(written, format="PNG")
    return written.getvalue()


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write uint8 [H, W, 3] as a PNG, in one step. ``ValueError`` if ``path`` names another format."""
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{path}: images are written without loss, so the name must end in .png")
    write_atomically(path, encode_png(image))
