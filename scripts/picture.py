"""Take the README's pictures from the page: `python scripts/picture.py` writes them to docs/images.

playground-light.png and -dark.png: two settings side by side in the middle of their answers. denoise.webp: a
canvas from its first step to its last.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.serve.playground.browsing import (  # noqa: E402
    Visit,
    ask,
    browsing,
    find_browser,
    finished,
    scrub,
    set_pace,
)
from tests.serve.running import LLADA, serving  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator

QUESTION = "Tom has 12 apples and buys 7 more. He gives away 4. How many are left?"
TARGET = ROOT / "docs" / "images"
STEP_MILLISECONDS, LAST_MILLISECONDS = 130, 2200
# No confidence reaches this threshold, so that every step decides one token.
ONE_BY_ONE = 2
# Steps at which both canvases are half done.
SLOW_STEP, FAST_STEP = 13, 4


def still(browser: Browser, url: str, scheme: str) -> None:
    """Save the text tab with two settings, each between two steps."""
    visit = Visit(browser, url, color_scheme=scheme, reduced_motion="reduce", device_scale_factor=1.5)
    visit.page.set_viewport_size({"width": 1280, "height": 660})
    tab = visit.go("text")
    tab.locator("select[name=model]").select_option(LLADA)
    tab.locator("input[name=compare]").check()
    set_pace(tab, "as it comes")
    decide(tab.locator("[data-settings=A]"), "low_confidence", threshold=ONE_BY_ONE)
    decide(tab.locator("[data-settings=B]"), "llada", steps=16)
    ask(tab, QUESTION)
    first, second = (finished(tab.locator(f"[data-answer={name}]")) for name in "AB")
    scrub(first, SLOW_STEP)
    scrub(second, FAST_STEP)
    visit.page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    tab.locator(".panel").evaluate("(panel) => panel.scrollTo(0, 0)")
    visit.page.screenshot(path=TARGET / f"playground-{scheme}.png")
    visit.close()


def decide(settings: Locator, algorithm: str, **parameters: float) -> None:
    """Choose an algorithm and its parameters."""
    settings.locator("select[name=algorithm]").select_option(algorithm)
    for name, value in parameters.items():
        settings.locator(f"input[name={name}]").fill(str(value))


def animation(browser: Browser, url: str) -> None:
    """Save a canvas after each of its steps."""
    visit = Visit(browser, url, color_scheme="light", reduced_motion="reduce", device_scale_factor=1.5)
    visit.page.set_viewport_size({"width": 1180, "height": 800})
    tab = visit.go("text")
    tab.locator("select[name=model]").select_option(LLADA)
    set_pace(tab, "as it comes")
    decide(tab, "low_confidence", threshold=ONE_BY_ONE)
    ask(tab, QUESTION)
    figure = finished(tab.locator("[data-answer]")).locator(".canvas-figure")
    frames = []
    for step in range(int(figure.get_attribute("data-steps") or 0) + 1):
        scrub(tab, step)
        visit.page.evaluate("document.activeElement.blur()")
        frames.append(Image.open(io.BytesIO(figure.screenshot())).convert("RGB"))
    visit.close()
    # Before the first step nothing is there, and the picture would jump.
    frames = [frame for frame in frames if frame.size == frames[-1].size]
    times = [STEP_MILLISECONDS] * (len(frames) - 1) + [LAST_MILLISECONDS]
    frames[0].save(
        TARGET / "denoise.webp",
        save_all=True,
        append_images=frames[1:],
        duration=times,
        loop=0,
        quality=82,
        method=6,
    )


def main() -> None:
    """Serve, visit, save."""
    executable = find_browser()
    if executable is None:
        raise SystemExit("no Chromium here: scripts/browser installs it")
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), "--dtype", "float32") as server,
        browsing(executable) as browser,
    ):
        for scheme in ("light", "dark"):
            still(browser, server.url, scheme)
        animation(browser, server.url)


if __name__ == "__main__":
    main()
