"""Which files of a folder are read, and that the others are reported by name with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from storymem.data.videos import VideoFolder, scan_videos


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def kinds(found: VideoFolder) -> dict[str, str]:
    return {path: reason.partition(":")[0] for path, reason in found.ignored.items()}


def test_links_are_followed_once_and_dead_ones_reported(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    touch(folder / "a.mp4", folder / "here/b.mp4", tmp_path / "elsewhere/c.mp4", tmp_path / "elsewhere/deep/d.mp4")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    (folder / "e.mp4").symlink_to(tmp_path / "elsewhere/c.mp4")
    (folder / "again").symlink_to("here")
    (folder / "here/loop").symlink_to("..")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path)
    (folder / "z.mp4").symlink_to("nowhere.mp4")
    (folder / "itself.mp4").symlink_to("itself.mp4")
    found = scan_videos(folder)
    assert found.videos == ["a.mp4", "e.mp4", "here/b.mp4", "sub/c.mp4", "sub/deep/d.mp4"]
    assert kinds(found) == {
        **{"again": "linked folder", "here/loop": "linked folder", "sub/up": "linked folder"},
        **{"z.mp4": "dead link", "itself.mp4": "unreadable"},
    }
    assert found.ignored["z.mp4"] == "dead link: to nowhere.mp4"


def test_other_files_are_reported(tmp_path: Path) -> None:
    names = ["._a.mp4", ".DS_Store", "c.gif", "d.webp", "e.jpg", ".hidden/f.mp4"]
    touch(tmp_path / "a.MP4", tmp_path / "a.txt", *(tmp_path / name for name in names))
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "fifo.mp4")
    touch(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")))
    found = scan_videos(tmp_path)
    assert (found.videos, found.texts) == (["a.MP4"], ["a.txt"])
    assert kinds(found) == {
        **{"._a.mp4": "hidden", ".DS_Store": "hidden", ".hidden": "hidden", "caf\udce9.mp4": "name"},
        **{"c.gif": "not a video", "d.webp": "not a video", "e.jpg": "not a video", "fifo.mp4": "not a file"},
    }
    assert "convert it to .mp4" in found.ignored["c.gif"]


def test_a_folder_without_a_video_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "a.gif", tmp_path / "b.gif", tmp_path / ".c.mp4")
    with pytest.raises(ValueError, match=r"no video in .*Not read: 2 not a video, 1 hidden; the first is \.c\.mp4"):
        scan_videos(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        scan_videos(tmp_path / "nowhere")


def test_folders_of_our_own_inside_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4", tmp_path / "set/groups.json", tmp_path / "masks/a.mp4")
    found = scan_videos(tmp_path, without=[tmp_path / "set", tmp_path / "masks", tmp_path / "nowhere", tmp_path])
    assert (found.videos, found.ignored) == (["a.mp4"], {})


def test_an_unreadable_folder_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "a.mp4", tmp_path / "locked/b.mp4")
    scandir = os.scandir

    def refusing(path: Path) -> object:  # root may read everything
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert scan_videos(tmp_path).ignored == {"locked": "unreadable folder: Permission denied"}
