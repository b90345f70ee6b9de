"""Infill, images, the engine view and the key on the page."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.serve.running import KEY, LLADA, SDAR, Server

pytest.importorskip("playwright", reason="Playwright is not installed")

from tests.serve.playground.browsing import (
    IMAGE,
    ask,
    cell_texts,
    finished,
    pixels,
    scrub,
    until,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.serve.playground.browsing import Visit
    from tests.serve.playground.conftest import Visiting

HOSTILE = "<script>window.hurt = 1</script>"


def test_infill_keeps_what_is_given(visit: Visit) -> None:
    tab = visit.go("infill")
    tab.locator("input[name=threshold]").fill("2")
    tab.get_by_role("button", name="a sorted list").click()
    tab.get_by_role("button", name="Fill the gaps").click()
    answer = finished(tab.locator("[data-answer=infill]"))
    assert answer.locator(".answer-text").text_content().startswith("apple")
    assert answer.locator(".lengths button").count() == 4
    assert answer.locator(".lengths .chosen").get_attribute("aria-pressed") == "true"
    given = answer.locator(".cell.pinned").all_text_contents()
    assert given[0] == "apple"
    total = int(answer.locator(".canvas-figure").get_attribute("data-steps"))
    for step in range(total + 1):
        scrub(answer, step)
        assert answer.locator(".cell.pinned").all_text_contents() == given
        assert answer.locator(".cell.open").count() == total - step
    answer.locator(".lengths button").last.click()
    until(lambda: len(cell_texts(finished(answer))) == len(given) + 4)


def test_gaps_are_inserted_where_the_cursor_is(visit: Visit) -> None:
    tab = visit.go("infill")
    text = tab.locator("textarea[name=infill-text]")
    text.fill(f"{HOSTILE} tail")
    text.evaluate(f"(area) => area.setSelectionRange({len(HOSTILE)}, {len(HOSTILE)})")
    tab.get_by_role("button", name="Insert a gap").click()
    assert text.input_value() == f"{HOSTILE}[[2-4]] tail"
    assert tab.get_by_text("1 gap, 3 combinations").count() == 1
    tab.locator("input[name=infill-question]").fill("")
    tab.get_by_role("button", name="Fill the gaps").click()
    answer = finished(tab.locator("[data-answer=infill]"))
    assert answer.locator(".answer-text").text_content().startswith(HOSTILE)
    assert visit.page.evaluate("window.hurt") is None


def test_the_page_says_why_a_model_cannot_fill_gaps(visit: Visit) -> None:
    tab = visit.go("infill")
    assert tab.locator("select[name=model]").input_value() == LLADA
    tab.locator("select[name=model]").select_option(SDAR)
    assert "block_causal" in tab.locator(".notice").text_content()
    assert tab.get_by_role("button", name="Fill the gaps").is_disabled()


def test_pictures_denoise_side_by_side_and_are_cancelled(visit: Visit, embedded: Server) -> None:
    tab = visit.go("images")
    tab.locator("input[name=num_inference_steps]").fill("12")
    tab.locator("input[name=seed]").fill("7")
    draw = tab.get_by_role("button", name="Draw", exact=True)
    draw.click()
    tab.locator("input[name=num_inference_steps]").fill("1000")
    draw.click()
    # The newest stands first.
    long, short = tab.locator(".picture").nth(0), tab.locator(".picture").nth(1)
    until(lambda: int(long.get_attribute("data-previews")) > 0)
    until(lambda: short.get_attribute("data-status") == "done")
    assert int(short.get_attribute("data-previews")) > 2
    assert int(long.locator("progress").get_attribute("value")) < 1000
    long.get_by_role("button", name="Cancel").click()
    until(lambda: long.get_attribute("data-status") == "cancelled")
    assert embedded.wait_for("sfumato_running_requests", IMAGE, 0)
    assert "seed 7" in short.text_content()


def test_a_picture_is_repeated_from_its_metadata(visit: Visit, embedded: Server, tmp_path: Path) -> None:
    tab = visit.go("images")
    tab.locator("textarea[name=prompt]").fill("a blue ring")
    tab.locator("select[name=scheduler]").select_option("FlowMatchHeunDiscreteScheduler")
    tab.locator("input[name=guidance_scale]").fill("2.5")
    tab.locator("input[name=num_inference_steps]").fill("6")
    # More digits than a number of JavaScript has.
    tab.locator("input[name=seed]").fill("9007199254740993")
    tab.get_by_role("button", name="Draw", exact=True).click()
    first = tab.locator(".picture").last
    until(lambda: first.get_attribute("data-status") == "done")
    with visit.page.expect_download() as download:
        first.get_by_role("link", name="Save").click()
    download.value.save_as(tmp_path / "ring.png")
    tab.locator("textarea[name=prompt]").fill("something else")
    tab.locator("input[name=seed]").fill("1")
    # One after the other: who else is drawn may change the last bits.
    for count, repeat in enumerate(
        (
            lambda: first.get_by_role("button", name="Repeat").click(),
            lambda: tab.locator("input[type=file]").set_input_files(tmp_path / "ring.png"),
        ),
        start=2,
    ):
        repeat()
        until(lambda count=count: tab.locator(".picture").count() == count)
        again = tab.locator(".picture").first
        until(lambda again=again: again.get_attribute("data-status") == "done")
        assert "a blue ring" in again.text_content()
        assert "9007199254740993" in again.text_content()
        assert pixels(again) == pixels(first)
    first.get_by_role("button", name="Use settings").click()
    assert tab.locator("textarea[name=prompt]").input_value() == "a blue ring"
    assert tab.locator("input[name=seed]").input_value() == "9007199254740993"
    assert tab.locator("select[name=scheduler]").input_value() == "FlowMatchHeunDiscreteScheduler"


def test_files_that_carry_no_request_are_said_to(visit: Visit, tmp_path: Path) -> None:
    tab = visit.go("images")
    stranger = tmp_path / "<b>stranger.png"
    text = b"sfumato\0{not json"
    chunk = len(text).to_bytes(4, "big") + b"tEXt" + text + bytes(4)
    for content, problem in ((b"", "no request"), (chunk, "JSON"), (b"\xff\xff\xff\xfftEXt", "no request")):
        stranger.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
        tab.locator("input[type=file]").set_input_files(stranger)
        until(lambda problem=problem: problem in (tab.locator(".failure").text_content() or ""))
    assert "<b>stranger.png" in tab.locator(".failure").text_content()
    assert tab.locator(".picture").count() == 0


def test_the_engine_view_moves(visit: Visit, embedded: Server) -> None:
    tab = visit.go("engine")
    loop = tab.locator(f"[data-model={SDAR}]")
    until(lambda: loop.locator("[data-figure=running]").text_content() == "0")
    before = int(loop.get_attribute("data-steps"))
    body = {"model": SDAR, "prompt": "12+7=", "max_tokens": 40, "ignore_eos": True, "n": 3}
    usage = embedded.http.post("/v1/completions", json={**body, "temperature": 1.0}).json()["usage"]
    until(lambda: int(loop.get_attribute("data-steps")) > before)
    until(lambda: loop.locator("rect.row-denoise").count() >= 3)
    until(lambda: loop.locator("rect.row-commit").count() > 0)
    until(lambda: loop.locator("rect.time-device").count() > 0)
    assert loop.locator(".lane-name").count() == 4
    assert "leased" in loop.locator(".pages").text_content()
    assert "denoise" in loop.locator(".last-step").text_content()
    assert usage["nfe"] > 0
    embedded.http.post("/v1/images/generations", json={"prompt": "a red circle", "num_inference_steps": 2})
    drawn = tab.locator(f"[data-model={IMAGE}]")
    for kind in ("encode", "denoise", "decode"):
        until(lambda kind=kind: drawn.locator(f"rect.row-{kind}").count() > 0)


def test_the_key_is_asked_for_and_kept_in_the_tab(visiting: Visiting) -> None:
    visit = visiting(key=None)
    page = visit.page
    page.goto(visit.url)
    dialog = page.locator("dialog[open]")
    assert "asks for an API key" in dialog.text_content()
    dialog.locator("input[name=api-key]").fill("wrong")
    dialog.get_by_role("button", name="Use this key").click()
    until(lambda: "not one of this server's" in dialog.text_content())
    dialog.locator("input[name=api-key]").fill(KEY)
    dialog.get_by_role("button", name="Use this key").click()
    tab = page.locator("[data-tab=text]")
    tab.wait_for()
    assert dialog.count() == 0
    ask(tab, "Sort the words: pear apple fig")
    finished(tab.locator("[data-answer]"))
    assert tab.locator(".answer-text").text_content() == "apple fig pear"
    assert KEY not in page.evaluate("JSON.stringify(localStorage) + document.cookie")
    assert page.evaluate("sessionStorage.getItem('sfumato-key')") == KEY
    other = visit.open()
    other.goto(visit.url)
    other.locator("dialog[open]").wait_for()
    page.get_by_role("button", name="Forget key").click()
    page.locator("dialog[open]").wait_for()
    assert page.evaluate("sessionStorage.length") == 0
    assert all("401" in complaint for complaint in visit.complaints), json.dumps(visit.complaints)
    visit.complaints.clear()
