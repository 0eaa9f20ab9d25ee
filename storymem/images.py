"""Pictures <-> files: uint8 arrays [H, W, 3] in RGB."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from storymem.io import write_atomically


def read_image(path: str | Path) -> np.ndarray:
    """Read a picture of any format Pillow knows -> uint8 [H, W, 3], RGB.

    A camera's rotation mark is obeyed, and what is transparent becomes white, as in a viewer.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is not a picture, is cut off, or has more than 8 bits per channel.
    """
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            picture.load()
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"{path} has more than 8 bits per channel: save it as an 8-bit PNG")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.array(picture.convert("RGB"))


def fit_image(image: np.ndarray, height: int, width: int, how: Literal["cover", "contain"]) -> np.ndarray:
    """A picture at another size, without stretching it.

    Args:
        image: uint8 [H, W, 3].
        height: of the result, in pixels.
        width: of the result, in pixels.
        how: "cover" fills the frame and cuts what hangs over, evenly on both sides; "contain" shows the whole
            picture and fills the rest with mid-grey, the value of the blank video.
    """
    picture, size = Image.fromarray(image), (width, height)
    if how == "cover":
        return np.array(ImageOps.fit(picture, size, Image.Resampling.LANCZOS))
    return np.array(ImageOps.pad(picture, size, Image.Resampling.LANCZOS, color=(128, 128, 128)))


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
