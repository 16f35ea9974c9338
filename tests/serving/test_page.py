"""The page in a real Chromium, over a real server of sd3-mini: clicked, typed, looked at."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving_server import Server

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGE = Path(__file__).parents[2] / "serving" / "page" / "index.html"
KEY = "a secret"
TIMEOUT_MS = 60_000
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: chromium, chromium-browser, google-chrome"),
]


@pytest.fixture(scope="module")
def server(serve: Callable[..., Any]) -> Iterator[Server]:
    with serve(max_prompt_chars=200) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def one_page(browser: Any, server: Server) -> Iterator[Any]:
    """For tests that need no context of their own, which takes longer than they do."""
    with browser.new_context() as context:
        context.set_default_timeout(TIMEOUT_MS)
        yield context.new_page()


@pytest.fixture
def again(one_page: Any, server: Server) -> Iterator[Any]:
    """The page, loaded anew; what its scripts complain of fails the test."""
    wrong: list[str] = []

    def complain(error: object) -> None:
        wrong.append(str(error))

    one_page.on("pageerror", complain)
    one_page.goto(server.url)
    one_page.wait_for_selector("#size option", state="attached")
    yield one_page
    one_page.unroute_all()
    one_page.remove_listener("pageerror", complain)
    assert wrong == []


@pytest.fixture
def opened(browser: Any, server: Server) -> Iterator[Callable[..., Any]]:
    """Opens the page, in a context of its own; what its scripts complain of fails the test."""
    contexts, wrong = [], []

    def open_page(at: str = server.url, *, ready: bool = True, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(TIMEOUT_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(at)
        if ready:
            page.wait_for_selector("#size option", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def fill(page: Any, prompt: str = "a blue star", steps: int = 2, speed: str = "preset:paper") -> None:
    page.fill("#prompt", prompt)
    page.select_option("#speed", speed)
    page.fill("#steps", str(steps))


def picture(page: Any, place: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The pixels of a picture on the page."""
    uri = page.get_attribute(f"{place} img", "src")
    assert uri.startswith("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGB"), np.float64)


def said(page: Any) -> str:
    """The error that the page shows, once it does."""
    page.wait_for_selector("#error:not(:empty)")
    return str(page.inner_text("#error"))


def test_full_and_pruned_side_by_side(opened: Callable[..., Any]) -> None:
    page, asked, statuses = opened(), [], "window.statuses = []; new MutationObserver(() => "
    statuses += "window.statuses.push(document.querySelector('#status').textContent)).observe("
    statuses += "document.querySelector('#status'), {childList: true, characterData: true, subtree: true})"
    page.evaluate(statuses)
    page.on("request", lambda request: asked.append(json.loads(request.post_data or "{}")))
    fill(page, steps=12)
    page.click("#paint")
    page.wait_for_selector("#status.verdict")

    assert [{name: body.get(name) for name in ("preset", "speedup")} for body in asked] == [
        {"preset": "paper", "speedup": None},
        {"preset": None, "speedup": 1},
    ]
    assert asked[0]["seed"] == asked[1]["seed"]
    for title in ("Preset paper", "Full run"):  # each step by step, in turn
        steps = [f"{title}: step {step} of 12" for step in (3, 6, 9)]
        assert [status for status in page.evaluate("window.statuses") if status in steps] == steps

    fast, full = picture(page, "#fast"), picture(page, "#full")
    assert fast.shape == full.shape == (128, 128, 3)
    decibels = 10 * math.log10(255**2 / np.mean((fast - full) ** 2))
    assert page.inner_text("#psnr").startswith(f"{decibels:.1f} dB")
    assert re.match(r"\d+\.\d\d×\n\d.* instead of \d", page.inner_text("#speedup"))
    assert "8 full, 4 pruned" in page.inner_text("#fast figcaption")
    assert "12 full steps" in page.inner_text("#full figcaption")
    assert len(np.unique(picture(page, "#map"))) > 1  # tokens were computed on 8 to 12 steps
    assert page.is_hidden("#stop")


def test_a_seed_is_painted_again(opened: Callable[..., Any]) -> None:
    page = opened()
    fill(page, steps=6, speed=page.input_value("#speed"))  # the schedule of the bundle, which the page offers first
    page.uncheck("#compare")
    page.click("#paint")
    page.wait_for_selector("#status.verdict")
    first = picture(page, "#fast")
    assert page.inner_text("#fast h2").startswith("Tuned 2×")
    assert page.is_hidden("#full")
    assert page.is_hidden("#map .frame")  # every step computed all tokens or none
    page.click("#status button")
    page.click("#paint")
    page.wait_for_selector("#status:not(.verdict)")
    page.wait_for_selector("#status.verdict")
    assert np.array_equal(picture(page, "#fast"), first)


def test_by_keyboard_alone(opened: Callable[..., Any], server: Server) -> None:
    page = opened()
    keyboard = page.keyboard  # the prompt has the focus
    keyboard.press("Control+A")
    keyboard.type("a red circle")
    keyboard.press("Tab")
    keyboard.type("Preset")
    for _ in range(2):  # the size, the steps
        keyboard.press("Tab")
    keyboard.press("Control+A")
    keyboard.type("100")
    keyboard.press("Tab")
    keyboard.press("Space")
    assert not page.is_checked("#compare")
    page.focus("#prompt")
    keyboard.press("Control+Enter")
    page.wait_for_selector("#fast progress")
    assert page.evaluate("document.activeElement.id") == "prompt"
    keyboard.press("Escape")
    page.wait_for_selector("#status:has-text('stopped.')")
    ends = time.monotonic() + 20
    while server.service.num_orders and time.monotonic() < ends:
        time.sleep(0.02)
    assert server.service.num_orders == 0  # the server has let go of it, too
    assert page.is_hidden("#stop")
    fill(page, steps=2, speed="full:")
    keyboard.press("Enter")  # in the field of the steps
    page.wait_for_selector("#status.verdict")


def test_the_servers_words(opened: Callable[..., Any]) -> None:
    page = opened()
    fill(page, prompt="x" * 201)
    page.click("#paint")
    assert said(page) == "prompt has 201 characters, more than 200"
    fill(page)
    page.click("#paint")  # the next picture is painted
    page.wait_for_selector("#status.verdict")
    assert page.inner_text("#error") == ""


EVENTS = {"content_type": "text/event-stream", "status": 200}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "The server cannot be reached. Is it running?"),
        (
            {"status": 429, "headers": {"Retry-After": "7"}, "json": {"error": {"message": "The queue is full."}}},
            "The queue is full. Try again in 7 s.",
        ),
        ({"status": 502, "body": "<html>"}, "The server answered 502 Bad Gateway"),
        (
            EVENTS | {"body": 'event: error\r\ndata: {"error": {"message": "the engine failed"}}\r\n\r\n'},
            "the engine failed",
        ),
        (EVENTS | {"body": ": silence\n\n"}, "The server ended the connection before the picture was done."),
        (EVENTS | {"body": "data: {\n\n"}, "The connection was lost before the picture was done."),
    ],
)
def test_what_goes_wrong_is_told(again: Any, answer: dict[str, Any] | None, words: str) -> None:
    page = again
    page.route("**/generations", lambda route: route.abort() if answer is None else route.fulfill(**answer))
    page.click("#paint")
    assert said(page) == words
    assert page.inner_text("#fast .frame") == "failed"
    assert page.is_hidden("#stop")
    assert page.get_attribute("#paint", "aria-disabled") is None


def test_a_server_with_a_key(opened: Callable[..., Any], serve: Callable[..., Any]) -> None:
    with serve(api_key=KEY) as other:
        page = opened(other.url, ready=False)
        assert "the API key is missing" in said(page)
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type(KEY)
        page.keyboard.press("Tab")
        page.wait_for_selector("#size option", state="attached")
        assert page.inner_text("#error") == ""
        page.reload()  # it is kept
        page.wait_for_selector("#size option", state="attached")


LUMINANCE = """(colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}"""


def contrast(page: Any, text: str, ground: str) -> float:
    """WCAG's contrast of a text's colour with the colour of what is below it."""
    colours = [
        page.eval_on_selector(place, f"(e) => ({LUMINANCE})(getComputedStyle(e).{kind})")
        for place, kind in ((text, "color"), (ground, "backgroundColor"))
    ]
    return (max(colours) + 0.05) / (min(colours) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrasts(opened: Callable[..., Any], scheme: str) -> None:
    page = opened(color_scheme=scheme)
    ground = page.evaluate(f"({LUMINANCE})(getComputedStyle(document.body).backgroundColor)")
    assert ground > 0.8 if scheme == "light" else ground < 0.05
    page.eval_on_selector("#error", "(e) => e.textContent = 'wrong'")
    pairs = [("body", "body"), ("label", "form"), (".hint", "form"), ("#prompt", "#prompt"), ("#paint", "#paint")]
    pairs += [("#status", "#results"), ("#error", "#error"), ("header a", "body"), ("header p", "body")]
    assert {pair: value for pair in pairs if (value := contrast(page, *pair)) < 4.5} == {}


@pytest.mark.parametrize("width", [320, 820])
def test_narrow_screens(opened: Callable[..., Any], width: int) -> None:
    """Nothing is wider than the screen, down to the 320 pixels of WCAG's reflow; what is touched is large enough."""
    page = opened(viewport={"width": width, "height": 700}, has_touch=True, is_mobile=width < 800)
    fill(page)
    page.tap("#paint")
    page.wait_for_selector("#status.verdict")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    heights = page.eval_on_selector_all("#paint, select, input[type=number]", "(all) => all.map((e) => e.offsetHeight)")
    assert min(height for height in heights if height) >= 40


def test_reduced_motion(opened: Callable[..., Any]) -> None:
    def moves(**options: Any) -> tuple[str, str]:
        page = opened(**options)
        page.eval_on_selector("#fast img", "(e) => { e.hidden = false; e.className = 'preview'; }")
        name = page.eval_on_selector("#fast img", "(e) => getComputedStyle(e).animationName")
        return name, page.evaluate("matchMedia('(prefers-reduced-motion: reduce)').matches")

    assert moves() == ("appear", False)
    assert moves(reduced_motion="reduce") == ("none", True)


def test_everything_has_a_name(opened: Callable[..., Any]) -> None:
    """What a screen reader calls each field and picture."""
    page = opened()
    nameless = "(all) => all.filter((e) => !e.labels.length || !e.labels[0].textContent.trim()).map((e) => e.id)"
    assert page.eval_on_selector_all("input, select, textarea", nameless) == []
    fill(page)
    page.click("#paint")
    page.wait_for_selector("#status.verdict")
    assert page.get_attribute("#fast img", "alt") == "a blue star"
    assert page.eval_on_selector_all("img", "(all) => all.filter((e) => !e.alt).length") == 0


def test_nothing_is_loaded_from_elsewhere(opened: Callable[..., Any], server: Server) -> None:
    page, asked = opened(), []
    page.context.on("request", lambda request: asked.append(request.url))
    page.reload()
    page.wait_for_selector("#size option", state="attached")
    assert {url for url in asked if not url.startswith("data:")} == {f"{server.url}/", f"{server.url}/v1/models"}
    assert page.evaluate("fetch('https://example.org').then(() => 'sent', () => 'refused')") == "refused"
    source = PAGE.read_text()
    assert "default-src 'none'" in source
    assert re.findall(r"""(?:src|href)=["'](?!data:|docs)[^"']*""", source) == []
