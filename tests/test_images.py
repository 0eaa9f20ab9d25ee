"""Images are read as a viewer shows them, whatever program wrote them, and fitted without cutting heads off."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from storymem.film.generate import generate_films as generate
from storymem.media.images import (
    MAX_PIXELS,
    ImageError,
    fit_image,
    fit_note,
    read_image,
    read_image_with_notes,
    write_image,
)
from storymem.story import StoryError, load_story
from tests.composing import SMALL, composed

STORED = np.full((8, 8, 3), (200, 40, 60), np.uint8)
STORY = """\
title: A Portrait
overview: Ada waits.
characters: [{{name: Ada, references: ["{name}"]}}]
scenes:
  - shots:
      - {{prompt: "Ada waits.", characters: [Ada]}}
"""


def swapped_profile() -> bytes:
    """A profile of which the first channel is green and the second red."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return srgb.replace(b"rXYZ", b"----", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"----", b"gXYZ", 1)


def linear_grey_profile() -> bytes:
    """A profile of a grey of gamma 1."""
    white = b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in (0.9642, 1, 0.8249)))
    curve = b"curv" + bytes(4) + struct.pack(">I", 0)
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"grey\0" + bytes(80)
    tags, table, place = [(b"wtpt", white), (b"kTRC", curve), (b"desc", text)], b"", 128 + 4 + 36
    for name, data in tags:
        table += name + struct.pack(">2I", place, len(data))
        place += len(data)
    header = struct.pack(">I4sI", place, b"none", 0x02100000) + b"mntrGRAYXYZ " + bytes(12) + b"acsp" + bytes(28)
    header += struct.pack(">3i", *(round(v * 65536) for v in (0.9642, 1, 0.8249)))
    return header.ljust(128, b"\0") + struct.pack(">I", 3) + table + b"".join(data for _, data in tags)


def near(image: np.ndarray, colour: tuple[int, int, int], tolerance: int = 3) -> bool:
    return bool(np.abs(image.astype(int) - colour).max() <= tolerance)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif"])
def test_a_profile_is_converted_to_srgb(tmp_path: Path, name: str) -> None:
    options = {"a.webp": {"lossless": True}, "a.jpg": {"quality": 100, "subsampling": 0}}.get(name, {})
    Image.fromarray(STORED).save(tmp_path / name, icc_profile=swapped_profile(), **options)
    pixels, notes = read_image_with_notes(tmp_path / name)
    assert near(pixels, (40, 200, 60))
    assert notes == (), "this profile calls itself sRGB"


def test_profiles_of_palettes_transparent_and_grey_images(tmp_path: Path) -> None:
    profile = swapped_profile()
    Image.fromarray(STORED).quantize().save(tmp_path / "palette.png", icc_profile=profile)
    assert near(read_image(tmp_path / "palette.png"), (40, 200, 60))
    half = np.dstack([STORED, np.full((8, 8), 255, np.uint8)])
    half[:4, :, 3] = 0
    Image.fromarray(half).save(tmp_path / "half.png", icc_profile=profile)
    assert near(read_image(tmp_path / "half.png")[:4], (255, 255, 255))
    assert near(read_image(tmp_path / "half.png")[4:], (40, 200, 60))
    Image.merge("LA", (Image.new("L", (8, 8), 128), Image.new("L", (8, 8), 255))).save(
        tmp_path / "alpha.png", icc_profile=linear_grey_profile()
    )
    assert near(read_image(tmp_path / "alpha.png"), (188, 188, 188))
    Image.new("L", (8, 8), 128).save(tmp_path / "grey.png", icc_profile=linear_grey_profile())
    assert near(read_image(tmp_path / "grey.png"), (188, 188, 188))
    assert read_image_with_notes(tmp_path / "grey.png")[1] == ("has the colour profile grey: converted to sRGB",)


def test_lab_and_cmyk_are_converted(tmp_path: Path) -> None:
    lab = ImageCms.profileToProfile(
        Image.fromarray(STORED), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    lab.save(tmp_path / "lab.tif")
    assert near(read_image(tmp_path / "lab.tif"), (200, 40, 60), 6)
    for profile, note in ((None, "is CMYK without"), (swapped_profile(), "it is for RGB, not for CMYK")):
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", icc_profile=profile)
        pixels, notes = read_image_with_notes(tmp_path / "cmyk.jpg")
        assert near(pixels, (255, 0, 0))
        assert note in notes[0]


@pytest.mark.parametrize("profile", [b"no profile" * 20, b"", swapped_profile()[:200]])
def test_a_broken_profile_is_reported_and_ignored(tmp_path: Path, profile: bytes) -> None:
    Image.fromarray(STORED).save(tmp_path / "a.png", icc_profile=profile)
    pixels, notes = read_image_with_notes(tmp_path / "a.png")
    assert (pixels == STORED).all()
    assert [note.startswith("has a colour profile that cannot be used") for note in notes] == [True] * bool(profile)


def png_of(rows: int) -> bytes:
    """A PNG whose header says 8 rows."""
    head, pixels = struct.pack(">2I5B", 8, 8, 8, 2, 0, 0, 0), zlib.compress((b"\0" + bytes([200, 40, 60]) * 8) * rows)
    chunks = ((b"IHDR", head), (b"IDAT", pixels), (b"IEND", b""))
    parts = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_pixels_that_end_early_are_refused(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(png_of(8))
    assert (read_image(image) == STORED).all()
    for rows in (7, 4, 1):
        image.write_bytes(png_of(rows))
        with pytest.raises(ImageError, match=r"a\.png cannot be read as an image: save it again .*pixels end early"):
            read_image(image)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg", exif=bytes(100))
    content = (tmp_path / "a.jpg").read_bytes()
    for kept in (2000, len(content) - 2):
        (tmp_path / "a.jpg").write_bytes(content[:kept].ljust(len(content), b"\0"))
        with pytest.raises(ImageError, match="its pixels end early"):
            read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    image = np.zeros((4, 6, 3), np.uint8)
    image[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    shown, notes = read_image_with_notes(tmp_path / "a.png")
    assert shown.shape[:2] == ((6, 4) if orientation > 4 else (4, 6))
    place = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert shown[place[orientation]].min() == 255
    assert bool(notes) == (orientation != 1)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_of_an_animation_the_first_image_is_used_with_a_note(tmp_path: Path, name: str) -> None:
    blue = Image.new("RGB", (8, 8), "blue")
    Image.new("RGB", (8, 8), "red").save(tmp_path / name, save_all=True, append_images=[blue])
    pixels, notes = read_image_with_notes(tmp_path / name)
    assert near(pixels, (255, 0, 0))
    assert notes == ("is animated: its first image is used",)


def test_more_than_8_bits_per_channel_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "grey.png")
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tif")
    for name in ("grey.png", "float.tif"):
        with pytest.raises(ValueError, match=rf"{name} has more than 8 bits per channel: save it with 8 bits"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("size", [(20000, 10000), (13000, 13000), (8193, 8192)])
def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("1", size).save(tmp_path / "huge.png")
    (tmp_path / "story.yaml").write_text(STORY.format(name="huge.png"))
    with pytest.raises(StoryError, match=rf"huge\.png has {size[0] * size[1]:,} pixels, and at most {MAX_PIXELS:,}"):
        load_story(tmp_path / "story.yaml")


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        read_image(tmp_path / "nothing.png")
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:1500])
    for name in ("fifo.png", "folder.png", "empty.png", "cut.png"):
        with pytest.raises(ValueError, match=name):
            read_image(tmp_path / name)


def test_damaged_images_are_read_or_named(tmp_path: Path) -> None:
    """Bits flipped, pieces zeroed or missing in images of several formats: an array or a message, nothing else."""
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "webp", "gif", "tif", "bmp"):
        path = tmp_path / f"a.{suffix}"
        pixels.save(path, **({"exif": exif, "icc_profile": swapped_profile()} if suffix in ("png", "jpg") else {}))
        whole = path.read_bytes()
        for _ in range(60):
            content, place = bytearray(whole), int(random.integers(len(whole)))
            match random.integers(3):
                case 0:
                    content[place] ^= 1 << int(random.integers(8))
                case 1:
                    content[place : place + 30] = bytes(len(content[place : place + 30]))
                case _:
                    del content[place:]
            path.write_bytes(content)
            try:
                assert read_image(path).dtype == np.uint8
            except ValueError as error:
                assert path.name in str(error)  # noqa: PT017


def portrait(height: int = 1344, width: int = 768) -> np.ndarray:
    """A standing figure on blue, with a red head near the upper edge."""
    image = np.full((height, width, 3), (60, 80, 160), np.uint8)
    image[height // 60 : height // 6, width * 2 // 5 : width * 3 // 5] = (230, 30, 30)
    return image


def head(frame: np.ndarray) -> int:
    """Pixels of the head."""
    return int(((frame[..., 0] > 200) & (frame[..., 1] < 60)).sum())


@pytest.mark.parametrize(
    "size", [(1344, 768), (800, 600), (600, 800), (600, 600), (700, 1000), (480, 832), (300, 1600)]
)
@pytest.mark.parametrize("film", [(480, 832), (832, 480), (624, 624)])
def test_auto_never_cuts_a_head_off(size: tuple[int, int], film: tuple[int, int]) -> None:
    image = portrait(*size)
    frame = fit_image(image, *film, "auto")
    scale = max(min(film[0] / size[0], film[1] / size[1]), 1e-9)
    assert frame.shape == (*film, 3)
    assert head(frame) >= 0.9 * head(image) * scale**2


def test_auto_fills_the_frame_where_little_is_cut() -> None:
    assert not (fit_image(portrait(600, 800), 480, 832, "auto") == 128).all(axis=-1).any()
    assert fit_note(600, 800, 480, 832, "auto") == "is cropped: 23 % of it is cut off at the bottom"
    assert fit_note(1344, 768, 480, 832, "auto") == "is shown whole: grey fills 67 % of the frame"
    assert fit_note(1344, 768, 480, 832, "cover") == "is cropped: 67 % of it is cut off at the top and bottom"
    assert fit_note(480, 832, 480, 832, "auto") is None


@pytest.mark.parametrize("how", ["auto", "cover", "contain"])
@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1)])
def test_any_shape_can_be_fitted(how: str, size: tuple[int, int]) -> None:
    assert fit_image(np.zeros((*size, 3), np.uint8), 32, 48, how).shape == (32, 48, 3)  # type: ignore[arg-type]


def test_plan_and_run_report_what_is_done_to_references(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(portrait(96, 48)).save(tmp_path / "tall.png", icc_profile=linear_grey_profile())
    (tmp_path / "story.yaml").write_text(STORY.format(name="tall.png"))
    fitted = "reference tall.png is shown whole: grey fills 67 % of the frame (48x32, memory.reference_fit=auto)"
    profile = "reference tall.png has a colour profile that cannot be used"
    generate(composed("story=story.yaml", *SMALL, "output=film", "dry_run=true"))
    plan = capsys.readouterr().out
    assert fitted in plan
    assert profile in plan
    generate(composed("story=story.yaml", *SMALL, "output=film"))
    warnings = capsys.readouterr().err
    assert warnings.count(fitted) == 1
    assert warnings.count(profile) == 1


def test_reading_an_image_needs_no_torch() -> None:
    modules = "storymem.media.images"
    code = f"import {modules}, sys; sys.exit(bool({{'torch', 'av'}} & {{*sys.modules}}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_images_are_written_without_loss(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (31, 17, 3), dtype=np.uint8)
    write_image(tmp_path / "noise.png", noise)
    np.testing.assert_array_equal(read_image(tmp_path / "noise.png"), noise)
    with pytest.raises(ValueError, match=r"must end in \.png"):
        write_image(tmp_path / "noise.jpg", noise)
    with pytest.raises(ValueError, match="uint8"):
        write_image(tmp_path / "float.png", noise.astype(np.float32))
    assert [path.name for path in tmp_path.iterdir()] == ["noise.png"]
