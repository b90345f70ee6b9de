"""A real model in this process: the embedded one, asked held-out questions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sfumato.config import EngineConfig
from sfumato.engine.build import load
from sfumato.engine.frontend import SamplingParams
from sfumato.evaluation.backend import Ask, Reply
from sfumato.evaluation.in_process import InProcess
from sfumato.evaluation.prompts import make_prompter
from sfumato.evaluation.questions import read_task
from sfumato.evaluation.run import Evaluation, run
from sfumato.evaluation.sweep import parse_sweep, plan_curves

SDAR = "sfumato-tiny-sdar"


@pytest.fixture(scope="module")
def backend() -> InProcess:
    return InProcess(SDAR, load(EngineConfig(model=SDAR, dtype="float32", device="cpu")))


def evaluation(backend: InProcess, out: Path, task: str = "word-problems", **options: Any) -> Evaluation:
    """Return an evaluation with a sweep of the default algorithm."""
    read = read_task(task)
    prompter = make_prompter(read, style="plain", num_shots=None, examples=None, is_raw=False)
    curves = tuple(plan_curves(backend.card, [], [parse_sweep("confidence_threshold=0.9,2")], {}))
    return Evaluation(task=read, prompter=prompter, curves=curves, out=out, concurrency=4, **options)


def ignore(*progress: Any) -> None:
    """Show nothing."""


def test_held_out_questions_are_answered_and_resumed(backend: InProcess, tmp_path: Path) -> None:
    asked = evaluation(backend, tmp_path, limit=6)

    def stop_early(setting: object, num_done: int, num_correct: int) -> None:
        if num_done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(asked, backend, stop_early)
    report = run(asked, backend, ignore)
    fast, slow = report.points
    assert fast.num_correct >= 5
    assert slow.num_correct == 6
    assert fast.is_default
    assert not slow.is_default
    assert fast.tpf is not None
    assert slow.tpf is not None
    # One token per step, a prefill and the rest of the last block.
    assert slow.tpf < 1 < fast.tpf
    assert (fast.num_failed, slow.num_failed) == (0, 0)
    assert report.where["torch"]
    assert report.curves[0].aup is not None


def test_figures_do_not_depend_on_what_was_asked_before(backend: InProcess, tmp_path: Path) -> None:
    reports = []
    for name in "ab":
        (tmp_path / name).mkdir()
        reports.append(run(evaluation(backend, tmp_path / name, limit=4), backend, ignore))
    first, second = (report.points for report in reports)
    assert [point.tpf for point in first] == [point.tpf for point in second]
    assert second[0].num_spared_prefills > 0


def test_one_question_fails_alone(backend: InProcess, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    lines = [
        '{"question": "%s", "answer": "7"}' % ("12+7= " * 400),
        '{"question": "4+3=", "answer": "4+3=7. The answer is 7."}',
    ]
    path.write_text("\n".join(lines) + "\n")
    point = run(evaluation(backend, tmp_path, str(path)), backend, ignore).points[0]
    assert (point.num_failed, point.num_correct) == (1, 1)
    ((name, reason),) = point.failures
    assert name == "1"
    assert "context of 512" in reason


def test_a_stop_string_and_a_timeout_end_a_request(backend: InProcess) -> None:
    replies: list[Reply] = []

    def ask(prompt: Sequence[dict[str, str]], **params: Any) -> Reply:
        backend.run([Ask("1", list(prompt), SamplingParams(seed=0, **params))], replies.append, concurrency=1)
        return replies[-1]

    chat = [{"role": "user", "content": "Mia, 34, nurse in Oslo"}]
    whole = ask(chat)
    assert '"age": 34' in whole.output
    cut = ask(chat, stop=('"age"',))
    assert cut.output == whole.output.split('"age"')[0]
    assert cut.finish_reason == "stop"
    assert "timeout" in str(ask(chat, timeout=1e-9).error)


def test_the_front_side_does_not_load_torch() -> None:
    code = (
        "import sys, sfumato.serve.commands.evaluate\n"
        "from sfumato.evaluation import in_process, plot, run, served\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
