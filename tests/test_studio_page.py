"""The studio's page in a browser: a film is made and changed, also by the keyboard; every text can be read."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from storymem.film.folder import Film

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LACKS = [name for name in ("gradio", "playwright") if find_spec(name) is None] + ([] if CHROMIUM else ["Chromium"])

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(LACKS), reason=f"needs {', '.join(LACKS)}: pip install storymem[studio] playwright"),
]

STORY = """\
title: Lou on the Beach
overview: Lou on the beach.
characters: [{name: Lou}]
scenes:
  - shots:
      - {prompt: Lou stands still on the beach in bright daylight. Medium shot., characters: [Lou]}
      - {prompt: Lou walks right on the beach in bright daylight. Close-up., characters: [Lou]}
"""

# Every text that is seen, with its contrast to what is behind it (WCAG 2).
CONTRASTS = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = c => [0, 1, 2].map(i => linear(c[i] / 255))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]);
  };
  return [...document.querySelectorAll('body *')].filter(e => e.checkVisibility({visibilityProperty: true}) &&
      getComputedStyle(e).opacity > 0 && !e.closest('svg, video, progress') &&
      [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).map(e => {
    const under = behind(e), [a, b] = [luminance(over(rgba(getComputedStyle(e).color), under)), luminance(under)];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.textContent.trim().slice(0, 60)];
  });
}"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The studio's working directory and address."""
    folder = tmp_path_factory.mktemp("studio")
    (folder / "lou.yaml").write_text(STORY)
    (folder / "secret.txt").write_text("secret")
    (folder / "tmp").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "storymem", "studio", "lou.yaml", "sampler.steps=5", f"port={port}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path[1:]])}
    environment["TMPDIR"] = str(folder / "tmp")
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(url)
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(1)
        yield folder, url
    finally:
        server.terminate()
        assert server.wait(60) in (0, 143), (folder / "log").read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


def opened(browser: Any, url: str, *, width: int = 1280, height: int = 900, scheme: str = "light") -> Any:
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    elsewhere: list[str] = []
    page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else elsewhere.append(r.url))
    page.on("pageerror", lambda error: elsewhere.append(str(error)))
    page.elsewhere = elsewhere
    page.set_default_timeout(60_000)
    page.goto(url)
    page.wait_for_selector(".shot")
    return page


def command_shown(page: Any, words: str) -> str:
    """The command on the page, once it holds ``words``."""
    page.wait_for_function(
        "words => [...document.querySelectorAll('textarea')].some(e => e.value.startsWith('storymem') && "
        "e.value.includes(words))",
        arg=words,
    )
    return page.get_by_label("The same from the command line").input_value()


def made(page: Any) -> None:
    page.wait_for_function("document.querySelector('.status').textContent.includes('Done')", timeout=240_000)


def test_a_film_is_made_changed_and_watched(served: tuple[Path, str], browser: Any) -> None:
    folder, url = served
    page = opened(browser, url)
    assert page.locator(".missing").count() == 2
    page.get_by_role("button", name="Make what is missing").focus()
    page.keyboard.press("Enter")
    assert command_shown(page, "sampler.steps=5").startswith("storymem generate lou.yaml output=films/lou_on_the_beach")
    page.wait_for_selector(".status img[alt^='Preview of shot']", timeout=120_000)
    made(page)
    page.wait_for_function("document.querySelectorAll('.shot video').length === 2")
    page.wait_for_function("[...document.querySelectorAll('video')].every(v => v.readyState > 0)")

    page.get_by_role("button", name="Shot 2", exact=True).press("Enter")
    page.wait_for_selector("#shot-2.picked")
    page.get_by_role("button", name="Make more takes of this shot").click()
    command_shown(page, "shot=2")
    page.wait_for_selector(".status:has-text('shot=2')")
    made(page)
    page.wait_for_function("document.querySelectorAll('.pair video').length === 2")
    page.get_by_label("Take", exact=True).click()
    page.get_by_role("option", name="take 1").click()
    page.get_by_role("button", name="Show this take").click()
    command_shown(page, "take=1")
    film = Film.open(folder / "films" / "lou_on_the_beach")
    assert (film.slots[1].take, len(film.takes)) == (1, 3)

    page.get_by_role("tab", name="Memory").click()
    Image.new("RGB", (300, 100), "red").save(folder / "a hat.png")
    page.get_by_label("Who a new image shows").click()
    page.get_by_role("option", name="Lou", exact=True).click()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add an image").click()
    chooser.value.set_files(folder / "a hat.png")
    command_shown(page, "keyframes/ref_lou_1.png for=Lou")
    page.wait_for_selector(".keyframe img[src*='ref_lou_1.png']")
    page.get_by_label("Keyframe", exact=True).click()
    page.get_by_role("option", name="ref_lou_1").click()
    page.get_by_role("button", name="Pin", exact=True).click()
    page.wait_for_selector(".keyframe:has-text('ref_lou_1'):has-text('pinned')")
    page.screenshot(path=folder / "memory.png", full_page=True)
    page.get_by_role("button", name="Drop").click()
    command_shown(page, "drop ref_lou_1")
    page.wait_for_selector(".memory .kept")
    assert list((folder / "tmp").rglob("a hat.png")) == []  # only the film has it
    (folder / "no.png").write_text("no image")
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add an image").click()
    chooser.value.set_files(folder / "no.png")
    page.wait_for_selector("#notice:has-text('cannot be read as an image')")

    page.get_by_role("tab", name="Edit").click()
    page.get_by_label("Prompt", exact=True).fill("Lou jumps on the moon at night. Wide shot.")
    page.get_by_role("button", name="Save the shot").click()
    command_shown(page, "lou_edited.yaml")
    page.wait_for_selector("#shot-2 .missing")
    assert (folder / "lou.yaml").read_text() == STORY
    page.get_by_role("button", name="Make what is missing").click()
    page.wait_for_selector(".status:has-text('lou_edited.yaml')")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_function("document.querySelector('.status').textContent.includes('Stopped')", timeout=120_000)
    assert len(Film.open(film.folder).takes) == 3
    assert page.elsewhere == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_the_page_is_legible(
    width: int, height: int, scheme: str, served: tuple[Path, str], browser: Any, tmp_path: Path
) -> None:
    page = opened(browser, served[1], width=width, height=height, scheme=scheme)
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    for tab in ("Takes", "Edit", "Memory", "Stories"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(600)
        page.screenshot(path=tmp_path / f"{tab}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        weak = [found for found in page.evaluate(CONTRASTS) if found[0] < 4.5]
        assert weak == [], tab
        if width > 1000:  # the actions stay in sight, whole, wherever the storyboard is scrolled to
            page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
            assert page.get_by_label("Shot", exact=True).evaluate("e => e.closest('.block').clientHeight") > 60
            assert abs(page.get_by_role("button", name="Make what is missing").bounding_box()["y"]) < height / 2
    unnamed = page.evaluate(
        "[...document.querySelectorAll('img, video')].filter(e => !(e.alt || e.ariaLabel)).map(e => e.outerHTML)"
    )
    assert unnamed == []
    assert page.elsewhere == []
    page.close()


def test_files_outside_the_film_are_not_served(served: tuple[Path, str]) -> None:
    folder, url = served
    film = folder / "films" / "lou_on_the_beach"
    assert urllib.request.urlopen(f"{url}gradio_api/file={film / 'film.json'}").status == 200
    for path in (folder / "secret.txt", film / ".." / ".." / "secret.txt", Path("/etc/passwd")):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{url}gradio_api/file={path}")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{url}gradio_api/file=https://example.com/")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{url}gradio_api/runs")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(urllib.request.Request(url, headers={"Origin": "http://evil.example"}))


def test_a_file_that_was_not_uploaded_is_no_image(served: tuple[Path, str]) -> None:
    folder, url = served
    config = json.load(urllib.request.urlopen(f"{url}config"))
    button = next(one["id"] for one in config["components"] if one["type"] == "uploadbutton")
    event = next(one for one in config["dependencies"] if button in one["inputs"])
    file = {"path": str(folder / "secret.txt"), "meta": {"_type": "gradio.FileData"}}
    data = [file if id == button else None for id in event["inputs"]]
    body = json.dumps({"data": data, "fn_index": event["id"], "session_hash": "test"}).encode()
    join = urllib.request.Request(f"{url}gradio_api/queue/join", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(join)
    answer = urllib.request.urlopen(f"{url}gradio_api/queue/data?session_hash=test", timeout=60).read().decode()
    assert "was not uploaded" in answer
