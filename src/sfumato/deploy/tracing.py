"""Spans of requests, where OpenTelemetry is installed and set up; otherwise nothing, at no cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Protocol

# The attribute that is in every log line too.
REQUEST_ID = "sfumato.request_id"


class Span(Protocol):
    """One part of a request's life."""

    def add_event(self, name: str, attributes: Mapping[str, Any] | None = None) -> None:
        """Note a moment."""
        ...


class _NoSpan:
    """Nobody wants to know."""

    def add_event(self, name: str, attributes: Mapping[str, Any] | None = None) -> None:
        """Note nothing."""


class Tracer:
    """Opens spans; what is passed on to another process goes as a W3C traceparent."""

    def __init__(self) -> None:
        try:
            self._trace: Any = import_module("opentelemetry.trace")
            self._propagate: Any = import_module("opentelemetry.propagate")
        except ImportError:
            self._trace = None

    def parent(self) -> dict[str, str]:
        """Return the span that is open here, as another process or task may take it up."""
        carrier: dict[str, str] = {}
        if self._trace is not None:
            self._propagate.inject(carrier)
        return carrier

    @contextmanager
    def span(self, name: str, request_id: str, parent: Mapping[str, str]) -> Iterator[Span]:
        """Open a span below another one."""
        if self._trace is None:
            yield _NoSpan()
            return
        context = self._propagate.extract(dict(parent))
        tracer = self._trace.get_tracer("sfumato")
        with tracer.start_as_current_span(name, context=context, attributes={REQUEST_ID: request_id}) as span:
            yield span
