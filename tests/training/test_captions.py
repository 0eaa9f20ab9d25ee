"""Captions in their three forms, and what is wrong with them told with file and line."""

import csv
import json
from pathlib import Path

import pytest

from storymem.training.captions import read_captions

VIDEOS = ["a.mp4", "far/b.mp4"]


def jsonl(folder: Path, *rows: dict) -> None:
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_text_file_beside_the_video(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "b.txt").write_text("A dog\n runs. \n")
    captions = read_captions(tmp_path, VIDEOS, None)
    assert captions.of("far/b.mp4", 0, 2) == "A dog runs."
    assert captions.of("a.mp4", 0, 2) is None


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_table_names_videos_and_parts_of_them(tmp_path: Path, form: str) -> None:
    rows = [
        {"video": "a.mp4", "caption": "A day, whole."},
        {"video": "a.mp4", "caption": "Morning.", "start": 0, "end": 4},
        {"video": "a.mp4", "caption": "Evening.", "start": 4.5, "end": 9},
        {"video": "far/b.mp4", "caption": "Night."},
    ]
    if form == "jsonl":
        jsonl(tmp_path, *rows)
    else:
        with (tmp_path / "captions.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["video", "caption", "start", "end"])
            writer.writeheader()
            writer.writerows(rows)
    captions = read_captions(tmp_path, VIDEOS, None)
    assert captions.of("a.mp4", 1, 3) == "Morning."
    assert captions.of("a.mp4", 5, 7) == "Evening."
    assert captions.of("a.mp4", 10, 12) == "A day, whole."
    assert captions.of("far/b.mp4", 100, 102) == "Night."


def test_a_table_elsewhere_and_texts_beside_complete_each_other(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.txt").write_text("One.")
    table = tmp_path / "mine.jsonl"
    table.write_text('{"video": "far/b.mp4", "caption": "Two."}\n')
    captions = read_captions(tmp_path / "videos", VIDEOS, table)
    assert [captions.of(name, 0, 1) for name in VIDEOS] == ["One.", "Two."]


def test_no_captions_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no captions for the videos in .*write a \.txt file beside each"):
        read_captions(tmp_path, VIDEOS, None)


def test_captions_of_videos_that_are_not_there(tmp_path: Path) -> None:
    jsonl(tmp_path, {"video": "a.mp4", "caption": "x"}, *({"video": f"{n}.mp4", "caption": "x"} for n in range(7)))
    with pytest.raises(
        ValueError, match=r"7 videos that are not there: 0\.mp4, 1\.mp4, 2\.mp4, 3\.mp4, 4\.mp4, \.\.\."
    ):
        read_captions(tmp_path, VIDEOS, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"video": "a.mp4", "text": "x"}, r"line 2: a line has video, caption .* this has video, text"),
        ({"video": "a.mp4", "caption": " "}, "line 2: .* neither may be empty"),
        ({"video": "a.mp4", "caption": "x", "start": 5, "end": 2}, "line 2: start must be .* before end"),
        ({"video": "a.mp4", "caption": "x", "start": "soon"}, "line 2: start and end are seconds"),
        ({"video": "far/b.mp4", "caption": "x"}, r"line 2: far/b\.mp4 has a caption already"),
    ],
)
def test_a_faulty_line_is_named(tmp_path: Path, row: dict, message: str) -> None:
    jsonl(tmp_path, {"video": "far/b.mp4", "caption": "fine"}, row)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path, VIDEOS, None)


def test_a_line_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text('{"video": "a.mp4", "caption": "x"}\n{"video": \n')
    with pytest.raises(ValueError, match=r"captions\.jsonl, line 2: is not JSON"):
        read_captions(tmp_path, VIDEOS, None)


def test_two_captions_for_one_video(tmp_path: Path) -> None:
    jsonl(tmp_path, {"video": "a.mp4", "caption": "x"})
    (tmp_path / "a.txt").write_text("y")
    with pytest.raises(ValueError, match=r"a\.mp4 has a caption in .*captions\.jsonl and another in a\.txt"):
        read_captions(tmp_path, VIDEOS, None)
