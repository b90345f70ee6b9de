"""Chat on the page: it streams, cells settle, any step can be seen again, two settings run side by side."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import pytest

from sfumato.models.folder import ZOO
from tests.serve.running import LLADA, SDAR, Server, serving

pytest.importorskip("playwright", reason="Playwright is not installed")

from tests.serve.playground.browsing import (
    Visit,
    ask,
    cell_texts,
    finished,
    scripted,
    scrub,
    set_pace,
    text_chunk,
    until,
)

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import Browser, Locator

    from tests.serve.playground.conftest import Visiting

SORT = "Sort the words: pear apple fig"
# Notes every length that the answer's text has had.
_LENGTHS = """() => {
    window.lengths = new Set();
    new MutationObserver(() => {
        const text = document.querySelector(".answer-text");
        if (text) window.lengths.add(text.textContent.length);
    }).observe(document.body, { childList: true, subtree: true, characterData: true });
}"""


def one_by_one(tab: Locator, model: str) -> None:
    """Let a model decide one token a step."""
    tab.locator("select[name=model]").select_option(model)
    tab.locator("select[name=algorithm]").select_option("low_confidence")
    tab.locator("input[name=threshold]").fill("2")


def answer_of(server: Server, model: str, question: str, **fields: Any) -> Any:
    body = {"model": model, "messages": [{"role": "user", "content": question}], **fields}
    return server.http.post("/v1/chat/completions", json=body).json()


def test_chat_streams_and_cells_settle(visit: Visit, embedded: Server) -> None:
    tab = visit.go("text")
    one_by_one(tab, SDAR)
    set_pace(tab, "30 steps a second")
    visit.page.evaluate(_LENGTHS)
    question = "Mia, 34, nurse in Oslo"
    ask(tab, question)
    answer = tab.locator("[data-answer]")
    until(lambda: answer.locator(".cell.open").count() > 0)
    until(lambda: answer.locator(".cell.decided").count() > 0)
    finished(answer)
    assert answer.locator(".cell.open").count() == 0
    expected = answer_of(
        embedded, SDAR, question, algorithm="low_confidence", algorithm_parameters={"threshold": 2.0}
    )
    text = expected["choices"][0]["message"]["content"]
    assert answer.locator(".answer-text").text_content() == text
    assert len(visit.page.evaluate("[...window.lengths]")) > 3
    assert "".join(cell_texts(answer)).replace("\u00a0", " ").startswith(text)
    usage = expected["usage"]
    assert answer.locator("[data-figure=NFE]").text_content() == str(usage["nfe"])
    assert answer.locator("[data-figure=TPF]").text_content() == f"{usage['tokens_per_forward']:.2f}"
    for name in ("tokens/s", "first text"):
        assert answer.locator(f"[data-figure='{name}']").text_content()[0].isdigit()
    heard = visit.page.locator("[aria-live=polite]").text_content()
    assert text in heard


def test_the_scrubber_shows_every_step_again(visit: Visit) -> None:
    tab = visit.go("text")
    one_by_one(tab, LLADA)
    set_pace(tab, "as it comes")
    ask(tab, SORT)
    answer = finished(tab.locator("[data-answer]"))
    total = int(answer.locator(".canvas-figure").get_attribute("data-steps"))
    assert total > 8
    last = cell_texts(answer)
    open_cells = []
    for step in (total, total // 2, 1, total - 1):
        scrub(answer, step)
        open_cells.append(answer.locator(".cell.open").count())
    # One position less is open with every step, until an end token ends the answer.
    assert open_cells == [open_cells[0] + total - step for step in (total, total // 2, 1, total - 1)]
    slider = answer.locator("input[type=range]")
    slider.focus()
    visit.page.keyboard.press("ArrowRight")
    figure = answer.locator(".canvas-figure")
    until(lambda: figure.get_attribute("data-step") == str(total))
    assert cell_texts(answer) == last
    scrub(answer, 0)
    answer.get_by_role("button", name="Play from here").click()
    finished(answer)
    assert cell_texts(answer) == last


def test_two_settings_denoise_in_one_batch(visit: Visit, embedded: Server) -> None:
    tab = visit.go("text")
    tab.locator("select[name=model]").select_option(LLADA)
    tab.locator("input[name=compare]").check()
    tab.locator("[data-settings=A] select[name=algorithm]").select_option("low_confidence")
    tab.locator("[data-settings=A] input[name=threshold]").fill("2")
    tab.locator("[data-settings=B] select[name=algorithm]").select_option("llada")
    steps: list[Any] = []
    with embedded.http.stream("GET", "/v1/engine/steps", params={"model": LLADA}) as watched:

        def note() -> None:
            for line in watched.iter_lines():
                steps.extend(json.loads(line[6:])["steps"] if line.startswith("data: {") else [])
                if steps and json.loads(line[6:] or "{}").get("steps") == []:
                    return

        noting = threading.Thread(target=note)
        noting.start()
        ask(tab, SORT)
        first, second = tab.locator("[data-answer=A]"), tab.locator("[data-answer=B]")
        finished(first)
        finished(second)
        noting.join(20)
    assert max(len({share["request_id"] for share in step["shares"]}) for step in steps) == 2
    seeds = [each.locator("[data-figure=seed]").text_content() for each in (first, second)]
    assert seeds[0] == seeds[1]
    assert [each.locator(".tag").text_content() for each in (first, second)] == ["low_confidence", "llada"]
    for each in (first, second):
        assert int(each.locator("[data-figure=NFE]").text_content()) > 5


def test_first_contact_is_one_click_and_clear_comes_back_to_it(visit: Visit) -> None:
    tab = visit.go("text")
    tab.get_by_role("button", name=SORT).click()
    finished(tab.locator("[data-answer]"))
    assert tab.locator(".answer-text").text_content() == "apple fig pear"
    ask(tab, "Sort the words: kiwi fig")
    finished(tab.locator("[data-answer]").nth(1))
    tab.get_by_role("button", name="Clear").click()
    tab.get_by_role("button", name=SORT).wait_for()
    assert tab.locator("[data-answer]").count() == 0


def test_controls_are_those_that_the_server_reports(visit: Visit, embedded: Server) -> None:
    tab = visit.go("text")
    for model in (SDAR, LLADA):
        tab.locator("select[name=model]").select_option(model)
        report = embedded.http.get(f"/v1/models/{model}").json()
        for algorithm in report["algorithms"]:
            tab.locator("select[name=algorithm]").select_option(algorithm["name"])
            for parameter in algorithm["parameters"]:
                field = tab.locator(f".settings [name={parameter['name']}]").first
                assert field.count() == 1
                if "minimum" in parameter:
                    assert float(field.get_attribute("min")) == parameter["minimum"]
        length = tab.locator("input[name=block_length]")
        assert length.get_attribute("placeholder") == str(report["block_length"])


def test_cells_that_change_flash_and_open_again(visit: Visit) -> None:
    tab = visit.go("text")
    frames = [
        (["a", "b", "c"], [False, False, True]),
        (["a", "x", "c"], [False, False, False]),
        (["a", "x", "d"], [True, False, False]),
    ]
    chunks = [
        text_chunk(
            "",
            {"step": at, "start": 0, "tokens": tokens, "confidence": [0.5] * 3, "undecided": undecided},
        )
        for at, (tokens, undecided) in enumerate(frames, 1)
    ]
    scripted(visit.page, "/v1/chat/completions", chunks)
    ask(tab, "change")
    answer = finished(tab.locator("[data-answer]"))
    expected = [
        ["decided settled", "decided settled", "open"],
        ["decided", "decided edited", "decided settled"],
        ["open reopened", "decided", "decided edited"],
    ]
    for step, classes in enumerate(expected, 1):
        scrub(answer, step)
        shown = [cell.get_attribute("class") for cell in answer.locator(".cell").all()]
        assert [text.replace("cell ", "").replace(" c5", "") for text in shown] == classes
    assert (
        answer.locator(".cell.edited").evaluate("(cell) => getComputedStyle(cell).animationName") == "flash"
    )


def test_what_the_server_refuses_is_said_and_the_next_question_works(visit: Visit) -> None:
    tab = visit.go("text")
    tab.locator("input[name=top_p]").fill("7")
    ask(tab, SORT)
    until(lambda: "top_p" in (tab.locator(".failure").text_content() or ""))
    tab.locator("input[name=top_p]").fill("")
    ask(tab, SORT)
    finished(tab.locator("[data-answer]").nth(1))
    assert tab.locator(".answer-text").nth(1).text_content() == "apple fig pear"
    assert [text for text in visit.complaints if "400" not in text] == []
    visit.complaints.clear()


def test_hostile_text_is_shown_as_text(visit: Visit) -> None:
    tab = visit.go("text")
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    pieces = ["<script>window.hurt = 1</script>", "<img src=x onerror='window.hurt=1'>", "\u202eevil\u202c"]
    pieces += [family, "\u0000\u001b[31m\u0007", "&lt;b&gt;", "\n\t ", "\ufffd", "\u0301" * 40]
    canvas = {
        "step": 1,
        "start": 0,
        "tokens": pieces,
        "confidence": [0.5] * len(pieces),
        "undecided": [False] * len(pieces),
    }
    scripted(visit.page, "/v1/chat/completions", [text_chunk("".join(pieces), canvas)])
    ask(tab, "</textarea><script>window.hurt = 1</script>\u202e")
    answer = finished(tab.locator("[data-answer]"))
    shown = answer.locator(".answer-text").text_content()
    assert pieces[0] in shown
    assert pieces[1] in shown
    assert "⟨202E⟩evil⟨202C⟩" in shown
    assert family in shown
    assert "␀␛[31m␇" in shown
    assert "&lt;b&gt;" in shown
    assert "\u202e" not in visit.page.locator("body").text_content()
    assert "</textarea><script>" in tab.locator(".question").text_content()
    assert cell_texts(answer)[6] == "↵⇥\u00a0"
    assert visit.page.evaluate("window.hurt") is None
    assert visit.page.locator("#app script, .answer img").count() == 0


# Frames of the screen while an answer grows: the time between two of them, in milliseconds.
_FRAMES = """() => {
    window.gaps = [];
    let last = performance.now();
    const note = (now) => {
        window.gaps.push(now - last);
        last = now;
        requestAnimationFrame(note);
    };
    requestAnimationFrame(note);
}"""
_NUM_TOKENS, _BLOCK = 2000, 32


def long_answer() -> list[dict[str, Any]]:
    """Return an answer of 2,000 tokens, decided one a step in blocks of 32."""
    chunks = []
    for at in range(_NUM_TOKENS):
        start = at // _BLOCK * _BLOCK
        canvas = {
            "step": at + 1,
            "start": start,
            "tokens": [f" w{position % 997}" for position in range(start, start + _BLOCK)],
            "confidence": [(position * 37 % 100) / 100 for position in range(_BLOCK)],
            "undecided": [position > at for position in range(start, start + _BLOCK)],
        }
        chunks.append(text_chunk(f" w{at % 997}", canvas))
    return chunks


def test_an_answer_of_2000_tokens_stays_smooth(visit: Visit) -> None:
    tab = visit.go("text")
    set_pace(tab, "as it comes")
    scripted(visit.page, "/v1/chat/completions", long_answer())
    visit.page.evaluate(_FRAMES)
    ask(tab, "Tell me everything")
    answer = finished(tab.locator("[data-answer]"))
    assert answer.locator(".cell").count() >= _NUM_TOKENS
    gaps = sorted(visit.page.evaluate("window.gaps"))
    assert gaps[len(gaps) // 2] < 50
    # All of it comes at once here, which no model does: the longest pause is this one.
    assert gaps[-1] < 1500
    visit.page.evaluate("window.gaps.length = 0")
    for step in range(0, _NUM_TOKENS, 97):
        scrub(answer, step)
    gaps = sorted(visit.page.evaluate("window.gaps"))
    assert gaps[len(gaps) * 9 // 10] < 100


def test_the_keyboard_and_reduced_motion(visiting: Visiting) -> None:
    visit = visiting(reduced_motion="reduce")
    tab = visit.go("text")
    visit.page.keyboard.press("Tab")
    assert visit.page.evaluate("document.activeElement.className") == "skip"
    visit.page.keyboard.press("Enter")
    assert visit.page.evaluate("document.activeElement.id") == "main"
    tab.locator("textarea[name=question]").focus()
    assert visit.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    visit.page.keyboard.type(SORT)
    visit.page.keyboard.press("Enter")
    answer = finished(tab.locator("[data-answer]"))
    style = "(cell) => getComputedStyle(cell).animationName"
    assert answer.locator(".cell").first.evaluate(style) == "none"
    visit.page.get_by_role("link", name="engine").press("Enter")
    visit.page.locator("[data-tab=engine]").wait_for()


def roomy_checkpoint(folder: Path) -> Path:
    """Return the embedded model with room for 2,304 positions; what it writes there makes no sense."""
    roomy = folder / "roomy"
    roomy.mkdir()
    for path in (ZOO / SDAR).iterdir():
        (roomy / path.name).symlink_to(path)
    config = json.loads((roomy / "config.json").read_text())
    (roomy / "config.json").unlink()
    (roomy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2304}))
    return roomy


@pytest.mark.slow
def test_a_model_that_writes_2000_tokens_stays_smooth(browser: Browser, tmp_path: Path) -> None:
    with serving(tmp_path, "--dtype", "float32", str(roomy_checkpoint(tmp_path))) as server:
        visit = Visit(browser, server.url)
        tab = visit.go("text")
        tab.locator("input[name=max_tokens]").fill("2000")
        tab.locator("input[name=confidence_threshold]").fill("2")
        tab.locator("select[name=ignore_eos]").select_option("true")
        visit.page.evaluate(_FRAMES)
        ask(tab, "Mia, 34, nurse in Oslo")
        answer = tab.locator("[data-answer]")
        until(lambda: answer.get_attribute("aria-busy") == "false", seconds=240)
        finished(answer)
        gaps = sorted(visit.page.evaluate("window.gaps"))
        assert answer.locator("[data-figure=tokens]").text_content() == "2000"
        assert answer.locator(".cell.decided").count() >= 2000
        assert gaps[len(gaps) * 95 // 100] < 100
        visit.close()
        assert visit.complaints == []
