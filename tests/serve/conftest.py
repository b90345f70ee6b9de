"""Two servers for the whole folder: one that writes, one that draws; each starts when a test needs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.serve.running import LLADA, PIPELINES, SDAR, Server, bare_checkpoint, serving


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


@pytest.fixture(scope="package")
def drawing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("drawing")
    with serving(folder, "--dtype", "float32", *(str(path) for path in PIPELINES.values())) as running:
        yield running
        running.signal()
        assert running.wait() == 0
        assert running.left_behind() == []
        assert "Traceback" not in (folder / "stderr.txt").read_text()


@pytest.fixture
def artist(drawing: Server) -> Iterator[OpenAI]:
    with drawing.client() as openai:
        yield openai
