"""Spans of requests: one trace over processes, the request's id in each; nothing where nobody wants it."""

from __future__ import annotations

import asyncio

import pytest

from sfumato.deploy.tracing import REQUEST_ID, Tracer
from tests.deploy.running import SLOW, cluster, collect, submission


def test_without_opentelemetry_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("sfumato.deploy.tracing.import_module", missing)
    tracer = Tracer()
    with tracer.span("request", "r", tracer.parent()) as span:
        span.add_event("lost", {"reason": "none"})
    assert tracer.parent() == {}


def test_one_trace_holds_both_sides_of_a_request() -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    async def serve() -> None:
        async with cluster(1) as one:
            for tracer in (one.front._sending.tracer, one.workers["w0"]._tracer):
                tracer._trace = _Provided(provider)
            await collect(one.front, [submission(one.front, "r", SLOW)])
            await asyncio.sleep(0.1)

    asyncio.run(asyncio.wait_for(serve(), 60))
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"request", "run"}
    assert {span.attributes[REQUEST_ID] for span in spans.values()} == {"r"}
    assert spans["run"].context.trace_id == spans["request"].context.trace_id
    assert spans["run"].parent.span_id == spans["request"].context.span_id


class _Provided:
    """The module `opentelemetry.trace` with a provider of the test's own."""

    def __init__(self, provider: object) -> None:
        self.get_tracer = provider.get_tracer  # type: ignore[attr-defined]
