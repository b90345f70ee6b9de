"""The page of several fronts: their own series side by side, those of the engines once."""

from __future__ import annotations

import asyncio

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sfumato.core.messages import StepStats, Turn, Usage
from sfumato.deploy.desk import Desk
from sfumato.deploy.links import Links
from sfumato.deploy.pages import OF_ENGINES, joined
from sfumato.serve.metrics import Metrics


def page(num_requests: int) -> str:
    """Return the page of a front that has answered some requests, and was told of one step by an engine."""
    counted = Metrics()
    for _ in range(num_requests):
        counted.observe_end("m", "/v1/completions", "stop", Usage(completion_tokens=4, nfe=2), 0.5)
    step = StepStats(launch_id=1, kind="denoise", rows=2, tokens=8, host_seconds=0.1, device_seconds=0.2)
    counted.observe_turn("m", Turn(steps=(step,)))
    return generate_latest(counted.registry).decode()


def samples(text: str, name: str) -> dict[str | None, float]:
    return {
        sample.labels.get("front"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def test_series_of_fronts_are_told_apart_and_those_of_engines_come_once() -> None:
    text = joined({"a": page(3), "b": page(5)})
    assert samples(text, "sfumato_requests_total") == {"a": 3, "b": 5}
    assert samples(text, "sfumato_steps_total") == {None: 1}
    assert samples(text, "sfumato_request_seconds_count") == {"a": 3, "b": 5}


def test_the_series_of_engines_are_those_of_the_page() -> None:
    assert {family.name for family in Metrics().registry.collect()} >= OF_ENGINES


def test_fronts_ask_each_other() -> None:
    async def ask() -> None:
        desks = [Desk("127.0.0.1", silence_seconds=1.0) for _ in range(2)]
        for number, desk in enumerate(desks):
            desk.page = lambda number=number: page(number)  # type: ignore[misc]
        links = Links.of_front("c", silence_seconds=1.0)
        try:
            fronts = {str(number): desk.front for number, desk in enumerate(desks)}
            found = await links.pages(fronts, timeout=5)
            assert {name: samples(text, "sfumato_nfe_total") for name, text in found.items()} == {
                "0": {},
                "1": {None: 2},
            }
            await desks[1].close()
            assert set(await links.pages(fronts, timeout=0.5)) == {"0"}
        finally:
            await links.close()
            await desks[0].close()

    asyncio.run(ask())
