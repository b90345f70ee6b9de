"""`sfumato models`: what can be served, how far it was verified, and the decoding algorithms."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class _Family:
    """One architecture with the checkpoints that use it and what was compared with what."""

    architecture: str
    checkpoints: str
    attention: str
    verified: str


_FAMILIES = (
    _Family(
        "LLaDAModelLM",
        "LLaDA-8B Base and Instruct, LLaDA-1.5; sfumato-tiny-llada",
        "bidirectional",
        "logits and tokens equal to the official code, Fast-dLLM and dInfer on small random checkpoints; "
        "the published 8B configuration builds with its parameter names and count; its weights were not run",
    ),
    _Family(
        "SDARForCausalLM",
        "SDAR 1.7B to 8B; sfumato-tiny-sdar",
        "block-causal",
        "logits and tokens equal to the official code on small random checkpoints; the published 4B "
        "configuration builds with its parameter names and count; its weights were not run",
    ),
)


def models() -> None:
    """List model families and what was verified how, the embedded models, and the decoding algorithms."""
    from sfumato.models.folder import embedded_models, read_folder
    from sfumato.text.decoding.registry import ALGORITHMS, describe

    console = Console()
    families = _table("Families", "architecture", "checkpoints", "verified")
    for family in _FAMILIES:
        families.add_row(f"{family.architecture}\n{family.attention}", family.checkpoints, family.verified)
    embedded = _table("Embedded models", "name", "architecture", "context", "block", "algorithm")
    for name in embedded_models():
        traits = read_folder(name).traits
        algorithm = _with_parameters(traits.default_algorithm, traits.default_parameters)
        embedded.add_row(
            name, traits.architecture, str(traits.context_length), str(traits.block_length), algorithm
        )
    algorithms = _table("Decoding algorithms", "parameter", "default", "range", "meaning")
    for name in ALGORITHMS:
        algorithms.add_section()
        algorithms.add_row(f"[bold]{name}[/bold]")
        for parameter in describe(name):
            algorithms.add_row(
                f"  {parameter['name']}",
                json.dumps(parameter["default"]),
                _range(parameter),
                parameter.get("doc", ""),
            )
    for table in (families, embedded, algorithms):
        console.print(table)


def _table(title: str, first: str, *others: str) -> Table:
    """Return a table whose first column is never broken."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, overflow="fold")
    return table


def _with_parameters(name: str, parameters: dict[str, Any]) -> str:
    given = ", ".join(f"{key}={value}" for key, value in parameters.items())
    return f"{name} ({given})" if given else name


def _range(parameter: dict[str, Any]) -> str:
    if parameter.get("choices"):
        return "\n".join(parameter["choices"])
    low, high = parameter.get("minimum"), parameter.get("maximum")
    if low is None and high is None:
        return str(parameter["type"])
    return f"{'' if low is None else low} .. {'' if high is None else high}".strip()
