"""The memory bank, in RAM and on disk: killed at any moment, edited by the user, damaged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from storymem.memory import Keyframe, MemoryBank, frame_id, reference_id


def image(seed: int, size: tuple[int, int] = (6, 8)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def embed(frames: np.ndarray) -> np.ndarray:
    """Mean colour of each frame."""
    return frames.mean(axis=(1, 2))


def keyframe(id: str, pixels: np.ndarray, **more: Any) -> Keyframe:
    vector = embed(pixels[None])[0]
    return Keyframe(id=id, image=pixels, embedding=(vector / np.linalg.norm(vector)).astype(np.float32), **more)


def from_shot(shot: int, frame: int, *, seed: int | None = None, **more: Any) -> Keyframe:
    pixels = image(100 * shot + frame if seed is None else seed)
    return keyframe(frame_id(shot, frame), pixels, shot=shot, frame=frame, **more)


def reference(id: str, **more: Any) -> Keyframe:
    return keyframe(id, image(len(id), size=(5, 3)), source=f"{id}.jpg", **more)


IDS = ["ref_tam_1", "shot01_frame001", "shot01_frame013", "ref_boat_1", "shot03_frame001"]


def filled() -> MemoryBank:
    latent = torch.randn(16, 1, 2, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    return MemoryBank(
        [
            reference("ref_tam_1", character="Tam"),
            from_shot(1, 1, quality=3.25),
            from_shot(1, 13, quality=1 / 3, similarity=0.75),
            reference("ref_boat_1", shot=2),
            from_shot(3, 1, latent=latent),
        ]
    )


def ids(bank: MemoryBank) -> list[str]:
    return [keyframe.id for keyframe in bank]


def assert_equal(ours: MemoryBank, theirs: MemoryBank) -> None:
    assert ids(ours) == ids(theirs)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.embedding, other.embedding)
        for name in ("shot", "frame", "source", "character", "quality", "similarity"):
            assert getattr(one, name) == getattr(other, name)
        assert (one.latent is None) == (other.latent is None)
        if one.latent is not None and other.latent is not None:
            assert one.latent.dtype == other.latent.dtype
            assert torch.equal(one.latent, other.latent)


def entries(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "memory.json").read_text())["keyframes"]


def rewrite(folder: Path, keyframes: list[Any], schema: int = 2) -> None:
    (folder / "memory.json").write_text(json.dumps({"schema": schema, "keyframes": keyframes}))


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: (path.stat().st_mtime_ns, path.read_bytes()) for name, path in found.items()}


def test_keyframes_are_added_replaced_and_removed() -> None:
    bank = filled()
    assert ids(bank) == IDS
    assert bank.embeddings.shape == (5, 3)
    np.testing.assert_array_equal(bank.embeddings[2], bank["shot01_frame013"].embedding)
    assert MemoryBank().embeddings.shape == (0, 0)
    with pytest.raises(ValueError, match="shot01_frame001 is in the memory already"):
        bank.add([from_shot(1, 1)])
    bank.replace(replace(bank["shot01_frame001"], latent=torch.zeros(16, 1, 2, 3)))
    assert ids(bank) == IDS
    assert bank["shot01_frame001"].latent is not None
    with pytest.raises(KeyError):
        bank.replace(from_shot(7, 7))
    assert [k.id for k in bank.known_to(2)] == IDS[:4], "an image for shot 2 too"
    assert [k.id for k in bank.known_to(1)] == IDS[:1]
    gone = bank.put_frames(1, [from_shot(1, 5)])
    assert [k.id for k in gone] == IDS[1:3]
    assert ids(bank) == [IDS[0], "shot01_frame005", *IDS[3:]], "before all of later shots"
    bank.put_frames(4, [from_shot(4, 1)])
    assert ids(bank)[-2:] == [IDS[4], "shot04_frame001"]


def test_a_keyframe_does_not_keep_its_shot_in_ram() -> None:
    frames = np.ones((5, 6, 8, 3), np.uint8)
    made = keyframe("a", frames[2])
    frames[2] = 255
    assert made.image.base is None
    assert made.image.max() == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"id": "../x"}, "letters, digits"),
        ({"image": np.zeros((2, 2, 3))}, "image must be uint8"),
        ({"embedding": np.ones((1, 3), np.float32)}, "embedding must be float32"),
        ({"latent": torch.zeros(16, 2, 3)}, "latent must be"),
    ],
)
def test_malformed_keyframes_are_refused(wrong: dict[str, Any], message: str) -> None:
    given = {"id": "x", "image": image(0), "embedding": np.ones(3, np.float32)}
    with pytest.raises(ValueError, match=message):
        Keyframe(**(given | wrong))


def test_ids_are_readable_and_unique() -> None:
    assert [reference_id("Tam", filled()), reference_id("Old  Tam's boat"), reference_id("???")] == [
        *("ref_tam_2", "ref_old_tam_s_boat_1"),
        "ref_1",
    ]
    assert frame_id(1, 13, filled()) == "shot01_frame013_2"


def test_a_bank_is_loaded_as_it_was_saved_and_nothing_is_written_twice(tmp_path: Path) -> None:
    MemoryBank().save(tmp_path)
    assert len(MemoryBank.load(tmp_path)) == 0
    bank = filled()
    bank.save(tmp_path)
    before = state(tmp_path)
    bank.save(tmp_path)
    loaded = MemoryBank.load(tmp_path)
    assert_equal(loaded, bank)
    loaded.save(tmp_path)
    assert state(tmp_path) == before
    bank.add([from_shot(4, 6)])
    bank.save(tmp_path)
    after = state(tmp_path)
    added = {f"keyframes/shot04_frame006.{suffix}" for suffix in ("png", "safetensors")}
    assert {name for name in after if after[name] != before.get(name)} == {"memory.json", *added}


class Killed(BaseException):
    """Stands for the end of the process."""


def test_killed_at_any_moment_the_folder_still_holds_a_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die before and in the middle of each file in turn, while shot 3 is replaced and shot 4 added."""
    before, after = filled(), filled()
    after.put_frames(3, [replace(from_shot(3, 1, seed=77), id="shot03_frame001_2")])
    after.add([from_shot(4, 6)])
    before.save(tmp_path / "start")
    write = Path.write_bytes
    found = set()
    finished = False
    for moment in range(20):
        folder = tmp_path / str(moment)
        shutil.copytree(tmp_path / "start", folder)
        written = 0

        def die(path: Path, content: bytes, last: int = moment) -> int:
            nonlocal written
            written += 1
            if written > last:
                write(path, content[: len(content) // 2])
                raise Killed
            return write(path, content)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "write_bytes", die)
            patched.setattr(Path, "unlink", lambda *_args, **_kwargs: None)
            try:
                after.save(folder)
                finished = True
            except Killed:
                pass
        found.add(tuple(ids(MemoryBank.load(folder))))
        after.save(folder)
        assert_equal(MemoryBank.load(folder), after)
        if finished:
            break
    assert finished
    assert found == {tuple(IDS), tuple(ids(after))}, "two complete states and no others"


def test_entries_can_be_deleted_reordered_and_put_back(tmp_path: Path) -> None:
    filled().save(tmp_path)
    written = entries(tmp_path)
    rewrite(tmp_path, [written[4], written[1]])
    bank = MemoryBank.load(tmp_path)
    assert ids(bank) == [IDS[4], IDS[1]]
    bank.save(tmp_path)
    rewrite(tmp_path, written)
    assert_equal(MemoryBank.load(tmp_path), filled())


def test_a_replaced_image_is_embedded_again(tmp_path: Path) -> None:
    filled().save(tmp_path)
    for id in (IDS[2], IDS[4]):
        Image.fromarray(image(9, size=(4, 4))).save(tmp_path / "keyframes" / f"{id}.png")
    with pytest.raises(ValueError, match=r"shot01_frame013\.png was edited"):
        MemoryBank.load(tmp_path)
    bank = MemoryBank.load(tmp_path, embed=embed)
    assert ids(bank) == IDS
    for changed in (bank[IDS[2]], bank[IDS[4]]):
        expected = keyframe("x", image(9, size=(4, 4)))
        np.testing.assert_array_equal(changed.image, expected.image)
        np.testing.assert_allclose(changed.embedding, expected.embedding, rtol=1e-6)
        assert (changed.latent, changed.quality, changed.similarity) == (None, None, None)
    assert (bank[IDS[2]].shot, bank[IDS[2]].frame) == (1, 13)
    bank.save(tmp_path)
    assert_equal(MemoryBank.load(tmp_path), bank)


def test_an_image_compressed_otherwise_is_the_same_image(tmp_path: Path) -> None:
    filled().save(tmp_path)
    Image.fromarray(image(113)).save(tmp_path / "keyframes" / "shot01_frame013.png", compress_level=0)
    assert_equal(MemoryBank.load(tmp_path), filled())


def test_an_image_can_be_added(tmp_path: Path) -> None:
    filled().save(tmp_path)
    Image.fromarray(image(50)).save(tmp_path / "Tam.png")
    Image.fromarray(image(51)).save(tmp_path / "keyframes" / "mine.png")
    rewrite(
        tmp_path,
        [{"image": "Tam.png", "character": "Tam"}, *entries(tmp_path), {"id": "mine", "shot": 3, "frame": None}],
    )
    bank = MemoryBank.load(tmp_path, embed=embed)
    assert ids(bank) == ["ref_tam_2", *IDS, "mine"]
    np.testing.assert_array_equal(bank["ref_tam_2"].image, image(50))
    assert bank["ref_tam_2"].character == "Tam"
    bank.save(tmp_path)
    assert_equal(MemoryBank.load(tmp_path), bank)
    for shot in (1, 3):
        bank.put_frames(shot, [])
    assert ids(bank) == ["ref_tam_2", "ref_tam_1", "ref_boat_1", "mine"], "what the user added stays"


def test_schema_1_counted_from_0(tmp_path: Path) -> None:
    filled().save(tmp_path)
    old = [entry | {n: entry[n] - 1 for n in ("shot", "frame") if entry[n] is not None} for entry in entries(tmp_path)]
    rewrite(tmp_path, old, schema=1)
    assert_equal(MemoryBank.load(tmp_path), filled())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("shot01_frame001", "must be an object"),
        ({"id": "a", "charcter": "Tam"}, "charcter: unknown key; did you mean 'character'"),
        ({"id": "a", "shot": "two"}, "shot: input should be a valid integer.*not 'two'"),
        ({"shot": 2}, "at least an id or an image"),
        ({"id": "../../film"}, "id: string should match"),
        ({"id": "ref_tam_1"}, r"\['ref_tam_1'\] are used more than once"),
        ({"image": "nowhere.png"}, r"nowhere\.png is missing"),
    ],
)
def test_mistakes_in_entries_are_explained(tmp_path: Path, entry: Any, message: str) -> None:
    filled().save(tmp_path)
    rewrite(tmp_path, [*entries(tmp_path), entry])
    with pytest.raises(ValueError, match=message):
        MemoryBank.load(tmp_path, embed=embed)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("memory.json", None, r"memory\.json does not exist"),
        ("memory.json", b'{"schema": 1, "keyframes": [', "is not valid JSON"),
        ("memory.json", b"[]", "must hold"),
        ("memory.json", b'{"schema": 99, "keyframes": []}', "has schema 99, this version reads 1 and 2"),
        ("keyframes/shot01_frame013.png", None, r"frame013\.png is missing"),
        ("keyframes/shot01_frame013.png", b"\x89PNG", r"frame013\.png cannot be read as an image"),
        ("keyframes/shot01_frame013.safetensors", None, r"frame013\.safetensors is missing"),
        ("keyframes/shot01_frame013.safetensors", b"half", r"frame013\.safetensors is corrupt"),
    ],
)
def test_missing_and_damaged_files_are_named(tmp_path: Path, file: str, content: bytes | None, message: str) -> None:
    filled().save(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        MemoryBank.load(tmp_path, embed=embed)
