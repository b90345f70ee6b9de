"""One page of metrics for several fronts: each front's own series under its name, those of engines once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

# Every front is told these by all replicas; what it counts for itself is not among them.
OF_ENGINES = frozenset(
    f"sfumato_{name}"
    for name in (
        "steps",
        "wasted_rows",
        "rows",
        "step_tokens",
        "step_seconds",
        "running_requests",
        "waiting_requests",
        "kv_pages",
        "kv_pages_draining",
        "retractions",
        "handovers",
        "replicas",
        "engine_up",
    )
)


def joined(pages: Mapping[str, str]) -> str:
    """Return the pages of all fronts, by their names, as one.

    Of what engines tell, that of the first name is taken, whichever front is asked: counters may not jump.
    """
    families: dict[str, Metric] = {}
    for number, (front, page) in enumerate(sorted(pages.items())):
        for family in text_string_to_metric_families(page):
            is_shared = family.name.removesuffix("_created") in OF_ENGINES
            if is_shared and number:
                continue
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            known.samples += [
                sample if is_shared else sample._replace(labels={"front": front, **sample.labels})
                for sample in family.samples
            ]
    return "".join(line for family in families.values() for line in _lines(family))


def _lines(family: Metric) -> Iterator[str]:
    # The text form names a counter as its samples are named, the parser without their ending.
    name = f"{family.name}_total" if family.type == "counter" else family.name
    yield f"# HELP {name} {family.documentation}\n"
    yield f"# TYPE {name} {family.type}\n"
    for sample in family.samples:
        yield _line(sample)


def _line(sample: Sample) -> str:
    labels = ",".join(f'{name}="{_escaped(value)}"' for name, value in sorted(sample.labels.items()))
    return f"{sample.name}{{{labels}}} {sample.value}\n"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
