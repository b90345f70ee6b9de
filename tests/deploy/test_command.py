"""`sfumato deploy` as people run it: a local cluster that ends with it, and errors in one line."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import pytest

from tests.deploy.clusters import environment_of, everything, free_port, wait_for_nobody

PROGRAM = [sys.executable, "-c", "from sfumato.serve.cli import main; main()", "deploy"]


def test_a_file_that_says_nothing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text("models: {}", encoding="utf-8")
    ended = subprocess.run([*PROGRAM, str(path)], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == f"sfumato: error: {path}: 'models' names no model\n"


@pytest.mark.ray
@pytest.mark.slow
def test_a_local_cluster_serves_and_ends_with_the_command() -> None:
    folder = Path(tempfile.mkdtemp(prefix="sfr", dir="/tmp"))
    path, port, before = folder / "deploy.yaml", free_port(), everything()
    path.write_text(
        f"models: {{sfumato-tiny-sdar: {{threads: 1, kv-memory: 16M}}}}\nhttp: {{port: {port}}}",
        encoding="utf-8",
    )
    try:
        with subprocess.Popen(
            [*PROGRAM, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment_of(folder),
        ) as process:
            assert process.stdout is not None
            said = next((line for line in process.stdout if line.startswith("sfumato: serving")), "")
            found = re.search(r"http://\S+", said)
            assert found, process.stderr.read() if process.stderr is not None else ""
            body = {"model": "sfumato-tiny-sdar", "prompt": "12+7=", "max_tokens": 8}
            answer = httpx.post(f"{found[0]}/completions", json=body, timeout=30)
            assert answer.status_code == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
    finally:
        wait_for_nobody(str(folder), before)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
def test_an_engine_that_cannot_start_says_why_in_one_line() -> None:
    folder = Path(tempfile.mkdtemp(prefix="sfr", dir="/tmp"))
    path, before = folder / "deploy.yaml", everything()
    path.write_text(
        f"models: {{sfumato-tiny-sdar: {{kv-memory: 1}}}}\nhttp: {{port: {free_port()}}}", encoding="utf-8"
    )
    try:
        ended = subprocess.run(
            [*PROGRAM, str(path)], capture_output=True, text=True, check=False, env=environment_of(folder)
        )
        assert ended.returncode == 1
        last = ended.stderr.strip().splitlines()[-1]
        assert re.match(r"sfumato: error: Ray: ConfigError: .*kv", last), ended.stderr[-2000:]
    finally:
        wait_for_nobody(str(folder), before)
        shutil.rmtree(folder, ignore_errors=True)
        assert "RAY_ADDRESS" not in os.environ
