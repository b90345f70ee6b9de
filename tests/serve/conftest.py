"""One server for the whole folder: both embedded models and one without a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.serve.running import LLADA, SDAR, Server, bare_checkpoint, serving


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    arguments = ("--dtype", "float32", SDAR, LLADA, str(bare_checkpoint(folder)))
    with serving(folder, *arguments) as running:
        yield running
        running.signal()
        assert running.wait() == 0
        assert running.left_behind() == []
        assert "Traceback" not in (folder / "stderr.txt").read_text()


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as openai:
        yield openai
