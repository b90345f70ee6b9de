"""How the page looks: every tab at 390 and 1440 pixels, light and dark. SFUMATO_SCREENSHOTS names a folder
that keeps the pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.serve.running import LLADA, SDAR, Server

pytest.importorskip("playwright", reason="Playwright is not installed")

from tests.serve.playground.browsing import SIZES, ask, finished, scrub, until

if TYPE_CHECKING:
    from tests.serve.playground.browsing import Visit
    from tests.serve.playground.conftest import Visiting

LOOKS = [(size, scheme) for size in SIZES for scheme in ("light", "dark")]
# Text of our own colours must stand out from the paper as WCAG's level AA asks.
_CONTRAST = """() => {
    const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const light = (color) => {
        paint.fillStyle = color;
        paint.fillRect(0, 0, 1, 1);
        const parts = [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => {
            const share = part / 255;
            return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
    };
    const paper = light(getComputedStyle(document.body).backgroundColor);
    const shown = ["body", ".hint", "legend", "summary", "nav a"].map((name) => document.querySelector(name));
    return shown.filter(Boolean).map((element) => {
        const ink = light(getComputedStyle(element).color);
        return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    });
}"""


def prepare(visit: Visit, tab: str, server: Server) -> None:
    """Bring a tab into a state that is worth a picture."""
    found = visit.go(tab)
    if tab == "text":
        ask(found, "Tom has 12 apples and buys 7 more. He gives away 4. How many are left?")
        answer = finished(found.locator("[data-answer]"))
        scrub(answer, 2)
    elif tab == "infill":
        found.get_by_role("button", name="Fill the gaps").click()
        finished(found.locator("[data-answer]"))
    elif tab == "images":
        for prompt in ("a blue ring", "a red circle above a green square"):
            found.locator("textarea[name=prompt]").fill(prompt)
            found.get_by_role("button", name="Draw", exact=True).click()
        until(lambda: found.locator("[data-status=done]").count() == 2)
    else:
        loop = found.locator(f"[data-model={SDAR}]")
        until(lambda: loop.locator("[data-figure=running]").text_content() == "0")
        for model in (SDAR, LLADA):
            body = {"model": model, "prompt": "12+7=", "max_tokens": 48, "n": 3, "temperature": 1.0}
            server.http.post("/v1/completions", json=body)
        until(lambda: loop.locator("rect.row-denoise").count() > 0)


@pytest.mark.parametrize(("size", "scheme"), LOOKS)
def test_every_tab_fits_and_can_be_read(
    visiting: Visiting, embedded: Server, size: str, scheme: str, tmp_path: Path
) -> None:
    visit = visiting(size=size, color_scheme=scheme)
    folder = Path(os.environ.get("SFUMATO_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    for tab in ("text", "infill", "images", "engine"):
        prepare(visit, tab, embedded)
        width = visit.page.evaluate("document.documentElement.scrollWidth")
        assert width <= SIZES[size][0], tab
        visit.page.evaluate("scrollTo(0, 0)")
        name = f"{tab}-{SIZES[size][0]}-{scheme}.png"
        visit.page.screenshot(path=folder / name, full_page=size == "phone")
    assert min(visit.page.evaluate(_CONTRAST)) >= 4.5


def test_a_theme_can_be_chosen(visiting: Visiting) -> None:
    visit = visiting(color_scheme="light")
    visit.go("text")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = visit.page.evaluate(paper)
    button = visit.page.locator("[data-choice]")
    for choice in ("light", "dark"):
        button.click()
        until(lambda choice=choice: button.get_attribute("data-choice") == choice)
    assert visit.page.evaluate(paper) != light
    visit.page.reload()
    visit.page.locator("[data-tab=text]").wait_for()
    assert visit.page.locator("[data-choice]").get_attribute("data-choice") == "dark"
    assert visit.page.evaluate(paper) != light
