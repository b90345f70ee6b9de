"""Runs that end early, go on, fail in part or are refused, on a scripted model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sfumato.errors import ConfigError, RequestError
from sfumato.evaluation.backend import Ask, Reply
from sfumato.evaluation.prompts import make_prompter
from sfumato.evaluation.report import as_tables, write_report
from sfumato.evaluation.run import run
from tests.evaluation.scripted import Scripted, make_evaluation, right_answer


def ignore(*progress: Any) -> None:
    """Show nothing."""


def ending_after(number: int) -> Callable[[Ask], Reply]:
    """Answer so many questions and then be interrupted."""
    left = iter(range(number))

    def answer(ask: Ask) -> Reply:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return right_answer(ask)

    return answer


def test_every_setting_is_measured(tmp_path: Path) -> None:
    seen = []
    backend = Scripted()
    evaluation = make_evaluation(tmp_path, sweep="threshold=0.5,0.8", concurrency=3, max_tokens=5, seed=9)
    report = run(evaluation, backend, lambda *progress: seen.append(progress[1:]))
    (curve,) = report.curves
    assert [point.accuracy for point in curve.points] == [100.0, 100.0]
    assert [point.tpf for point in curve.points] == [3.0, 3.0]
    assert curve.aup == 300.0
    assert [point.is_default for point in curve.points] == [False, True]
    assert seen[:7] == [(n, n) for n in range(7)]
    assert backend.concurrencies == [3, 3]
    params = backend.asked[0].params
    assert (params.algorithm, params.algorithm_parameters) == ("fast", {"threshold": 0.5})
    assert (params.max_tokens, params.seed, params.timeout) == (5, 9, 600.0)
    assert report.settings["max_tokens"] == 5
    assert report.settings["num_questions"] == 6
    written = json.loads(write_report(report, evaluation.out).read_text())
    assert written["curves"][0]["points"][1]["parameters"] == {"threshold": 0.8, "mode": "a"}
    assert as_tables(report)[0].row_count == 2


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(make_evaluation(tmp_path), Scripted(ending_after(3)), ignore)
    path = tmp_path / "out" / "answers-fast.jsonl"
    assert len(path.read_text().splitlines()) == 4
    # Killed while it wrote a line.
    with path.open("a") as file:
        file.write('{"id": "4", "prom')
    backend = Scripted()
    report = run(make_evaluation(tmp_path), backend, ignore)
    assert [ask.id for ask in backend.asked] == ["4", "5", "6"]
    assert report.points[0].num_correct == 6
    assert all(json.loads(line) for line in path.read_text().splitlines())
    again = Scripted()
    assert run(make_evaluation(tmp_path), again, ignore) == report
    assert again.asked == []


def test_a_larger_limit_goes_on_and_a_smaller_one_looks_at_fewer(tmp_path: Path) -> None:
    run(make_evaluation(tmp_path, limit=2), Scripted(), ignore)
    backend = Scripted()
    assert run(make_evaluation(tmp_path, limit=4), backend, ignore).points[0].num_questions == 4
    assert [ask.id for ask in backend.asked] == ["3", "4"]
    assert run(make_evaluation(tmp_path, limit=1), backend, ignore).points[0].num_questions == 1


def test_beginning_anew_asks_everything(tmp_path: Path) -> None:
    run(make_evaluation(tmp_path), Scripted(), ignore)
    backend = Scripted()
    run(make_evaluation(tmp_path, seed=4, is_resuming=False), backend, ignore)
    assert len(backend.asked) == 6


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_tokens": 7}, "max_tokens 8, now it is 7"),
        ({"seed": 1}, "seed 0, now it is 1"),
        ({"concurrency": 2}, "concurrency 16, now it is 2"),
    ],
)
def test_other_settings_do_not_go_on(tmp_path: Path, options: dict[str, int], reason: str) -> None:
    run(make_evaluation(tmp_path), Scripted(), ignore)
    backend = Scripted()
    with pytest.raises(ConfigError, match=reason):
        run(make_evaluation(tmp_path, **options), backend, ignore)
    assert backend.asked == []


def test_another_prompt_does_not_go_on(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path)
    run(evaluation, Scripted(), ignore)
    path = tmp_path / "out" / "answers-fast.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join([*lines[:-1], lines[-1].replace('"prompt_sha256":"', '"prompt_sha256":"0')]) + "\n"
    )
    with pytest.raises(ConfigError, match="question 6 was asked with another prompt"):
        run(evaluation, Scripted(), ignore)
    path.write_text("\n".join([lines[0], "{}", *lines[1:]]) + "\n")
    with pytest.raises(ConfigError, match=r"answers-fast\.jsonl line 2 is not what"):
        run(evaluation, Scripted(), ignore)


def test_a_failure_is_counted_and_asked_again(tmp_path: Path) -> None:
    def failing(ask: Ask) -> Reply:
        return Reply(id=ask.id, error="no room") if ask.id == "2" else right_answer(ask)

    point = run(make_evaluation(tmp_path), Scripted(failing), ignore).points[0]
    assert (point.num_failed, point.num_correct, point.num_questions) == (1, 5, 6)
    assert point.failures == (("2", "no room"),)
    backend = Scripted()
    point = run(make_evaluation(tmp_path), backend, ignore).points[0]
    assert [ask.id for ask in backend.asked] == ["2"]
    assert (point.num_failed, point.num_correct) == (0, 6)


def test_a_refused_setting_ends_the_run_before_any_work(tmp_path: Path) -> None:
    backend = Scripted(refuse="threshold is 7, at most 1 is allowed")
    with pytest.raises(RequestError, match=r"fast threshold=0\.5: threshold is 7"):
        run(make_evaluation(tmp_path, sweep="threshold=0.5,7"), backend, ignore)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError, match=r"--out .*out: File exists"):
        run(make_evaluation(tmp_path), Scripted(), ignore)


def test_the_score_may_look_at_methods_measured_elsewhere(tmp_path: Path) -> None:
    alone = run(make_evaluation(tmp_path, limit=1), Scripted(), ignore)
    evaluation = make_evaluation(tmp_path, limit=1, best_accuracy=50.0)
    assert (alone.best_accuracy, run(evaluation, Scripted(), ignore).best_accuracy) == (100.0, 100.0)
    wrong = Scripted(lambda ask: msgspec.structs.replace(right_answer(ask), output="0"))
    evaluation = make_evaluation(tmp_path, best_accuracy=50.0, is_resuming=False)
    assert run(evaluation, wrong, ignore).best_accuracy == 50.0


def test_raw_prompts_end_before_the_next_question(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path)
    prompter = make_prompter(evaluation.task, style="plain", num_shots=None, examples=None, is_raw=True)
    backend = Scripted()
    run(dataclasses.replace(evaluation, prompter=prompter), backend, ignore)
    assert backend.asked[0].prompt == "1+1="
    assert backend.asked[0].params.stop == ("\n\nQuestion:",)
