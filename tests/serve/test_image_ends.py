"""Two engines of one pipeline: who draws what, and what their ends bring."""

from __future__ import annotations

import base64
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from openai import InternalServerError, OpenAI

from tests.serve.running import PIPELINES, SD15, Server, serving

OURS: dict[str, Any] = {"num_inference_steps": 60, "seed": 3}
OPTIONS = ("--data-parallel", "2", "--deterministic-rows", "4", "--max-step-rows", "8", "--dtype", "float32")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("pair")
    with serving(folder, *OPTIONS, str(PIPELINES[SD15])) as running:
        yield running


def test_engines_end_one_after_the_other(pair: Server) -> None:
    with pair.client() as openai:
        _end_both(pair, openai)
    pair.signal()
    assert pair.wait() == 0
    assert pair.left_behind() == []


def _end_both(pair: Server, openai: OpenAI) -> None:
    def draw(**fields: Any) -> Any:
        return openai.images.generate(prompt="a red circle", extra_body=OURS, **fields)

    expected = base64.b64decode(draw().data[0].b64_json)
    assert len(pair.engines) == 2
    previews = []
    with draw(stream=True, partial_images=4) as stream:
        for event in stream:
            if event.type == "image_generation.completed":
                break
            previews.append(event.partial_image_index)
            if len(previews) == 1:
                # Among idle engines requests go in turn, and this is the second one.
                os.kill(sorted(pair.engines)[1], signal.SIGKILL)
    # The other engine began again; nothing came twice, and the picture is the same.
    assert previews == [0, 1, 2, 3]
    assert base64.b64decode(event.b64_json) == expected
    assert pair.http.get("/health").json()["status"] == "degraded"
    assert base64.b64decode(draw().data[0].b64_json) == expected
    (left,) = pair.left_behind()
    with draw(stream=True, partial_images=1) as stream:
        next(iter(stream))
        os.kill(left, signal.SIGKILL)
        with pytest.raises(Exception, match="gone"):
            list(stream)
    for ask in (draw, lambda: draw(response_format="url")):
        with pytest.raises(InternalServerError) as gone:
            ask()
        assert gone.value.status_code == 503
    assert pair.http.get("/health").status_code == 503
