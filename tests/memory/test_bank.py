"""The memory bank, in memory and on disk: killed at any moment, edited by hand, damaged."""

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
from safetensors import safe_open

import storymem.io
from storymem.memory import Keyframe, MemoryBank, reference_id


def image(seed: int, size: tuple[int, int] = (6, 8)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def embed(frames: np.ndarray) -> np.ndarray:
    """Mean colour of each frame: tells pictures apart."""
    return frames.mean(axis=(1, 2))


def embedding(picture: np.ndarray) -> np.ndarray:
    vector = embed(picture[None])[0]
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def from_shot(shot: int, frame: int, *, seed: int | None = None, **more: Any) -> Keyframe:
    picture = image(100 * shot + frame if seed is None else seed)
    return Keyframe.of_shot(shot, frame, image=picture, embedding=embedding(picture), **more)


def reference(name: str, **more: Any) -> Keyframe:
    picture = image(len(name), size=(5, 3))
    return Keyframe(id=name, image=picture, embedding=embedding(picture), source=f"{name}.jpg", **more)


def filled() -> MemoryBank:
    latent = torch.randn(16, 1, 2, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    return MemoryBank(
        [
            reference("ref_tam_1", character="Tam"),
            from_shot(0, 0, quality=3.25),
            from_shot(0, 12, quality=1 / 3, similarity=0.75),
            reference("ref_boat_1", shot=1),
            replace(from_shot(2, 0), latent=latent),
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


def rewrite(folder: Path, keyframes: list[Any]) -> None:
    (folder / "memory.json").write_text(json.dumps({"schema": 1, "keyframes": keyframes}))


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_keyframes_are_remembered_in_order() -> None:
    bank = filled()
    assert ids(bank) == ["ref_tam_1", "s000_f000", "s000_f012", "ref_boat_1", "s002_f000"]
    assert bank.embeddings.shape == (5, 3)
    np.testing.assert_array_equal(bank.embeddings[2], bank["s000_f012"].embedding)
    assert MemoryBank().embeddings.shape == (0, 0)
    with pytest.raises(ValueError, match="s000_f000 is in the memory already"):
        bank.remember([from_shot(0, 0)])


def test_a_keyframe_does_not_hold_on_to_its_shot() -> None:
    frames = np.zeros((5, 6, 8, 3), np.uint8)
    keyframe = Keyframe.of_shot(0, 2, image=frames[2], embedding=np.ones(3, np.float32))
    frames[2] = 255
    assert keyframe.image.base is None
    assert keyframe.image.max() == 0


def test_forgetting_a_shot_forgets_the_later_ones_and_spares_the_storys_references() -> None:
    bank = filled()
    bank.forget_from(1)
    assert ids(bank) == ["ref_tam_1", "s000_f000", "s000_f012"]
    bank.forget_from(0)
    assert ids(bank) == ["ref_tam_1"]


def test_a_latent_can_be_added_later() -> None:
    bank = filled()
    bank.update(replace(bank["s000_f000"], latent=torch.zeros(16, 1, 2, 3)))
    assert ids(bank) == ids(filled())
    assert bank["s000_f000"].latent is not None
    with pytest.raises(KeyError):
        bank.update(from_shot(7, 7))


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


def test_references_get_readable_ids() -> None:
    assert reference_id("Tam") == "ref_tam_1"
    assert reference_id("Tam", {"ref_tam_1", "ref_tam_2"}) == "ref_tam_3"
    assert reference_id("Old  Tam's boat") == "ref_old_tam_s_boat_1"
    assert reference_id("???") == "ref_1"
    assert reference_id("Tam", filled()) == "ref_tam_2"


def test_a_bank_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    filled().save(tmp_path)
    assert_equal(MemoryBank.load(tmp_path), filled())
    with Image.open(tmp_path / "keyframes" / "s000_f012.png") as picture:
        np.testing.assert_array_equal(np.array(picture), image(12))
    with safe_open(tmp_path / "keyframes" / "s002_f000.safetensors", framework="np") as tensors:
        assert set(tensors.keys()) == {"embedding", "latent"}


def test_an_empty_bank_can_be_saved(tmp_path: Path) -> None:
    MemoryBank().save(tmp_path)
    assert len(MemoryBank.load(tmp_path)) == 0


def test_what_is_on_disk_is_not_written_again(tmp_path: Path) -> None:
    bank = filled()
    bank.save(tmp_path)
    before = state(tmp_path)
    bank.save(tmp_path)
    MemoryBank.load(tmp_path).save(tmp_path)
    assert state(tmp_path) == before
    bank.remember([from_shot(3, 5)])
    bank.save(tmp_path)
    after = state(tmp_path)
    assert {name for name in after if after[name] != before.get(name)} == {
        "memory.json",
        "keyframes/s003_f005.png",
        "keyframes/s003_f005.safetensors",
    }


def test_forgotten_keyframes_leave_the_disk(tmp_path: Path) -> None:
    bank = filled()
    bank.save(tmp_path)
    bank.forget_from(2)
    bank.save(tmp_path)
    assert not list(tmp_path.glob("keyframes/s002*"))
    assert_equal(MemoryBank.load(tmp_path), bank)


class Killed(BaseException):
    """Stands for the end of the process."""


def test_killed_at_any_moment_the_folder_still_holds_a_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die before and in the middle of each file in turn, while shot 2 is replaced and shot 3 added."""
    before, after = filled(), filled()
    after.forget_from(2)
    after.remember([from_shot(2, 0, seed=77), from_shot(3, 5)])
    before.save(tmp_path / "start")
    write = Path.write_bytes
    found = set()
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
                finished = False
        loaded = MemoryBank.load(folder)
        for keyframe in loaded:
            np.testing.assert_array_equal(keyframe.embedding, embedding(keyframe.image))
        found.add(tuple(ids(loaded)))
        after.save(folder)
        assert_equal(MemoryBank.load(folder), after)
        if finished:
            break
    assert finished
    # Three whole states and no others: all old, old without what is being replaced, all new.
    assert found == {tuple(ids(before)), tuple(ids(before)[:-1]), tuple(ids(after))}


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def fail() -> None:
        with storymem.io.replacing(target) as partial:
            partial.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "old"


def test_entries_can_be_deleted_reordered_and_put_back(tmp_path: Path) -> None:
    filled().save(tmp_path)
    written = entries(tmp_path)
    rewrite(tmp_path, [written[4], written[1]])
    bank = MemoryBank.load(tmp_path)
    assert ids(bank) == ["s002_f000", "s000_f000"]
    bank.save(tmp_path)
    rewrite(tmp_path, written)
    assert_equal(MemoryBank.load(tmp_path), filled())


def test_a_replaced_picture_is_embedded_anew(tmp_path: Path) -> None:
    filled().save(tmp_path)
    for id in ("s000_f012", "s002_f000"):
        Image.fromarray(image(9, size=(4, 4))).save(tmp_path / "keyframes" / f"{id}.png")
    with pytest.raises(ValueError, match=r"s000_f012\.png was added or replaced by hand"):
        MemoryBank.load(tmp_path)
    bank = MemoryBank.load(tmp_path, embed=embed)
    assert ids(bank) == ids(filled())
    changed = bank["s000_f012"], bank["s002_f000"]
    for keyframe in changed:
        np.testing.assert_array_equal(keyframe.image, image(9, size=(4, 4)))
        np.testing.assert_allclose(keyframe.embedding, embedding(keyframe.image), rtol=1e-6)
        assert (keyframe.latent, keyframe.quality, keyframe.similarity) == (None, None, None)
    assert (changed[0].shot, changed[0].frame) == (0, 12)
    bank.save(tmp_path)
    assert_equal(MemoryBank.load(tmp_path), bank)


def test_a_picture_compressed_otherwise_is_the_same_picture(tmp_path: Path) -> None:
    filled().save(tmp_path)
    Image.fromarray(image(12)).save(tmp_path / "keyframes" / "s000_f012.png", compress_level=0)
    assert_equal(MemoryBank.load(tmp_path), filled())


def test_a_picture_can_be_added_by_hand(tmp_path: Path) -> None:
    filled().save(tmp_path)
    Image.fromarray(image(50)).save(tmp_path / "Tam.png")
    Image.fromarray(image(51)).save(tmp_path / "keyframes" / "mine.png")
    added = [{"image": "Tam.png", "character": "Tam"}, *entries(tmp_path), {"id": "mine", "shot": 2}]
    rewrite(tmp_path, added)
    bank = MemoryBank.load(tmp_path, embed=embed)
    assert ids(bank) == ["ref_tam_2", *ids(filled()), "mine"]
    np.testing.assert_array_equal(bank["ref_tam_2"].image, image(50))
    assert bank["ref_tam_2"].character == "Tam"
    bank.save(tmp_path)
    assert_equal(MemoryBank.load(tmp_path), bank)
    bank.forget_from(2)
    assert "mine" in bank, "what a person added stays"
    assert "ref_boat_1" in bank
    bank.forget_from(1)
    assert "ref_boat_1" not in bank


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("s000_f000", "must be an object"),
        ({"id": "s000_f000", "charcter": "Tam"}, "unknown key 'charcter'; did you mean 'character'"),
        ({"id": "s000_f000", "shot": "two"}, "shot must be int or null, is 'two'"),
        ({"shot": 2}, "needs an 'id' or an 'image'"),
        ({"id": "../../film"}, "letters, digits"),
        ({"id": "ref_tam_1"}, r"\['ref_tam_1'\] are used more than once"),
        ({"image": "nowhere.png"}, r"nowhere\.png is missing"),
    ],
)
def test_mistakes_in_the_manifest_are_explained(tmp_path: Path, entry: Any, message: str) -> None:
    filled().save(tmp_path)
    rewrite(tmp_path, [*entries(tmp_path), entry])
    with pytest.raises(ValueError, match=message):
        MemoryBank.load(tmp_path, embed=embed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema": 1, "keyframes": [', "is not valid JSON"),
        ("[]", "must hold"),
        ('{"schema": 99, "keyframes": []}', "has schema 99, this version reads 1"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "memory.json").write_text(content)
    with pytest.raises(ValueError, match=rf"memory\.json {message}"):
        MemoryBank.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("memory.json", None, r"memory\.json does not exist"),
        ("keyframes/s000_f012.png", None, r"s000_f012\.png is missing"),
        ("keyframes/s000_f012.png", b"\x89PNG", r"s000_f012\.png cannot be read as an image"),
        ("keyframes/s000_f012.safetensors", None, r"s000_f012\.safetensors is missing"),
        ("keyframes/s000_f012.safetensors", b"half", r"s000_f012\.safetensors is corrupt"),
    ],
)
def test_missing_and_corrupt_files_are_named(tmp_path: Path, file: str, content: bytes | None, message: str) -> None:
    filled().save(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        MemoryBank.load(tmp_path, embed=embed)
