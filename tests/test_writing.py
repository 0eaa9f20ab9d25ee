"""``storymem write``: the prompt, an endpoint in a thread, and what is repaired in answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storymem import load_story
from storymem.commands.cli import main
from storymem.story.json_schema import story_schema
from tests.endpoint import Endpoint, answered

Write = Callable[..., tuple[int, str, str]]
PROMPT = "Tam #1, a keeper: he says nothing.  He climbs."
STORY: dict[str, Any] = {
    "title": "The Keeper: a tale",
    "overview": "A keeper finds a seal.",
    "style": "watercolour",
    "genre": "tale",
    "characters": [{"name": "Tam", "description": "a bearded man in a yellow coat."}, {"name": "Bo"}],
    "scenes": [
        {"shots": [{"prompt": PROMPT, "characters": ["Tam", "Bo"]}, {"prompt": "no", "cut": False, "seed": 0}]},
        {"shots": [{"prompt": "Tam sleeps — \U0001f600.", "frames": 9, "negative_prompt": ""}]},
    ],
}
BENCH = {
    "story_name": "Bench",
    "story_overview": "A dog.",
    "scenes": [{"scene_num": 1, "video_prompts": ["A dog."], "first_frame_prompt": "A dog sits.", "cut": ["True"]}],
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Write:
    """Runs the command in an empty folder: its status, output and messages."""
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def write(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["storymem", "write", *arguments])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out.strip(), captured.err.strip()

    return write


class Server(Endpoint):
    @property
    def arguments(self) -> tuple[str, str]:
        return f"endpoint.url={self.url}/", "endpoint.model=m"

    def say(self, answer: Any) -> None:
        self.replies.append(answered(answer if isinstance(answer, str) else json.dumps(answer)))


@pytest.fixture
def server() -> Iterator[Server]:
    with Server().serving() as served:
        yield served


def test_without_an_endpoint_the_whole_prompt_is_printed(write: Write, tmp_path: Path) -> None:
    status, printed, notes = write("a lighthouse keeper, a = lost seal", "shots=7")
    assert status == 0
    assert "a film of 7 shots of about 5 seconds" in printed
    assert "\na lighthouse keeper, a = lost seal\n" in printed
    assert json.loads(printed.partition("JSON schema:")[2]) == story_schema()
    assert "storymem write answer.json" in notes
    assert "sunglasses" not in printed
    assert "The words: a, Ada, and," in write("a", "lost", "seal", "model=toy")[1]
    assert not list(tmp_path.iterdir())


def test_an_endpoint_is_asked_and_its_story_saved(
    write: Write, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    server.say(STORY)
    status, printed, notes = write("a seal", "output=new/story.yaml", "endpoint.key=MY_KEY", *server.arguments)
    assert (status, printed) == (0, "new/story.yaml")
    assert notes.splitlines()[1:] == ["the answer has 3 shots, not 10"]
    ((path, key, body),) = server.asked
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer sk-secret", "m")
    assert "a seal" in body["messages"][0]["content"]
    (tmp_path / "answer.json").write_text(json.dumps(STORY))
    for story in (load_story(tmp_path / "new/story.yaml"), load_story(tmp_path / "answer.json")):
        assert (story.genre, story.shots[1].seed, story.shots[2].negative_prompt) == ("tale", 0, "")
        assert [shot.cut for shot in story.shots] == [True, False, True]
        assert story.prompt_of(story.shots[0]) == (
            "watercolour: Tam #1, a keeper: he says nothing. He climbs. Tam: a bearded man in a yellow coat."
        )
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "sk-secret" in path.read_text()]


def test_an_answer_that_is_no_story_is_sent_back_once(write: Write, server: Server, tmp_path: Path) -> None:
    for answer in ({"title": "T", "overview": "O", "scenes": [{"shots": [{"promt": "A dog."}]}]}, STORY):
        server.say(answer)
    assert write("a seal", *server.arguments)[0] == 0
    first, second = (body["messages"] for _, _, body in server.asked)
    assert second[0] == first[0]
    assert "promt" in second[1]["content"]
    assert "\n- shot 1 (scene 1, shot 1): unknown key promt; expected prompt," in second[2]["content"]
    server.say('{"title": "T" "overview": "O"}')
    server.say("No.")
    status, _, notes = write("a seal", *server.arguments)
    assert status == 2
    assert "\n- the JSON object in the answer is not valid JSON: Expecting ',' delimiter (line 1, column 15)\n" in notes
    assert "\nthe second answer is not a story either:\nthere is no JSON object in the answer\n" in notes
    assert "storymem write answer.txt" in notes
    assert (tmp_path / "answer.txt").read_text() == "No."


TEXT = json.dumps(STORY, ensure_ascii=False)
WITHOUT_OVERVIEW = {key: value for key, value in STORY.items() if key != "overview"}
DESCRIBED = {"title": "T", "overview": "O", "scenes": [{"shots": [{"description": PROMPT}]}]}
CONVERTED = "ST-Bench's form is converted"
FENCES, AROUND = "Markdown fences are left out", "text around the story is left out"


@pytest.mark.parametrize(
    ("answer", "notes"),
    [
        (TEXT, []),
        (f"```json\n{TEXT}\n```\n", [FENCES]),
        (f"Like {{this}}?\r\n```\r\n{TEXT}\r\n```\r\nGood luck!", [FENCES, AROUND]),
        (f'<think>{{"title": "no"}}</think>{TEXT}', [AROUND]),
        (f"Here it is: {TEXT} Good luck!", [AROUND]),
        (TEXT.replace('"genre": "tale",', '"genre": "tale",,').replace(",,", ", ").replace("}]}]}", "}]}],}"), []),
        (json.dumps(DESCRIBED), ["shot 1: description is taken as its prompt"]),
        (json.dumps(WITHOUT_OVERVIEW), ["overview was missing: the title is used"]),
        (json.dumps(BENCH), [CONVERTED, "first_frame_prompt is left out: it is not used"]),
        (
            json.dumps({"story_name": "Bench", "scenes": [{"video_prompts": ["A dog."]}]}),
            [CONVERTED, "overview was missing: the title is used"],
        ),
    ],
)
def test_what_is_repaired_in_an_answer_is_reported(write: Write, tmp_path: Path, answer: str, notes: list[str]) -> None:
    (tmp_path / "answer.txt").write_text(answer, newline="")
    status, printed, reported = write("answer.txt")
    assert (status, reported.splitlines()) == (0, notes)
    story = load_story(tmp_path / printed)
    expected = "A dog." if "Bench" in printed or "story_name" in answer else " ".join(PROMPT.split())
    assert story.shots[0].prompt == expected
    assert story.overview


def test_nothing_is_overwritten(write: Write, tmp_path: Path, server: Server) -> None:
    (tmp_path / "answer.json").write_text(TEXT)
    names = [write("answer.json")[1] for _ in range(2)]
    assert names == ["the_keeper_a_tale.yaml", "the_keeper_a_tale_2.yaml"]
    for idea, *more in (["answer.json"], ["a seal", *server.arguments]):
        status, _, notes = write(idea, f"output={names[0]}", *more)
        assert (status, "exists and is not overwritten: write another name" in notes) == (2, True)
    assert not server.asked
    (tmp_path / "images").mkdir()
    (tmp_path / "images/answer.md").write_text('{"title": "", "overview": "O", "scenes": []}')
    status, _, notes = write("images/answer.md")
    assert status == 2
    assert notes.splitlines()[0] == 'images/answer.md: story: title is empty; expected text; write title: "..."'


def test_words_that_the_toy_does_not_know_are_reported(write: Write, tmp_path: Path) -> None:
    (tmp_path / "answer.json").write_text(TEXT)
    assert "words that toy does not know: watercolour" in write("answer.json", "model=toy")[2]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, {}, b'{"error": {"message": "bad key sk-secret"}}'), "401 Unauthorized (bad key ***): check the key in"),
        ((403, {}, b"x" * 295 + b"sk-secret"), "xx***): check the key in OPENAI_API_KEY"),
        ((404, {}, b"<html>"), "answers 404 Not Found (<html>): check endpoint.url, which mostly ends in /v1"),
        ((429, {}, b'{"error": "slow"}'), "answers 429 Too Many Requests (slow): wait"),
        ((500, {}, b""), "answers 500 Internal Server Error (): the same command asks again"),
        ((302, {"Location": "http://127.0.0.1:9/v1"}, b""), "redirects to http://127.0.0.1:9/v1: write the endpoint"),
        ((200, {}, b"<html>hello"), "is not an OpenAI-compatible endpoint: it answers '<html>hello'"),
        ((200, {}, b"\xff[]"), "is not an OpenAI-compatible endpoint"),
        ((200, {}, b'{"choices": 1' + b"0" * 5000 + b"}"), "is not an OpenAI-compatible endpoint"),
        ((200, {}, b'{"choices": []}'), "is not an OpenAI-compatible endpoint"),
        ((200, {}, '{"choices": [{"message": {"content": "café"}}]}'.encode("latin-1")), "is not an OpenAI-compatible"),
        ((200, {}, b'{"choices": [{"message": {"content": null}}]}'), "gave an empty answer"),
        ((200, {}, b'{"choices": [{"message": {"content": "{"}, "finish_reason": "length"}]}'), "write fewer shots"),
        ((200, {"Content-Length": "9999"}, b"{"), "cannot be asked (peer closed connection"),
        ((200, {}, b" " * (1 << 20) + b"{}"), "more than 1,048,576 bytes"),
    ],
)
def test_replies_that_are_no_answer_are_reported(
    write: Write,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    reply: tuple[int, dict[str, str], bytes],
    message: str,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    server.replies.append(reply)
    status, _, notes = write("a seal", *server.arguments)
    assert status == 2
    assert message in notes
    assert "sk-secret" not in notes
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["endpoint.url=http://127.0.0.1:1/v1", "endpoint.model=m"], "refused): start the server"),
        (["endpoint.url=http://nowhere.invalid/v1", "endpoint.model=m"], "check endpoint.url and the network"),
        (["endpoint.url=ftp://host/v1", "endpoint.model=m"], "url must be like http://localhost:11434/v1"),
        (["endpoint.url=https://me:pw@host/v1", "endpoint.model=m"], "without user and password"),
        (["endpoint.url=http://host/v1"], "model is missing: write endpoint.model=NAME"),
        (["endpoint.key=sk-secret"], "key is the name of an environment variable"),
        (["shots=0"], "shots must be 1 or more"),
        (["output=story.json"], "output=story.json: write the name of a YAML file"),
    ],
)
def test_what_cannot_be_asked_is_reported(write: Write, arguments: list[str], message: str) -> None:
    status, printed, notes = write("a seal", *arguments)
    assert (status, printed) == (2, "")
    assert message in notes
    assert "sk-secret" not in notes


@pytest.mark.parametrize(
    ("variable", "value"),
    [("ALL_PROXY", "socks5://127.0.0.1:9"), ("HTTP_PROXY", "foo://x"), ("SSL_CERT_FILE", "/nonexistent")],
)
def test_variables_that_cannot_be_used_are_named(
    write: Write, server: Server, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    status, _, notes = write("a seal", *server.arguments)
    assert (status, variable in notes) == (2, True)


def test_an_endpoint_that_does_not_answer_is_given_up(write: Write, server: Server) -> None:
    server.shutdown()  # it still accepts connections
    status, _, notes = write("a seal", *server.arguments, "endpoint.timeout=1")
    assert (status, "has not answered in 1 seconds: raise endpoint.timeout" in notes) == (2, True)
    assert "there is no such file" in write("anser.json")[2]
    assert "idea is empty" in write("")[2]
