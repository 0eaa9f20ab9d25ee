"""The studio: what its actions do to a film and a story, which commands they name, and whom its server answers."""

from __future__ import annotations

import asyncio
import io
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storymem.commands.cli import main
from storymem.film.folder import Film
from storymem.film.generate import generate
from storymem.media.images import ImageError
from storymem.memory.bank import read_entries
from storymem.story import StoryError, load_story
from storymem.studio.actions import Studio
from storymem.studio.board import View, board_html, fates_html, memory_html, pair_html, status_html
from storymem.studio.serve import Guard
from storymem.studio.work import Job
from tests.stories import plain_image

STORY = """\
title: Walk
overview: A walk.
characters: [{name: Ada}]
scenes:
  - shots:
      - prompt: Ada waits.
      - {prompt: Ada walks., characters: [Ada]}
  - shots:
      - prompt: A door.
"""
SMALL = (
    *("model=tiny", "sampler.steps=3", "runtime=cpu"),
    *("model.video.height=32", "model.video.width=48", "model.video.frames=9"),
)


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    monkeypatch.chdir(tmp_path)
    Path("walk.yaml").write_text(STORY)
    studio = Studio("walk.yaml", SMALL)
    yield studio
    studio.worker.close()


def wait(studio: Studio) -> str:
    """How the last job ended."""
    end = time.monotonic() + 120
    while studio.worker.busy and time.monotonic() < end:
        time.sleep(0.02)
    return studio.worker.jobs[-1].state


def prompts(studio: Studio) -> list[str]:
    return [shot.prompt for shot in studio.story.shots]


def test_takes_are_made_compared_and_chosen(studio: Studio) -> None:
    assert "not made yet" in board_html(View(studio), 1)
    command = studio.make()
    assert command == f"storymem generate walk.yaml output=films/walk {' '.join(SMALL)}"
    assert wait(studio) == "done"
    preview = studio.worker.jobs[-1].progress.preview
    assert preview is not None
    assert np.asarray(Image.open(io.BytesIO(preview))).std() > 0
    assert "Done" in status_html(studio.worker.jobs[-1], 0)
    alone = generate("walk.yaml", output="alone", model="tiny", overrides=SMALL[1:], progress=False)
    assert [take.sha256 for take in Film.open("films/walk").shots] == [take.sha256 for take in alone.shots]

    assert studio.make("shot=1", "takes=2").endswith("shot=1 takes=2")
    assert wait(studio) == "done"
    page = board_html(View(studio), 2)
    assert "take 2 (3 takes)" in page
    assert page.count("Not what would be made now") == 2
    assert 'alt="frame 1 of shot 1: Ada waits."' in page
    assert "take 3: Ada waits." in pair_html(View(studio), 1, (2, 3))
    assert studio.choose(1, 1).endswith("shot=1 take=1")
    assert "Not what would be made now" not in board_html(View(studio), 2)
    assert "recalled for shots 2, 3" in memory_html(View(studio))


def test_the_memory_is_edited(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no memory yet"):
        studio.drop("shot_01_frame_1")
    assert "has no take yet" in fates_html(View(studio), 1)
    studio.make()
    with pytest.raises(ValueError, match="edit the memory when they are done"):
        studio.drop("shot_01_frame_1")
    assert wait(studio) == "done"
    first, second = (entry.id for entry in read_entries(studio.folder)[:2])
    plain_image(Path("a hat.png"), (200, 30, 30), (300, 100))

    done = [studio.add_image("a hat.png", "Ada"), studio.pin(second), studio.replace(first, "a hat.png")]
    assert [one.split("\n# ")[0] for one in done] == [
        "storymem memory films/walk add films/walk/keyframes/ref_ada_1.png for=Ada",
        f"storymem memory films/walk pin {second}",
        f"storymem memory films/walk replace {first} films/walk/keyframes/{first}_2.png",
    ]
    assert "Shot 2 is not what would be made now" in done[0]
    page = memory_html(View(studio))
    assert page.count("pinned") == 1
    assert f"{len(read_entries(studio.folder))}: ref_ada_1" in page
    studio.pin(second, pinned=False)
    studio.drop("ref_ada_1")
    assert [entry.id for entry in read_entries(studio.folder)][:2] == [f"{first}_2", second]
    assert "pinned" not in memory_html(View(studio))

    before = read_entries(studio.folder)
    Path("no.png").write_text("no image")
    for edit, error, message in (
        (lambda: studio.add_image("no.png"), ImageError, "cannot be read as an image"),
        (lambda: studio.add_image("a hat.png", "Bo"), ValueError, "its characters are Ada"),
        (lambda: studio.drop(None), ValueError, "choose a keyframe"),
        (lambda: studio.drop("ref_ada_1"), ValueError, "no keyframe ref_ada_1"),
    ):
        with pytest.raises(error, match=message):
            edit()
    assert read_entries(studio.folder) == before

    shutil.copytree("films/walk", "copy")
    words = shlex.split(done[0].split("\n# ")[0])
    monkeypatch.setattr(sys, "argv", ["storymem", "memory", "copy", *words[3:]])
    main()
    assert read_entries(Path("copy"))[-1].character == "Ada"


def test_why_frames_were_kept_is_shown(studio: Studio) -> None:
    studio.make()
    assert wait(studio) == "done"
    take = Film.open("films/walk").shots[0]
    page = fates_html(View(studio), 1)
    assert page.count("<tr") == len(take.candidates) + 1
    assert page.count('class="kept"') == len(take.keyframes) > 0
    assert "kept: the memory was empty" in page
    assert "storymem memory films/walk shot=1" in page


def test_a_folder_is_opened_with_its_story_and_settings(studio: Studio) -> None:
    studio.make()
    assert wait(studio) == "done"
    opened = Studio("films/walk")
    try:
        assert opened.story.to_dict() == studio.story.to_dict()
        assert opened.make("shot=3")
        assert wait(opened) == "done"
    finally:
        opened.worker.close()
    assert len(Film.open("films/walk").takes) == 4
    with pytest.raises(ValueError, match="holds no film"):
        Studio(".")
    with pytest.raises(ValueError, match="output=elsewhere: the film stays"):
        Studio("films/walk", ["output=elsewhere"])


def test_the_story_is_edited_beside_the_users_file(studio: Studio) -> None:
    command, note = studio.edit_shot(2, prompt="Ada runs.", seed=7, frames=9, cut=False).split("\n# ")
    assert note.startswith("The story is saved as walk_edited.yaml")
    assert Path("walk.yaml").read_text() == STORY
    edited = load_story("walk_edited.yaml").shots[1]
    assert (edited.prompt, edited.seed, edited.frames, edited.cut) == ("Ada runs.", 7, 9, False)
    assert edited.characters == ("Ada",)
    studio.edit_shot(2, seed=None, cut=None, characters=[])
    assert (studio.story.shots[1].seed, studio.story.shots[1].cut, studio.story.shots[1].characters) == (None, True, ())

    studio.add_shot(1, "A cat.")
    studio.move_shot(3, 1)
    assert [[shot.prompt for shot in scene.shots] for scene in studio.story.scenes] == [
        ["Ada waits.", "A cat."],
        ["Ada runs.", "A door."],
    ]
    studio.move_shot(3, 1)
    studio.remove_shot(1)
    assert prompts(studio) == ["A cat.", "A door.", "Ada runs."]
    assert shlex.split(command)[2] == "walk_edited.yaml"
    with pytest.raises(ValueError, match="first of the film"):
        studio.move_shot(1, -1)
    before = Path("walk_edited.yaml").read_text()
    with pytest.raises(StoryError, match="frames is 8"):
        studio.edit_shot(2, frames=8)
    assert Path("walk_edited.yaml").read_text() == before


def test_the_users_file_is_overwritten_if_asked_and_a_copy_never_is(studio: Studio) -> None:
    Path("walk_edited.yaml").write_text("mine")
    studio.remove_shot(3)
    assert studio.story_file == Path("walk_edited_2.yaml")
    again = Studio("walk.yaml", SMALL)
    again.worker.close()
    again.remove_shot(1, overwrite=True)
    assert prompts(again) == ["Ada walks.", "A door."]
    assert again.story_file == Path("walk.yaml")
    again.edit_shot(1, seed=3)
    assert again.story_file == Path("walk_edited_3.yaml")
    assert again.story.shots[0].seed == 3
    assert load_story("walk.yaml").shots[0].seed is None
    assert Path("walk_edited.yaml").read_text() == "mine"


def test_what_is_made_can_be_stopped(studio: Studio) -> None:
    studio.make()
    studio.make("shot=1")
    with pytest.raises(ValueError, match="choose when they are done"):
        studio.choose(1, 1)
    studio.worker.stop()
    assert "stopped" in wait(studio)
    assert all("stopped" in job.state for job in studio.worker.jobs)
    assert studio.film is None
    studio.make()
    assert wait(studio) == "done"


def test_what_goes_wrong_is_shown(studio: Studio) -> None:
    studio.make("shot=9")
    assert "shot=9: write numbers from 1 to 3" in wait(studio)
    assert "shot=9: write numbers" in status_html(studio.worker.jobs[-1], 0)


def test_stories_are_written_imported_and_queued(studio: Studio) -> None:
    command, prompt = studio.write_story("a lost seal", 4, "", "")
    assert command == "storymem write 'a lost seal' shots=4 model=tiny"
    assert "a film of 4 shots" in prompt
    assert studio.other_stories == []
    answer = f"Here it is:\n```yaml\n{STORY.replace('title: Walk', 'title: Other')}```"
    assert "Markdown fences are left out" in studio.import_story(answer)
    assert (studio.story_file, studio.folder) == (Path("other.yaml"), Path("films/other"))
    assert studio.other_stories == [Path("walk.yaml")]
    studio.make()
    assert studio.make(story=Path("walk.yaml")).startswith("storymem generate walk.yaml model=tiny")
    assert wait(studio) == "done"
    assert [Film.open(f"films/{name}").is_complete for name in ("other", "walk")] == [True, True]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:7860"}, 200),
        ({"host": "localhost:7860", "origin": "http://localhost:7860"}, 200),
        ({"host": "evil.example:7860"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "http://evil.example"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "null"}, 403),
        ({}, 403),
        ({"host": "127.0.0.1:7860", "sec-fetch-site": "same-origin"}, 200),
        ({"host": "127.0.0.1:7860", "sec-fetch-site": "cross-site"}, 403),
        ({"host": "127.0.0.1:7860", "path": "/gradio_api/file=https://evil.example/a.png"}, 403),
        ({"host": "127.0.0.1:7860", "path": "/gradio_api/upload", "content-length": "1000"}, 200),
        ({"host": "evil.example", "path": "/gradio_api/upload", "content-length": "1000"}, 403),
        ({"host": "127.0.0.1:7860", "path": "/gradio_api/upload", "content-length": "34000000"}, 413),
        ({"host": "127.0.0.1:7860", "path": "/gradio_api/upload"}, 413),
        ({"host": "127.0.0.1:7860", "content-length": "34000000"}, 413),
        ({"host": "127.0.0.1:7860", "transfer-encoding": "chunked"}, 413),
    ],
)
def test_only_the_page_itself_is_answered(headers: dict[str, str], status: int) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    answer = asyncio.run(answered(Guard(app), headers))
    assert answer["status"] == status
    assert status != 200 or b"default-src 'self'" in dict(answer["headers"])[b"content-security-policy"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ('{"data": ["https://evil.example", {"path": "/tmp/a.png", "url": "http://127.0.0.1:7860/a.png"}]}', 200),
        ('{"data": [{"path": "https://evil.example/a.png", "meta": {"_type": "gradio.FileData"}}]}', 403),
        (r'{"data": [{"p\u0061th": "http:\u002f/evil.example/a.png", "path": "/tmp/a.png"}]}', 403),
        ("--form--", 400),
        ("[" * 100_000, 400),
    ],
)
def test_no_file_is_fetched_from_another_host(body: str, status: int) -> None:
    received: list[bytes] = []

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        received.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    headers = {"host": "127.0.0.1:7860", "path": "/gradio_api/queue/join", "content-length": str(len(body))}
    assert asyncio.run(answered(Guard(app), headers, body.encode()))["status"] == status
    assert received == ([body.encode()] if status == 200 else [])


def test_a_job_that_waits_is_never_forgotten(studio: Studio) -> None:
    begun, go = threading.Event(), threading.Event()
    studio.worker.add(Job("first", lambda _progress: begun.set() or go.wait()))
    for number in range(30):
        studio.worker.add(Job(str(number), lambda _progress: None))
    begun.wait()
    assert [len(studio.worker.jobs), studio.worker.jobs[0].state] == [31, "running"]
    go.set()
    wait(studio)
    studio.worker.add(Job("last", lambda _progress: None))
    assert len(studio.worker.jobs) == 21


def test_one_image_is_uploaded_at_a_time() -> None:
    upload = {"host": "127.0.0.1:7860", "path": "/gradio_api/upload", "content-length": "1000"}
    during = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        if not during:
            during.append(await answered(guard, upload))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    guard = Guard(app)
    assert asyncio.run(answered(guard, upload))["status"] == 200
    assert during[0]["status"] == 429
    assert asyncio.run(answered(guard, upload))["status"] == 200


async def answered(guard: Guard, headers: dict[str, str], body: bytes = b"") -> Any:
    """The start of the answer to a request."""
    sent: list[Any] = []

    parts = [body[:10], body[10:]]

    async def receive() -> Any:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "path": headers.get("path", "/"),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    await guard(scope, receive, send)
    return sent[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["walk.yaml"], "pip install 'storymem[studio]'"),
        (["nothing"], "nothing does not exist"),
        (["walk.yaml", "shot=2"], "shot=2: this is done on the page"),
        (["walk.yaml", "seeed=2"], "seed"),
        (["walk.yaml", "port=80"], "port=80: write a number from 1024"),
    ],
)
def test_the_command_reports_what_it_lacks(
    arguments: list[str], message: str, studio: Studio, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    found = None if "pip install" in message else object()
    monkeypatch.setattr("storymem.studio.serve.find_spec", lambda _name: found)
    monkeypatch.setattr(sys, "argv", ["storymem", "studio", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
