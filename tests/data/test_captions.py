"""Captions in their three forms, with file and line for what is wrong in them."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from storymem.data.videos import Captions, VideoFolder, read_captions

VIDEOS = ["a.mp4", "far/b.mp4"]


def read(folder: Path, table: Path | None = None, videos: Sequence[str] = VIDEOS) -> Captions:
    """The captions of ``videos`` in a folder of which only the texts need be there."""
    texts = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() == ".txt"]
    found = VideoFolder(path=folder, videos=sorted(videos), texts=sorted(texts), ignored={})
    return read_captions(found, table)


def text_of(captions: Captions, video: str, start: float = 0, end: float = 2) -> str | None:
    caption = captions.of(video, start, end)
    return None if caption is None else caption.text


def jsonl(folder: Path, *rows: dict) -> None:
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_text_file_beside_the_video(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "b.txt").write_text("A dog\n runs. \n")
    captions = read(tmp_path)
    assert text_of(captions, "far/b.mp4", 0, 2) == "A dog runs."
    assert text_of(captions, "a.mp4", 0, 2) is None


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
    captions = read(tmp_path)
    assert text_of(captions, "a.mp4", 1, 3) == "Morning."
    assert text_of(captions, "a.mp4", 5, 7) == "Evening."
    assert text_of(captions, "a.mp4", 10, 12) == "A day, whole."
    assert text_of(captions, "far/b.mp4", 100, 102) == "Night."


def test_a_table_elsewhere_and_texts_beside_complete_each_other(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.txt").write_text("One.")
    table = tmp_path / "mine.jsonl"
    table.write_text('{"video": "far/b.mp4", "caption": "Two."}\n')
    captions = read(tmp_path / "videos", table)
    assert [text_of(captions, name, 0, 1) for name in VIDEOS] == ["One.", "Two."]


def test_no_captions_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no captions for the videos in .*write a \.txt file beside each"):
        read(tmp_path)


def test_captions_of_videos_that_are_not_there(tmp_path: Path) -> None:
    jsonl(tmp_path, {"video": "a.mp4", "caption": "x"}, *({"video": f"{n}.mp4", "caption": "x"} for n in range(7)))
    with pytest.raises(
        ValueError, match=r"7 videos that are not there: 0\.mp4, 1\.mp4, 2\.mp4, 3\.mp4, 4\.mp4, \.\.\."
    ):
        read(tmp_path)


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
        read(tmp_path)


def test_a_line_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text('{"video": "a.mp4", "caption": "x"}\n{"video": \n')
    with pytest.raises(ValueError, match=r"captions\.jsonl, line 2 is not valid JSON"):
        read(tmp_path)


def test_two_captions_for_one_video(tmp_path: Path) -> None:
    jsonl(tmp_path, {"video": "a.mp4", "caption": "x"})
    (tmp_path / "a.txt").write_text("y")
    with pytest.raises(ValueError, match=r"a\.mp4 has a caption in .*captions\.jsonl and another in a\.txt"):
        read(tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffA dog.\r\nIt runs.", encoding="utf-8")
    assert text_of(read(tmp_path), "a.mp4") == "A dog. It runs."
    line = json.dumps({"video": "far/b.mp4", "caption": "Two."})
    (tmp_path / "captions.jsonl").write_text(f"\ufeff{line}\r\n", encoding="utf-8")
    assert text_of(read(tmp_path), "far/b.mp4") == "Two."
    (tmp_path / "captions.jsonl").unlink()
    (tmp_path / "captions.csv").write_text("\ufeffvideo,caption\nfar/b.mp4,Three.\n", encoding="utf-8")
    assert text_of(read(tmp_path), "far/b.mp4") == "Three."


@pytest.mark.parametrize("encoding", ["gbk", "utf-16", "utf-16-le", "latin-1"])
@pytest.mark.parametrize("name", ["a.txt", "captions.csv", "captions.jsonl"])
def test_another_encoding_is_refused_with_the_file(tmp_path: Path, name: str, encoding: str) -> None:
    text = "a dog runs" if encoding == "utf-16-le" else "\u00b0\u00e9"  # in GBK, too
    lines = {"captions.csv": f"video,caption\na.mp4,{text}\n", "captions.jsonl": f'\n{{"caption": "{text}"}}\n'}
    (tmp_path / name).write_bytes(lines.get(name, text).encode(encoding))
    with pytest.raises(ValueError, match=rf"{name}(:\d+)?.* save the file as UTF-8"):
        read(tmp_path)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1e"])
def test_lines_end_with_a_newline_and_nowhere_else(tmp_path: Path, separator: str) -> None:
    video = f"a{separator}b.mp4"
    rows = [{"video": video, "caption": f"Rain.{separator}Wind."}, {"video": "c.mp4", "caption": "Sun."}]
    lines = "".join(json.dumps(row, ensure_ascii=separator < " ") + "\n" for row in rows)
    (tmp_path / "captions.jsonl").write_text(lines, encoding="utf-8")
    captions = read(tmp_path, videos=[video, "c.mp4"])
    assert [text_of(captions, name) for name in (video, "c.mp4")] == ["Rain. Wind.", "Sun."]


COMPOSED, DECOMPOSED = "caf\u00e9.mp4", "cafe\u0301.mp4"


def test_names_are_compared_exactly_and_then_by_spelling(tmp_path: Path) -> None:
    jsonl(tmp_path, {"video": COMPOSED, "caption": "One."}, {"video": "x\u202fy.mp4", "caption": "Two."})
    videos = [DECOMPOSED, "x y.mp4"]
    captions = read(tmp_path, videos=videos)
    assert [text_of(captions, video) for video in videos] == ["One.", "Two."]
    assert captions.respelled == {COMPOSED: DECOMPOSED, "x\u202fy.mp4": "x y.mp4"}
    both = read(tmp_path, videos=[DECOMPOSED, COMPOSED, "x y.mp4"])
    assert [text_of(both, video) for video in (DECOMPOSED, COMPOSED)] == [None, "One."]


def test_a_text_beside_is_found_by_spelling_and_no_video_gets_two(tmp_path: Path) -> None:
    texts = [Path(name).with_suffix(".txt") for name in (COMPOSED, DECOMPOSED)]
    (tmp_path / texts[0]).write_text("One.")
    assert text_of(read(tmp_path, videos=[DECOMPOSED]), DECOMPOSED) == "One."
    (tmp_path / texts[1]).write_text("Two.")
    exact = read(tmp_path, videos=[DECOMPOSED])
    assert text_of(exact, DECOMPOSED) == "Two."
    assert exact.unused == [str(texts[0])]


def test_a_spelling_that_fits_two_videos_fits_none(tmp_path: Path) -> None:
    jsonl(tmp_path, {"video": "a\u00a0b.mp4", "caption": "x"})
    with pytest.raises(ValueError, match="1 videos that are not there"):
        read(tmp_path, videos=["a b.mp4", "a  b.mp4"])


def test_a_text_beside_two_videos_of_one_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Which?")
    videos = ["a.mov", "a.mp4"]
    with pytest.raises(ValueError, match=r"a\.txt lies beside a\.mov and a\.mp4: rename .*or write captions\.jsonl"):
        read(tmp_path, videos=videos)
    jsonl(tmp_path, *({"video": video, "caption": f"This is {video}."} for video in videos))
    (tmp_path / "a.txt").unlink()  # as the message says
    assert [text_of(read(tmp_path, videos=videos), video) for video in videos] == ["This is a.mov.", "This is a.mp4."]


def test_texts_of_no_video_are_counted(tmp_path: Path) -> None:
    for name in ("a.TXT", "elsewhere.txt", "README.txt"):
        (tmp_path / name).write_text("Something.")
    (tmp_path / "README.txt").write_bytes(b"Not a caption, and \xe9 is not UTF-8.")
    captions = read(tmp_path)
    assert text_of(captions, "a.mp4") == "Something."
    assert captions.unused == ["README.txt", "elsewhere.txt"]


def test_two_tables_are_not_chosen_between(tmp_path: Path) -> None:
    jsonl(tmp_path, {"video": "a.mp4", "caption": "One."})
    (tmp_path / "captions.csv").write_text("video,caption\na.mp4,Two.\n")
    with pytest.raises(ValueError, match=r"captions\.jsonl and captions\.csv: choose one with captions="):
        read(tmp_path)
    assert text_of(read(tmp_path, tmp_path / "captions.csv"), "a.mp4") == "Two."  # as the message says


def test_a_long_field_of_a_table_is_read(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text(f"video,caption\na.mp4,{'word ' * 60_000}\n")
    assert len(text_of(read(tmp_path), "a.mp4") or "") == 299_999


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('video,caption\na.mp4,"no end\nfar/b.mp4,x\n', r"captions\.csv, line 2: is not CSV"),
        ("video,caption,caption\na.mp4,x,y\n", r"captions\.csv, line 1: a column is named twice"),
        ("video,caption\na.mp4\n", r"captions\.csv, line 2: a line has video, caption"),
        ("video,caption\n", r"captions\.csv holds no captions"),
        ("video,caption\na.mp4,x,y\n", r"captions\.csv, line 2: .* this has video, caption, \(too many columns\)"),
        ("video,caption,start\na.mp4,x,nan\n", "line 2: start must be at least 0"),
    ],
)
def test_faulty_csv(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "captions.csv").write_text(lines)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "line 1 is nested too deeply"),
        ('{"video": "a.mp4", "caption": "x", "start": ' + "9" * 5000 + "}", "line 1 cannot be read"),
        ('{"video": "a.mp4", "caption": "x", "end": ' + "9" * 400 + "}", "line 1: start and end are seconds"),
        ('{"video": "a.mp4", "caption": "\\ud800"}', "line 1: holds half of a character"),
        ('["a.mp4", "x"]', "line 1: must be an object"),
        ('{"video": ["a.mp4"], "caption": "x"}', "line 1: video and caption must be texts"),
    ],
)
def test_faulty_json_lines(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "captions.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_a_table_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: there is no such file"):
        read(tmp_path, tmp_path / "none.jsonl")
    (tmp_path / "captions.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"captions\.jsonl is a folder"):
        read(tmp_path)
