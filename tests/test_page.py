"""The server's page in a browser: it draws, codes, copies, works on a phone and by keyboard, and asks no other host."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
api = pytest.importorskip("playwright.sync_api")
from serving import SETTINGS, Running  # noqa: E402

from dvq_rt import Generator, SamplingParams, load_codes  # noqa: E402

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}: apt-get install chromium")
PICTURE = Path(__file__).parents[1] / "docs" / "grain.png"
DONE = re.compile(r" in [0-9.]+ s\.$")


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    running = Running(SETTINGS)
    yield running
    running.end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, running: Running) -> Iterator[Any]:
    """The page on a phone; fails if it complains or asks another host for anything."""
    context = browser.new_context(viewport={"width": 360, "height": 740}, accept_downloads=True)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.set_default_timeout(60_000)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.extend([] if running.url in request.url else [request.url]))
    page.goto(running.url)
    page.locator("#label option").first.wait_for(state="attached")
    yield page
    context.close()
    expected = ("blob:", "Failed to load resource: the server responded with")  # the tests of errors make these
    assert not [words for words in complaints if not words.startswith(expected)]


def test_drawing(page: Any, tmp_path: Path) -> None:
    """Two images appear; what is downloaded is ``sample``'s, and so is what the copied Python draws."""
    page.select_option("#label", label="hearts")
    page.fill("#n", "2")
    page.fill("#seed", "7")
    page.check("#grain")
    page.click("#draw")
    page.locator("#status", has_text=DONE).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    expected = Generator("demo:dq", slots=4, threads=1).sample(2, "hearts", seed=7)
    for name, button in (("1.png", "Download image 1 as PNG"), ("1.json", "Download the codes of image 1")):
        with page.expect_download() as download:
            page.get_by_role("button", name=button).click()
        download.value.save_as(tmp_path / name)
    assert (np.asarray(Image.open(tmp_path / "1.png")) == np.asarray(expected[1])).all()
    assert load_codes(tmp_path / "1.json") == [expected.codes[1]]
    page.click("#copy")
    page.get_by_text("Copied").wait_for()
    code = page.evaluate("navigator.clipboard.readText()")
    call = re.search(r"generator\.sample\((.*)\)\n", code)
    assert 'dvq_rt.Generator("dq")' in code and call is not None
    given = eval(f"dict({call[1]})", {"dvq_rt": __import__("dvq_rt")})
    assert given == {"n": 2, "labels": "hearts", "seed": 7, "params": expected.params}
    assert isinstance(given["params"], SamplingParams)


def test_coding_by_keyboard(page: Any) -> None:
    """The arrow keys choose the tab; a photo shows its codes; a lower rate takes fewer; errors are told."""
    page.focus("#tab-draw")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("#tab-encode", "aria-selected") == "true" and page.locator("#panel-draw").is_hidden()
    page.set_input_files("#photo", PICTURE)
    figures = page.locator("#coded dd")
    figures.first.wait_for()
    own = int(figures.first.inner_text())
    page.uncheck("#own")
    page.focus("#rate")
    page.keyboard.press("Home")
    page.locator("#coded dd", has_text=re.compile("^64$")).wait_for()
    assert own > 64 and page.locator("#coded canvas").count() == 3
    page.set_input_files("#photo", {"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.locator("#status.bad", has_text="the image is damaged or of another format").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_redrawing(page: Any) -> None:
    """What is painted goes out as a mask that is clear there, and is drawn anew, coarse to fine, with label and seed
    of this tab and not of the other."""
    sent: list[bytes] = []

    def pass_on(route: Any) -> None:
        sent.append(route.request.post_data_buffer)
        route.continue_()

    page.route("**/v1/images/edits", pass_on)
    page.click("#tab-edit")
    page.set_input_files("#edit-photo", PICTURE)
    page.locator("canvas.paint").click()
    page.select_option("#edit-label", label="clocks")
    page.fill("#edit-seed", "11")
    page.fill("#edit-n", "2")
    page.click("#redraw")
    page.locator("#status", has_text=DONE).wait_for()
    assert page.locator("#edited figcaption", has_text="bit/px").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert b'name="mask"; filename="mask.png"' in sent[0] and b'name="image"; filename="image.png"' in sent[0]
    label = Generator("demo:dq").class_names.index("clocks")
    for name, value in {"label": label, "seed": 11, "n": 2, "stream": "true"}.items():
        assert f'name="{name}"\r\n\r\n{value}\r\n'.encode() in sent[0]


def test_controls_follow_the_model(page: Any, running: Running) -> None:
    """A model that reads prompts has a field for them where one draws and where one redraws, and none for labels that
    it does not have."""

    def other(route: Any) -> None:
        answer = route.fetch()
        model = {**answer.json()["data"][0], "labels": [], "prompts": True}
        route.fulfill(response=answer, json={"object": "list", "data": [model]})

    page.route("**/v1/models", other)
    page.reload()
    page.locator("#prompt-field").wait_for()
    assert page.locator("#label-field").is_hidden()
    page.click("#tab-edit")
    assert page.locator("#edit-prompt").is_visible() and page.locator("#edit-label-field").is_hidden()
