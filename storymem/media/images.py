"""Pictures <-> files: uint8 arrays [H, W, 3] in sRGB."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageCms, ImageOps

from storymem.io import FileError, check_regular, write_atomically

MAX_PIXELS = 1 << 26  # of a picture or a frame: 8192 x 8192

Fit = Literal["auto", "cover", "contain"]

_MOST_CUT = 0.25  # share of a picture that "auto" may cut off
_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}
_UNDECODABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error),  # Pillow's decoders raise all of these
    *(KeyError, IndexError, TypeError, OverflowError, NotImplementedError),
)


class PictureError(FileError):
    """A file that cannot be used as a picture: ``reason`` says why and ``cure`` what helps, without its name."""

    def __init__(self, path: Path, reason: str, cure: str) -> None:
        super().__init__(f"{path} {reason}: {cure}")
        self.reason, self.cure = reason, cure


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture as a viewer shows it.

    Args:
        pixels: uint8 [H, W, 3], sRGB.
        notes: what was done beyond decoding, each for a sentence that begins with the file's name.
    """

    pixels: np.ndarray
    notes: tuple[str, ...]


def read_image(path: str | Path) -> np.ndarray:
    """Read a picture of any format Pillow knows -> uint8 [H, W, 3], sRGB; see :func:`read_picture`."""
    return read_picture(path).pixels


def read_picture(path: str | Path) -> Picture:
    """Read a picture of any format Pillow knows.

    A camera's rotation mark is obeyed, an embedded colour profile is converted to sRGB, what is transparent becomes
    white, and of an animation the first picture is taken, as in a viewer.

    Raises:
        FileNotFoundError: if there is no such file.
        FileError: naming the file, if it cannot be opened.
        PictureError: if it is not a picture, is cut off, has more than 8 bits per channel or too many pixels.
    """
    path = check_regular(path)
    notes: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, for which the limit here is lower, and of odd metadata
            with Image.open(path) as picture:
                _check_size(path, picture.width * picture.height)
                with Image.open(path) as stored:
                    stored.verify()  # the checksums of PNG, which loading does not compare for pixels
                if getattr(picture, "is_animated", False) and picture.format != "MPO":
                    notes.append("is animated: its first picture is taken")
                if any(";16" in str(tile) for tile in picture.tile):
                    notes.append("has 16 bits per channel: cut to 8")
                before = picture.getexif().get(0x0112, 1)
                ImageOps.exif_transpose(picture, in_place=True)
                picture.load()
    except FileError:
        raise
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))
        _check_size(path, int(found[0]) if found else MAX_PIXELS + 1)
        raise
    except _UNDECODABLE as error:
        cure = f"save it again as PNG, JPEG or WebP ({error})"
        raise PictureError(path, "cannot be read as an image", cure) from error
    if picture.mode.startswith(("I", "F")):
        raise PictureError(path, "has more than 8 bits per channel", "save it with 8 bits")
    if before != 1:
        notes.append("is turned as its camera was held (EXIF orientation)")
    return Picture(pixels=np.array(_on_white(picture, notes)), notes=tuple(notes))


def _check_size(path: Path, pixels: int) -> None:
    if pixels > MAX_PIXELS:
        raise PictureError(
            path,
            f"has {pixels:,} pixels, and at most {MAX_PIXELS:,} are read",
            "save it smaller, at 4000 pixels a side",
        )


def _on_white(picture: Image.Image, notes: list[str]) -> Image.Image:
    profile = picture.info.get("icc_profile") or None
    if not picture.has_transparency_data:
        return _in_srgb(picture, profile, notes)
    transparent = picture.convert("LA" if picture.mode in ("L", "LA") else "RGBA")
    alpha = transparent.getchannel("A")
    if alpha.getextrema() != (255, 255):
        notes.append("is transparent in places: they become white")
    shown = Image.new("RGB", picture.size, "white")
    shown.paste(_in_srgb(transparent.convert(transparent.mode[:-1]), profile, notes), mask=alpha)
    return shown


def _in_srgb(picture: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """A picture of any mode -> RGB, sRGB."""
    if not profile and picture.mode == "RGB":
        return picture
    if not profile and picture.mode != "LAB":
        if picture.mode == "CMYK":
            notes.append("is CMYK without a colour profile: its colours are a guess")
        return picture.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile) if profile else ImageCms.createProfile("LAB"))
        name = " ".join(ImageCms.getProfileDescription(source).split())[:60]
        mode = _PROFILE_MODES.get(source.profile.xcolor_space)
        if mode is None or (picture.mode != mode and (mode != "RGB" or picture.mode in ("CMYK", "LAB"))):
            raise ImageCms.PyCMSError(f"it is for {source.profile.xcolor_space.strip()}, not for {picture.mode}")
        converted = ImageCms.profileToProfile(
            picture.convert(mode),
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
        return _in_srgb(picture, None, notes)
    assert converted is not None
    if profile and not name.startswith("sRGB"):
        notes.append(f"has the colour profile {name}: converted to sRGB")
    return converted


def fit_image(image: np.ndarray, height: int, width: int, how: Fit) -> np.ndarray:
    """A picture at another size, without stretching it.

    Args:
        image: uint8 [H, W, 3].
        height: of the result, in pixels.
        width: of the result, in pixels.
        how: "cover" fills the frame and cuts what hangs over, evenly on both sides; "contain" shows the whole
            picture and fills the rest with mid-grey, the value of the blank video; "auto" is "contain" if more than a
            quarter of the picture would be cut off, else "cover" with the top kept, so that no head is cut off.
    """
    picture, size = Image.fromarray(image), (width, height)
    top = 0.0 if how == "auto" else 0.5
    if chosen_fit(image.shape[0], image.shape[1], height, width, how) == "cover":
        return np.array(ImageOps.fit(picture, size, Image.Resampling.LANCZOS, centering=(0.5, top)))
    scale = min(width / picture.width, height / picture.height)
    whole = picture.resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.LANCZOS
    )
    padded = Image.new("RGB", size, (128, 128, 128))
    padded.paste(whole, (round((width - whole.width) / 2), round((height - whole.height) / 2)))
    return np.array(padded)


def chosen_fit(own_height: int, own_width: int, height: int, width: int, how: Fit) -> Literal["cover", "contain"]:
    """What "auto" means for a picture and a frame of these sizes; others are as they are."""
    if how != "auto":
        return how
    return "contain" if _difference(own_height, own_width, height, width) > _MOST_CUT else "cover"


def fit_note(own_height: int, own_width: int, height: int, width: int, how: Fit) -> str | None:
    """What :func:`fit_image` does to a picture, for a sentence that begins with its name; None for less than 1 %."""
    share = round(100 * _difference(own_height, own_width, height, width))
    if share < 1:
        return None
    if chosen_fit(own_height, own_width, height, width, how) == "contain":
        return f"is shown whole: grey fills {share} % of the frame"
    upright = own_height * width > own_width * height
    where = ("at the bottom" if how == "auto" else "at the top and bottom") if upright else "at the sides"
    return f"is cropped: {share} % of it is cut off {where}"


def _difference(own_height: int, own_width: int, height: int, width: int) -> float:
    """The share of the picture that "cover" cuts off, which is the share of the frame that "contain" leaves grey."""
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
        raise ValueError(f"{path}: pictures are written without loss, so the name must end in .png")
    write_atomically(path, encode_png(image))
