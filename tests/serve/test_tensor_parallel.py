"""`sfumato serve --tensor-parallel 2`: the same door, and what it says when a rank is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from tests.serve.running import SDAR, SLOW, children, is_running, serving

QUESTION = [{"role": "user", "content": "Mia, 34, nurse in Oslo"}]


def gone(pids: list[int], seconds: float = 8.0) -> bool:
    """Whether processes are gone within so many seconds."""
    end = time.monotonic() + seconds
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(is_running, pids))


@pytest.mark.parametrize(
    ("number", "overlap"),
    [(signal.SIGKILL, "off"), (signal.SIGSTOP, "off"), (signal.SIGKILL, "on"), (signal.SIGSTOP, "on")],
    ids=["killed", "stopped", "killed while overlapped", "stopped while overlapped"],
)
def test_a_lost_rank_ends_the_engine_and_the_door_says_so(
    number: signal.Signals, overlap: str, tmp_path: Path
) -> None:
    arguments = (SDAR, "--tensor-parallel", "2", "--rank-timeout", "2", "--overlap", overlap)
    with serving(tmp_path, *arguments) as server:
        (engine,) = server.engines
        (follower,) = children(engine)
        client = server.client()
        answer = client.chat.completions.create(model=SDAR, messages=QUESTION, seed=1, temperature=0)  # type: ignore[arg-type]
        assert answer.choices[0].message.content
        ended: list[str] = []

        def ask() -> None:
            try:
                client.completions.create(
                    model=SDAR, prompt="12", max_tokens=400, extra_body={**SLOW, "timeout": 60}
                )
                ended.append("answered")
            except openai.APIError as error:
                ended.append(str(error))

        asking = threading.Thread(target=ask)
        asking.start()
        assert server.wait_for("sfumato_running_requests", SDAR, 1)
        os.kill(follower, number)
        asking.join(10)
        assert len(ended) == 1
        assert "the engine" in ended[0]
        assert gone([engine, follower])
        assert server.http.get("/health").status_code == 503
        said = (tmp_path / "stderr.txt").read_text()
        if number is signal.SIGKILL:
            assert f"tensor-parallel rank 1 of 2 (process {follower}) has ended: killed by signal 9" in said
        else:
            assert "has ended or not answered for 2 s" in said.replace("one of them has ended", "has ended")
        server.signal()
        server.wait()


def test_an_ordinary_end_leaves_no_rank(tmp_path: Path) -> None:
    with serving(tmp_path, SDAR, "--tensor-parallel", "2") as server:
        (engine,) = server.engines
        followers = children(engine)
        assert len(followers) == 1
        server.signal()
        assert server.wait() == 0
        assert gone([engine, *followers], 1.0)
    assert (tmp_path / "stderr.txt").read_text() == ""


def test_a_model_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sfumato", "serve", SDAR, "--port", "0", "--tensor-parallel", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert re.search(
        r"--tensor-parallel 5: 5 ranks: the model's \d+ query heads are not a multiple", done.stderr
    )


@pytest.mark.slow
def test_torchrun_starts_the_ranks(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "sfumato"]
    command = [*launcher, "serve", SDAR, "--port", "0", "--tensor-parallel", "2"]
    with (tmp_path / "stderr.txt").open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://[\d.:]+", process.stdout.readline())
        assert found, (tmp_path / "stderr.txt").read_text()
        body = {"model": SDAR, "messages": QUESTION, "temperature": 0, "seed": 1}
        answer = httpx.post(f"{found[0]}/v1/chat/completions", json=body, timeout=30)
        assert answer.json()["choices"][0]["message"]["content"]
        workers = children(process.pid)
        assert len(workers) == 2
        everybody = workers + [pid for worker in workers for pid in children(worker)]
        process.send_signal(signal.SIGINT)
        process.wait(40)
        assert gone(everybody)
    finally:
        process.kill()
        process.communicate()
