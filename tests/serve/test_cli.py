"""The command line in this process: help, errors in one line, settings, and what is written into a pipe."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from sfumato import SamplingParams
from sfumato.config import EngineConfig
from sfumato.core.messages import CanvasView, FinishReason
from sfumato.engine.frontend import Delta
from sfumato.errors import ConfigError
from sfumato.models.folder import ZOO
from sfumato.serve.cli import run
from sfumato.serve.commands.canvas import CanvasText, draws_live, show, tail
from sfumato.serve.commands.loading import load_engine
from sfumato.serve.launch import Planned, share_out
from sfumato.serve.settings_file import ModelSettings, parse_bytes, read_settings
from sfumato.text.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("arguments", "reason", "status"),
    [
        (["fly"], "fly", 2),
        (["serve", "--nonsense"], "--nonsense", 2),
        (["serve", "--port", "x"], "port", 2),
        (["serve", "--kv-memory", "much"], "--kv-memory", 1),
        (["serve", "--policy", "x"], "--policy", 1),
        (["serve", "--algorithm-parameters", "{"], "--algorithm-parameters", 1),
        (["serve", "--algorithm-parameters", "{}", "--config", "nowhere.yaml"], "nowhere.yaml", 1),
        (["serve", "a", "b", "--served-model-name", "c"], "--served-model-name", 1),
        (["serve", "--log-level", "loud"], "--log-level", 1),
        (["serve", "--max-latent-bytes", "much"], "--max-latent-bytes", 1),
        (["serve", "--max-step-rows", "0"], "--max-step-rows", 1),
        (["serve", "--deterministic-rows", "0"], "--deterministic-rows", 1),
        (["generate", "hi", "--model", "no-such-model"], "no-such-model", 1),
        (["generate", "hi", "--algorithm", "guess"], "guess", 1),
        (["generate", ""], "prompt", 1),
    ],
)
def test_every_user_error_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str, status: int
) -> None:
    assert run(arguments) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sfumato: error: ")
    assert err.count("\n") == 1
    assert reason in err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ([], ("serve", "generate", "generate-image", "chat", "models")),
        (["serve", "--help"], ("OpenAI API", "--kv-memory", "--served-model-name", "Ctrl-C")),
        (["generate-image", "--help"], ("--steps", "--scheduler", "--seed", "--output", "--repeat")),
        (["generate", "--help"], ("--max-tokens", "--algorithm", "pipe")),
        (["chat", "--help"], ("/reset",)),
    ):
        assert run(arguments) == 0
        shown = capsys.readouterr().out
        for word in words:
            assert word in shown


def test_models_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "LLaDAModelLM",
        "SDARForCausalLM",
        "StableDiffusion3Pipeline",
        "sfumato-tiny-sdar",
        "low_confidence",
        "threshold",
    ):
        assert word in shown


def test_a_pipe_gets_plain_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--max-tokens", "12", "--threads", "1", "--dtype", "float32"]
    assert run(["generate", "Mia, 34, nurse in Oslo", *arguments]) == 0
    text = capsys.readouterr().out
    assert text.endswith("\n")
    assert "\x1b" not in text
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("Mia, 34, nurse in Oslo\n\n/reset\nMia, 34, nurse in Oslo\n/quit\nx")
    )
    assert run(["chat", *arguments]) == 0
    assert capsys.readouterr().out == text * 2


def test_the_canvas_is_drawn_as_it_denoises() -> None:
    tokenizer = Tokenizer(ZOO / "sfumato-tiny-sdar")
    one, two, three = tokenizer.encode("1"), tokenizer.encode("2"), tokenizer.encode("3")
    canvas = CanvasText(tokenizer)
    view = CanvasView(
        step=1,
        start=0,
        token_ids=(*one, *two, *three, 2),
        confidence=(0.9, 0.1, 1.0, 0.5),
        undecided=(False, True, True, False),
    )
    canvas.push(Delta(text="1", token_ids=tuple(one), canvas=view))
    drawn = canvas.render()
    assert drawn.plain == "123·"
    styles = {drawn.plain[span.start : span.end]: str(span.style) for span in drawn.spans}
    assert styles == {"2": "color(238)", "3": "color(252)", "·": "dim"}
    canvas.push(Delta(text="2", token_ids=tuple(two), finish_reason=FinishReason.LENGTH))
    assert canvas.render().plain == canvas.committed == "12"
    Console(file=io.StringIO(), force_terminal=True).print(drawn)


@pytest.mark.parametrize(
    ("terminal", "is_live"), [("xterm-256color", True), ("dumb", False), ("unknown", False)]
)
def test_a_terminal_that_cannot_move_its_cursor_gets_plain_text(terminal: str, is_live: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": terminal})
    assert draws_live(console) == is_live
    assert not draws_live(Console(file=io.StringIO()))


def test_a_canvas_that_is_higher_than_the_terminal_is_drawn_from_its_end() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=20, height=5)
    shown = tail(Text("\n".join(f"line {number}" for number in range(40))), console)
    assert [str(line) for line in shown.renderables] == [f"line {number}" for number in range(36, 40)]


def test_a_long_answer_is_drawn_and_stays_whole() -> None:
    engine = load_engine("sfumato-tiny-sdar", dtype="float32", device="cpu", threads=1)
    console = Console(file=(written := io.StringIO()), force_terminal=True, width=24, height=4, _environ={})
    params = SamplingParams(max_tokens=96, ignore_eos=True, include_canvas=True)
    text = show(engine, "Mia, 34, nurse in Oslo", params, console, delay=0)
    after = written.getvalue().rsplit("\x1b[2K", 1)[-1]
    assert "".join(text.split()) in "".join(Text.from_ansi(after).plain.split())


def test_sizes_are_read() -> None:
    assert parse_bytes("512M", "--kv-memory") == 512 << 20
    assert parse_bytes("1.5g", "--kv-memory") == 3 << 29
    assert parse_bytes("2GiB", "--kv-memory") == 2 << 30
    assert parse_bytes(4096, "--kv-memory") == parse_bytes("4096", "--kv-memory") == 4096
    with pytest.raises(ConfigError):
        parse_bytes("-1", "--kv-memory")


def test_memory_and_threads_are_shared_out() -> None:
    planned = [Planned(EngineConfig(model=name)) for name in "ab"]
    own = [*planned, Planned(EngineConfig(model="c", kv_memory=5, num_threads=3))]
    shared = share_out(own, kv_memory=900, num_threads=7)
    assert [each.config.kv_memory for each in shared] == [300, 300, 5]
    assert [each.config.num_threads for each in shared] == [2, 2, 3]
    alone = share_out(planned[:1], kv_memory=None, num_threads=None)
    assert alone == planned[:1]
    both = share_out(planned, kv_memory=None, num_threads=None)
    assert both[0].config.num_threads == max(1, len(os.sched_getaffinity(0)) // 2)


def test_a_file_sets_each_model(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(
        "models:\n"
        "  sfumato-tiny-sdar:\n"
        "    name: sdar\n"
        "    algorithm: low_confidence\n"
        "    algorithm-parameters: {threshold: 0.8}\n"
        "    kv-memory: 16M\n"
        "    max-running-requests: 3\n"
        "    max-step-rows: 8\n"
        "    max-latent-bytes: 1G\n"
        "    deterministic-rows: 4\n"
        "    attention-backend: torch\n"
        "  sfumato-tiny-llada:\n"
    )
    settings = read_settings(path)
    general = ModelSettings(dtype="float32", algorithm="sdar", algorithm_parameters={"denoising_steps": 4})
    sdar = settings["sfumato-tiny-sdar"].over(general).planned("sfumato-tiny-sdar")
    assert sdar.name == "sdar"
    assert sdar.config.dtype == "float32"
    assert (sdar.config.algorithm, sdar.config.parameters) == ("low_confidence", {"threshold": 0.8})
    assert sdar.config.kv_memory == 16 << 20
    assert sdar.config.limits.max_running_requests == 3
    assert (sdar.config.limits.max_step_rows, sdar.config.limits.max_latent_bytes) == (8, 1 << 30)
    assert sdar.config.deterministic_rows == 4
    assert sdar.config.attention_backend == "torch"
    llada = settings["sfumato-tiny-llada"].over(general).planned("sfumato-tiny-llada")
    assert (llada.config.algorithm, llada.config.parameters) == ("sdar", {"denoising_steps": 4})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("models: {a: {speed: 9}}", "speed"),
        ("models: {a: {threads: many}}", "threads"),
        ("models: []", "models"),
        ("models: {}", "no model"),
        ("servers: {}", "servers"),
        ("{", "YAML"),
    ],
)
def test_a_wrong_file_names_the_field(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        read_settings(path)
