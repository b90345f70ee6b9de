"""What the server counts, in Prometheus' form; every series has the model as a label."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from sfumato.core.messages import Turn, Usage
from sfumato.serve.registry import Registry

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKENS_PER_FORWARD = (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
_FORWARDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """One registry of its own, so that two servers in one process do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "requests", "Choices that ended, by endpoint and reason", "endpoint", "end"
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of ended choices")
        self.cached_tokens = self._counter("cached_tokens", "Prompt tokens found in the cache")
        self.tokens = self._counter("completion_tokens", "Tokens emitted by ended choices")
        self.denoise_steps = self._counter("denoise_steps", "Denoise steps of ended choices")
        self.nfe = self._counter("nfe", "Forwards that ended choices had a row in")
        self.request_nfe = self._histogram("request_nfe", "Forwards per choice", _FORWARDS)
        self.tokens_per_forward = self._histogram(
            "tokens_per_forward", "Emitted tokens per forward of a choice", _TOKENS_PER_FORWARD
        )
        self.queue_seconds = self._histogram("queue_seconds", "From arrival to the first forward", _SECONDS)
        self.first_text_seconds = self._histogram(
            "time_to_first_text_seconds", "From arrival to the first committed token", _SECONDS
        )
        self.chunk_seconds = self._histogram(
            "inter_chunk_seconds", "Between two outputs of a choice", _SECONDS
        )
        self.request_seconds = self._histogram(
            "request_seconds", "From arrival to the end of a choice", _SECONDS
        )
        self.pictures = self._counter("pictures", "Pictures and videos drawn, by endpoint", "endpoint")
        self.previews = self._counter("previews", "Pictures of the estimate on the way")
        self.first_preview_seconds = self._histogram(
            "time_to_first_preview_seconds", "From arrival to the first picture of the estimate", _SECONDS
        )
        self.steps = self._counter("steps", "Forwards of the engine, by kind", "kind")
        self.wasted_rows = self._counter(
            "wasted_rows", "Choices that were planned ahead and had ended by then"
        )
        self.rows = self._counter("rows", "Rows in forwards, by kind", "kind")
        self.step_tokens = self._counter("step_tokens", "Positions fed in forwards, by kind", "kind")
        self.step_seconds = self._histogram(
            "step_seconds",
            "Time of a step, on the device and around it on the host",
            _SECONDS,
            "kind",
            "part",
        )
        self.running = self._gauge("running_requests", "Choices with a place in the steps")
        self.waiting = self._gauge("waiting_requests", "Choices that wait for one")
        self.pages = self._gauge("kv_pages", "Pages of the KV pool, by state", "state")
        self.retractions = self._gauge("retractions", "Retractions since the start")
        self.handovers = self._gauge(
            "handovers", "Prompts that prefill engines were asked for since the start, by outcome", "outcome"
        )
        self.draining = self._gauge(
            "kv_pages_draining", "Leased pages that wait until a prefill engine says that it has stopped"
        )
        self.retried = self._gauge(
            "requests_retried", "Requests that went on in another engine since the start, theirs being gone"
        )
        self.replicas = self._gauge("replicas", "Engines that take requests and are there")
        self.up = self._gauge("engine_up", "Whether the engine process is there")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"sfumato_{name}", text, ("model", *labels), registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"sfumato_{name}", text, ("model", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        names = ("model", *labels)
        return Histogram(f"sfumato_{name}", text, names, registry=self.registry, buckets=buckets)

    def observe_turn(self, model: str, turn: Turn) -> None:
        """Count one turn of an engine."""
        for step in turn.steps:
            self.wasted_rows.labels(model).inc(step.wasted_rows)
            if not step.rows:
                # All that was planned had ended by then: no forward.
                continue
            self.steps.labels(model, step.kind).inc()
            self.rows.labels(model, step.kind).inc(step.rows)
            self.step_tokens.labels(model, step.kind).inc(step.tokens)
            self.step_seconds.labels(model, step.kind, "host").observe(step.host_seconds)
            self.step_seconds.labels(model, step.kind, "hidden").observe(step.hidden_seconds)
            self.step_seconds.labels(model, step.kind, "device").observe(step.device_seconds)
        gauges = turn.gauges
        if gauges is None:
            return
        self.running.labels(model).set(gauges.running)
        self.waiting.labels(model).set(gauges.waiting)
        self.pages.labels(model, "free").set(gauges.pages_free)
        self.pages.labels(model, "leased").set(gauges.pages_leased)
        self.pages.labels(model, "cached").set(gauges.pages_cached)
        self.retractions.labels(model).set(gauges.retractions)
        self.handovers.labels(model, "arrived").set(gauges.arrived)
        self.handovers.labels(model, "failed").set(gauges.handovers_failed)
        self.draining.labels(model).set(gauges.pages_draining)

    def observe_gone(self, model: str) -> None:
        """Note that an engine is gone with all it held."""
        self.running.labels(model).set(0)
        self.waiting.labels(model).set(0)

    def observe_end(self, model: str, endpoint: str, end: str, usage: Usage, seconds: float) -> None:
        """Count the end of one choice; seconds: since it arrived."""
        self.requests.labels(model, endpoint, end).inc()
        self.prompt_tokens.labels(model).inc(usage.prompt_tokens)
        self.cached_tokens.labels(model).inc(usage.cached_tokens)
        self.tokens.labels(model).inc(usage.completion_tokens)
        self.denoise_steps.labels(model).inc(usage.denoise_steps)
        self.nfe.labels(model).inc(usage.nfe)
        self.request_seconds.labels(model).observe(seconds)
        if usage.nfe:
            self.request_nfe.labels(model).observe(usage.nfe)
            self.tokens_per_forward.labels(model).observe(usage.tokens_per_forward)

    def observe_drawn(self, model: str, endpoint: str, end: str, usage: Usage, seconds: float) -> None:
        """Count the end of one request that draws; seconds: since it arrived."""
        self.requests.labels(model, endpoint, end).inc()
        self.denoise_steps.labels(model).inc(usage.denoise_steps)
        self.nfe.labels(model).inc(usage.nfe)
        self.request_seconds.labels(model).observe(seconds)
        if usage.nfe:
            self.request_nfe.labels(model).observe(usage.nfe)

    def observe_score(self, model: str, endpoint: str, usage: Usage) -> None:
        """Count tokens that were scored; they are nobody's output and have no rate."""
        self.requests.labels(model, endpoint, "scored").inc()
        self.prompt_tokens.labels(model).inc(usage.prompt_tokens)
        self.cached_tokens.labels(model).inc(usage.cached_tokens)
        self.nfe.labels(model).inc(usage.nfe)


router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return all series in Prometheus' text form."""
    state = request.app.state
    page = page_of(state.metrics, state.registry)
    return Response(await state.join_pages(page), media_type=CONTENT_TYPE_LATEST)


def page_of(counted: Metrics, registry: Registry) -> str:
    """Return this door's own series, with what is true of its engines now."""
    for model in registry.models.values():
        counted.up.labels(model.name).set(not model.client.is_gone)
        counted.replicas.labels(model.name).set(len(model.client.clients) - model.client.num_gone)
        counted.retried.labels(model.name).set(model.client.num_retried)
        if model.client.is_gone:
            counted.observe_gone(model.name)
    return generate_latest(counted.registry).decode()


async def alone(page: str) -> str:
    """Return the page of a front that has no others beside it."""
    return page
