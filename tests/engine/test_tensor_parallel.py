"""Tensor parallelism with real processes: the same answers, and every way in which a rank is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from sfumato.config import EngineConfig
from sfumato.engine.build import Loaded, load
from sfumato.engine.engine import Choice, Engine
from sfumato.engine.frontend import SamplingParams
from sfumato.engine.ranks import device_of_rank, threads_of_rank
from sfumato.errors import ConfigError, EngineError
from tests.models.checkpoints import EVERY, random_weights, write
from tests.serve.running import children, is_running

SDAR, LLADA = "sfumato-tiny-sdar", "sfumato-tiny-llada"
PROMPTS = ["12+7=", "Mia, 34, nurse in Oslo", "Sort: 5 3 9", "What is 8*7?"]


def followers(loaded: Loaded) -> list[int]:
    """Return the process ids of an engine's followers."""
    assert loaded.leader is not None
    return loaded.leader._children.pids  # type: ignore[attr-defined,no-any-return]


def params_for(count: int, max_tokens: int = 24) -> list[SamplingParams]:
    """Return parameters of unlike requests."""
    several = [
        SamplingParams(max_tokens=max_tokens, seed=1),
        SamplingParams(max_tokens=max_tokens, seed=2, temperature=0.9, top_k=8),
        SamplingParams(max_tokens=max_tokens, seed=3, logprobs=3, ignore_eos=True),
        SamplingParams(max_tokens=max_tokens - 7, seed=4, n=2, temperature=1.0),
    ]
    return [several[index % len(several)] for index in range(count)]


def told(choices: list[Choice]) -> list[tuple[list[int], str | None]]:
    """Return what must be the same on any number of ranks."""
    return [(choice.token_ids, choice.finish_reason) for choice in choices]


@pytest.mark.parametrize("model", [SDAR, LLADA])
def test_embedded_models_answer_as_on_one_rank(model: str) -> None:
    alone = Engine.load(model, dtype="float32")
    prompts = [PROMPTS[index % 4] for index in range(8)]
    engine = Engine.load(model, dtype="float32", tensor_parallel=2)
    pids = followers(engine._loaded)
    try:
        assert len(pids) == 1
        assert told(engine.generate(prompts, params_for(8))) == told(alone.generate(prompts, params_for(8)))
        score, expected = (each.log_likelihood("12+7=", "19", num_samples=8) if model == LLADA else
                           each.log_likelihood("12+7=", "19") for each in (engine, alone))  # fmt: skip
        assert score.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-4)
    finally:
        engine.close()
    assert not any(map(is_running, pids))


def answers(engine: Engine) -> list[tuple[list[int], str | None]]:
    """Return the answers of a checkpoint with random weights, which has no tokenizer."""
    prompts: list[list[int]] = [[3, 9, 27, 1], [5, 6], list(range(2, 15))]
    params = SamplingParams(max_tokens=16, seed=5, ignore_eos=True)
    if engine.traits.has_self_conditioning:
        # What random weights expect of a canvas feeds on itself: after a few steps, a sum in another order is
        # another answer, on one rank too.
        few: dict[str, Any] = {"max_denoising_steps": 2}
        params = msgspec.structs.replace(params, algorithm="entropy_bound", algorithm_parameters=few)
    return told(engine.generate(prompts, [params] * 3))


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [name if name == "diffusion_gemma" else pytest.param(name, marks=pytest.mark.slow) for name in EVERY],
)
def test_every_family_answers_as_on_one_rank(name: str, size: int, tmp_path: Path) -> None:
    path = str(write(tmp_path / "model", EVERY[name], random_weights(EVERY[name])))
    expected = answers(Engine.load(path, dtype="float32"))
    engine = Engine.load(path, dtype="float32", tensor_parallel=size)
    try:
        assert answers(engine) == expected
    finally:
        engine.close()


@pytest.fixture(scope="module")
def loaded() -> Iterator[Loaded]:
    """A model on two ranks, for engines one after another."""
    loaded = load(EngineConfig(model=SDAR, dtype="float32", tensor_parallel=2))
    yield loaded
    loaded.close()


def test_engines_on_one_model_keep_their_keys_apart(loaded: Loaded) -> None:
    expected = [
        Engine.load(SDAR, dtype="float32").generate(prompt, SamplingParams(seed=1))[0].token_ids
        for prompt in PROMPTS[:2]
    ]
    engines = [Engine.from_loaded(loaded) for _ in range(2)]
    found: dict[str, list[int]] = {}
    for index, engine in enumerate(engines):
        engine.add_request(engine.encode(PROMPTS[index]), SamplingParams(seed=1), request_id=str(index))
    while any(engine.has_work for engine in engines):
        for engine in engines:
            for turn in engine.step():
                for output in turn.outputs:
                    found.setdefault(output.request_id, []).extend(output.token_ids)
    assert [found["0"], found["1"]] == expected
    assert loaded.leader is not None
    assert not loaded.leader.forgotten
    del engines, engine
    assert len(loaded.leader.forgotten) == 2
    again = Engine.from_loaded(loaded).generate(PROMPTS[0], SamplingParams(seed=1))[0].token_ids
    assert again == expected[0]


def test_what_cannot_be_divided_is_refused_before_anything_starts() -> None:
    before = children(os.getpid())
    with pytest.raises(
        ConfigError, match=r"--tensor-parallel 5: 5 ranks: the model's \d+ query heads are not"
    ):
        Engine.load(SDAR, tensor_parallel=5)
    with pytest.raises(ConfigError, match="--tensor-parallel 0 must be at least 1"):
        Engine.load(SDAR, tensor_parallel=0)
    with pytest.raises(ConfigError, match="--rank-timeout -1 must be above 0 seconds"):
        Engine.load(SDAR, tensor_parallel=2, rank_timeout=-1.0)
    assert children(os.getpid()) == before


def test_a_follower_that_cannot_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    with pytest.raises(
        EngineError, match=r"tensor-parallel rank 1 of 2 \(process \d+\) has ended: exit status 7"
    ):
        Engine.load(SDAR, tensor_parallel=2)


def test_ranks_share_out_threads_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(model=SDAR, tensor_parallel=2)
    assert threads_of_rank(msgspec.structs.replace(config, num_threads=5)) == 2
    assert threads_of_rank(msgspec.structs.replace(config, num_threads=1)) == 1
    # A follower was given its share.
    given = msgspec.structs.replace(config, num_threads=3, rank=1, rendezvous="127.0.0.1:1")
    assert threads_of_rank(given) == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    places = [
        device_of_rank("cuda", msgspec.structs.replace(config, replica=replica, rank=rank))
        for replica in range(2)
        for rank in range(2)
    ]
    assert places == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert device_of_rank("cpu", config) == "cpu"
    shared = EngineConfig(model=SDAR, data_parallel_attention=3, rank=2, replica=2, rendezvous="127.0.0.1:1")
    assert device_of_rank("cuda", shared) == "cuda:2"
    with pytest.raises(ConfigError, match="6 ranks need one CUDA device each, and this machine has 4"):
        device_of_rank("cuda", msgspec.structs.replace(config, tensor_parallel=6))


def busy_engine(rank_timeout: float = 15.0) -> tuple[Engine, int]:
    """Return an engine in the middle of a long request, and its follower."""
    engine = Engine.load(SDAR, dtype="float32", tensor_parallel=2, rank_timeout=rank_timeout)
    slow: dict[str, Any] = {"algorithm": "low_confidence", "algorithm_parameters": {"threshold": 2.0}}
    engine.add_request((3, 9, 9), SamplingParams(seed=1, max_tokens=400, ignore_eos=True, **slow))
    for _ in range(3):
        engine.step()
    return engine, followers(engine._loaded)[0]


def run_on(engine: Engine) -> None:
    """Step for as long as that works."""
    for _ in range(10_000):
        engine.step()


def wait_until_gone(pid: int, seconds: float) -> bool:
    """Whether a process is gone within so many seconds."""
    end = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_running(pid)


def test_a_killed_follower_ends_the_engine_with_its_name() -> None:
    engine, pid = busy_engine()
    os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(EngineError, match=rf"rank 1 of 2 \(process {pid}\) has ended: killed by signal 9"):
        run_on(engine)
    assert time.monotonic() - started < 3
    engine.close()


def test_a_follower_killed_while_nothing_runs_is_noticed() -> None:
    loaded = load(EngineConfig(model=SDAR, tensor_parallel=2))
    assert loaded.leader is not None
    told_of: list[str] = []
    loaded.leader.on_lost = told_of.append
    (pid,) = followers(loaded)
    os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 5
    while not told_of and time.monotonic() < end:
        time.sleep(0.02)
    assert len(told_of) == 1
    assert f"(process {pid}) has ended: killed by signal 9" in told_of[0]
    loaded.close()


@pytest.mark.parametrize("is_busy", [True, False], ids=["busy", "idle"])
def test_a_stopped_follower_ends_the_engine_within_its_bound(is_busy: bool) -> None:
    engine, pid = busy_engine(rank_timeout=1.0)
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    if not is_busy:
        # The beat finds out; then it is told to the next step.
        time.sleep(2.5)
    with pytest.raises(EngineError, match="ended or not answered for 1 s"):
        run_on(engine)
    assert time.monotonic() - started < 5
    assert wait_until_gone(pid, 3)
    engine.close()


@pytest.mark.parametrize(
    "is_stopped",
    [pytest.param(False, marks=pytest.mark.slow, id="running"), pytest.param(True, id="stopped")],
)
def test_no_follower_outlives_its_leader(is_stopped: bool) -> None:
    code = (
        "import time; from sfumato.engine.engine import Engine\n"
        f"engine = Engine.load({SDAR!r}, tensor_parallel=2)\n"
        "print(engine._loaded.leader._children.pids[0], flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as leader:
        try:
            assert leader.stdout is not None
            pid = int(leader.stdout.readline())
            assert is_running(pid)
            if is_stopped:
                os.kill(pid, signal.SIGSTOP)
        finally:
            leader.kill()
    assert wait_until_gone(pid, 5)


def test_an_engine_that_nobody_closes_lets_its_program_end() -> None:
    code = (
        "from sfumato.engine.engine import Engine\n"
        f"engine = Engine.load({SDAR!r}, tensor_parallel=2)\n"
        "print(engine._loaded.leader._children.pids[0], flush=True)\n"
        "engine.generate('12+7=')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert not is_running(int(done.stdout))
