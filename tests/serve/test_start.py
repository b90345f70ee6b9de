"""What a start loads: no torch and no transformers in front, no libraries for pictures in a text engine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.serve.running import SDAR, serving

# Each takes a second or more.
HEAVY = {"transformers", "diffusers", "torchvision", "torchaudio", "accelerate", "PIL", "matplotlib"}


def test_the_front_process_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "import sfumato.serve.commands.program\n"
        "import sfumato.serve.front\n"
        "from sfumato.models.folder import ZOO, default_models\n"
        "from sfumato.text.tokenizer import Tokenizer\n"
        "for name in default_models():\n"
        "    Tokenizer(ZOO / name).apply_chat_template([{'role': 'user', 'content': 'a'}])\n"
        f"assert not {HEAVY | {'torch'}} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_command_line_loads_no_server() -> None:
    code = (
        "import sys\n"
        "from sfumato.serve.cli import run\n"
        "assert run(['--help']) == 0\n"
        f"assert not {HEAVY | {'torch', 'fastapi', 'uvicorn'}} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_server_of_texts_loads_nothing_for_pictures(tmp_path: Path) -> None:
    with serving(tmp_path, SDAR, environment={"PYTHONPROFILEIMPORTTIME": "1"}) as server:
        body = {"model": SDAR, "messages": [{"role": "user", "content": "4+3="}]}
        assert server.http.post("/v1/chat/completions", json=body).status_code == 200
        server.signal()
        assert server.wait() == 0
    # Of both processes: the engine's stream is its parent's.
    loaded = set(
        re.findall(r"^import time:.*\| +(\w+)$", (tmp_path / "stderr.txt").read_text(), re.MULTILINE)
    )
    assert loaded >= {"torch", "fastapi"}
    assert not HEAVY & loaded
