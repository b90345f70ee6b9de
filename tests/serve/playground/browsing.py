"""Headless Chromium, driven by Playwright, and what the tests do with a page."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Route, sync_playwright

from tests.serve.running import KEY

IMAGE = "sfumato-tiny-image"
SIZES = {"phone": (390, 844), "desk": (1440, 900)}
_NAMES = ("chromium", "chromium-browser", "google-chrome")
# A machine that is busy with other tests takes its time.
WAIT_SECONDS = 30.0


def find_browser() -> str | None:
    """Return the executable of a browser that Playwright can drive."""
    return next((path for path in map(shutil.which, _NAMES) if path), None)


@contextmanager
def browsing(executable: str) -> Iterator[Browser]:
    """Run a browser; as root it has no sandbox."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """One browser context at a server's page; what the page complains of is kept."""

    def __init__(self, browser: Browser, url: str, *, key: str | None = KEY, **options: Any) -> None:
        width, height = SIZES[options.pop("size", "desk")]
        self.url = url
        self.context = browser.new_context(viewport={"width": width, "height": height}, **options)
        self.context.set_default_timeout(WAIT_SECONDS * 1000)
        if key is not None:
            self.context.add_init_script(f"sessionStorage.setItem('sfumato-key', {json.dumps(key)})")
        self.complaints: list[str] = []
        self.page = self.open()

    def open(self) -> Page:
        """Return another page of the same context."""
        page = self.context.new_page()
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        return page

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def go(self, tab: str) -> Locator:
        """Go to a tab and return it."""
        self.page.goto(f"{self.url}/#{tab}")
        found = self.page.locator(f"[data-tab={tab}]")
        found.wait_for()
        return found

    def close(self) -> None:
        """End the context."""
        self.context.close()


def until(condition: Callable[[], Any], *, seconds: float = WAIT_SECONDS) -> Any:
    """Return what a condition gives once it holds; the page's policy lets nobody evaluate there for long."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.03)
    return found


def ask(tab: Locator, question: str) -> None:
    """Send a question."""
    tab.locator("textarea[name=question]").fill(question)
    tab.locator("textarea[name=question]").press("Enter")


def set_pace(tab: Locator, pace: str) -> None:
    """Choose how fast the canvas is shown."""
    tab.locator("select[name=pace]").select_option(label=pace)


def finished(answer: Locator) -> Locator:
    """Wait until an answer has ended and its canvas stands at its last step."""
    until(lambda: answer.get_attribute("aria-busy") == "false")
    figure = answer.locator(".canvas-figure")
    until(lambda: figure.get_attribute("data-step") == figure.get_attribute("data-steps"))
    return answer


def cell_texts(answer: Locator) -> list[str]:
    """Return the text of every cell."""
    return answer.locator(".cell").all_text_contents()


def scrub(answer: Locator, step: int) -> None:
    """Move the scrubber to a step and wait until the canvas shows it."""
    answer.locator("input[type=range]").fill(str(step))
    figure = answer.locator(".canvas-figure")
    until(lambda: figure.get_attribute("data-step") == str(step))


def scripted(page: Page, path: str, chunks: list[dict[str, Any]]) -> None:
    """Let a path answer with these events instead of a model."""
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]

    def answer(route: Route) -> None:
        route.fulfill(body="".join([*lines, "data: [DONE]\n\n"]), content_type="text/event-stream")

    page.route(f"**{path}", answer)


def text_chunk(text: str, canvas: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """Return a chunk of a chat's stream."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    shown = {} if canvas is None else {"canvas": canvas}
    return {"id": "chatcmpl-1", "seed": 1, "choices": [{**choice, **shown}], **fields}


def pixels(picture: Locator) -> bytes:
    """Return what a picture shows."""
    url = picture.locator("img").evaluate(
        """async (image) => {
            await image.decode();
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            canvas.getContext("2d").drawImage(image, 0, 0);
            return canvas.toDataURL("image/png");
        }"""
    )
    return base64.b64decode(url.split(",", 1)[1])
