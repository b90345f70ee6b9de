"""`sfumato models`: what can be served, how far it was verified, embedded models, decoding algorithms."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class _Family:
    """One architecture with the checkpoints that use it and what was compared with what.

    kind: how its tokens see each other, or what it draws.
    """

    architecture: str
    checkpoints: str
    kind: str
    verified: str


_SIZE = "the published configuration builds with its names and size; its weights were not run"
_FAMILIES = (
    _Family(
        "LLaDAModelLM",
        "LLaDA-8B, LLaDA-1.5, d3LLM-LLaDA; sfumato-tiny-llada",
        "bidirectional",
        "tokens, canvases and forwards equal to the official code, Fast-dLLM, dInfer and d3LLM on small "
        f"checkpoints; {_SIZE}",
    ),
    _Family(
        "LLaDAMoEModelLM",
        "LLaDA-MoE-7B-A1B",
        "bidirectional",
        "logits equal to Qwen3-MoE's without a mask; written from the published source, weights not run",
    ),
    _Family(
        "LLaDA2MoeModelLM",
        "LLaDA2.0-mini, -flash, -CAP, -Uni (text), LLaDA2.1",
        "block-causal",
        "tokens and forwards equal to SGLang's algorithms, dInfer and diffusers on a small checkpoint; "
        f"{_SIZE}",
    ),
    _Family(
        "DreamModel",
        "Dream-7B, DiffuCoder, d3LLM-Dream",
        "bidirectional, shifted logits",
        f"tokens, canvases and forwards equal to Dream's code, Fast-dLLM and d3LLM on small ones; {_SIZE}",
    ),
    _Family(
        "SDARForCausalLM",
        "SDAR 1.7B to 8B; sfumato-tiny-sdar",
        "block-causal",
        f"tokens and forwards equal to the official code and SGLang on small checkpoints; {_SIZE}",
    ),
    _Family(
        "SDARMoeForCausalLM",
        "SDAR-30B-A3B",
        "block-causal",
        "logits equal to Qwen3-MoE's under its mask, SGLang's tokens; weights not run",
    ),
    _Family(
        "Fast_dLLM_QwenForCausalLM",
        "Fast-dLLM v2 1.5B, 7B",
        "block-causal, shifted logits",
        "logits equal to Qwen2's under its mask, tokens to a plain loop of its source; weights not run",
    ),
    _Family(
        "DiffusionGemmaForBlockDiffusion",
        "DiffusionGemma 26B-A4B, text",
        "causal context, canvas",
        "tokens and forwards equal to transformers and diffusers on a small checkpoint; weights not run",
    ),
)

_STEPS = "schedules, every step and pictures compared with diffusers' own pipeline on a small one"
_UNRUN = f"{_STEPS}; published weights not run"
_PIPELINES = (
    _Family("StableDiffusionPipeline", "Stable Diffusion 1.5, 2.1", "images; from images", _UNRUN),
    _Family("StableDiffusionXLPipeline", "SDXL", "images; from images", _UNRUN),
    _Family("StableDiffusion3Pipeline", "Stable Diffusion 3, 3.5", "images; from images", _UNRUN),
    _Family("FluxPipeline", "FLUX.1-dev, -schnell", "images; from images", _UNRUN),
    _Family("QwenImagePipeline", "Qwen-Image", "images", _UNRUN),
    _Family("ZImagePipeline", "Z-Image, Z-Image-Turbo", "images", _UNRUN),
    _Family("DiTPipeline", "DiT-XL-2", "images of classes", _UNRUN),
    _Family("WanPipeline", "Wan 2.1, 2.2, text to video", "videos", _UNRUN),
)


def models() -> None:
    """List families and what was verified how, the embedded models, and the decoding algorithms."""
    from sfumato.models.folder import ZOO, embedded_models, embedded_pipelines, read_folder, read_json
    from sfumato.text.decoding.registry import ALGORITHMS, describe

    console = Console()
    families = _table("Families", "architecture", "checkpoints", "verified")
    for family in _FAMILIES:
        families.add_row(f"{family.architecture}\n{family.kind}", family.checkpoints, family.verified)
    pipelines = _table("Pipelines of images and videos", "pipeline", "checkpoints", "verified")
    for family in _PIPELINES:
        pipelines.add_row(f"{family.architecture}\n{family.kind}", family.checkpoints, family.verified)
    embedded = _table("Embedded models", "name", "architecture", "context", "block", "algorithm")
    for name in embedded_models():
        traits = read_folder(name).traits
        algorithm = _with_parameters(traits.default_algorithm, traits.default_parameters)
        embedded.add_row(
            name, traits.architecture, str(traits.context_length), str(traits.block_length), algorithm
        )
    drawing = _table("Embedded pipelines", "name", "pipeline", "scheduler")
    for name in embedded_pipelines():
        index = read_json(ZOO / name / "model_index.json") or {}
        drawing.add_row(name, index["_class_name"], index["scheduler"][1])
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
    for table in (families, pipelines, embedded, drawing, algorithms):
        if table.row_count:
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
