"""What one GPU reaches beside what it could: `python -m benchmarks.gpu`, in less than ten minutes.

Random weights in real configurations. Writes docs/benchmarks/h200.md (--out), section by section, so that
what breaks, or has no time left, loses no other figure. `--device cpu --tiny` runs the same on models of a
few thousand parameters, to prove the script.
"""

from __future__ import annotations

import argparse
import gc
import platform
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks import gpu_images, gpu_kernels
from benchmarks.gpu_text import ENGINE_HEADINGS, FORWARD_HEADINGS, engine_table, forward_table
from benchmarks.gpu_timing import Machine, Section, measure
from sfumato import SamplingParams

OUT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "h200.md"
# A section begins only while so many seconds are left of the budget.
_RESERVE = 45.0
Fill = Callable[[Section], None]


def sections(machine: Machine, *, is_tiny: bool) -> list[tuple[Section, Fill]]:
    """Return all sections in their order: what the others depend on comes first."""
    few, many = ([1, 2], [1, 2]) if is_tiny else ([1, 4], [1, 4, 16])
    prompt, length, block = (16, 16, 8) if is_tiny else (512, 128, 32)
    dual = SamplingParams(
        max_tokens=length,
        ignore_eos=True,
        seed=0,
        block_length=block,
        algorithm="fast_dllm",
        # No token is sure: one a step, as many steps for one request as for sixteen.
        algorithm_parameters={"threshold": 1.0, "cache": "dual"},
    )
    window = SamplingParams(
        max_tokens=16 if is_tiny else 256,
        ignore_eos=True,
        seed=0,
        block_length=block,
        algorithm="d3llm",
        algorithm_parameters={
            "threshold": 0.45,
            "variant": "llada",
            "cache_delay_iter": 1,
            "early_stop": False,
        },
    )
    forwards = lambda name, batches, wanted, **more: forward_table(
        machine, name, batches, is_tiny=is_tiny, wanted=wanted, **more
    )
    engine = lambda batches, params, prompt: engine_table(
        machine, "llada-8b", batches, params, prompt, is_tiny=is_tiny
    )
    return [
        (Section("Kernels", gpu_kernels.HEADINGS), gpu_kernels.fill(machine, is_tiny=is_tiny)),
        (
            Section("LLaDA-8B: a denoise step, 512 tokens of context, block 32", FORWARD_HEADINGS),
            forwards(
                "llada-8b",
                many,
                "Wanted: one request within 1.25 times the floor; 4 and 16 requests at least 3.5 and 11 "
                "times the tokens/s of one. What is possible stands in the last column: the products of 16 "
                "blocks take longer than reading the weights.",
            ),
        ),
        (
            Section("LLaDA-8B with fp8 weights: the same step", FORWARD_HEADINGS),
            forwards("llada-8b", few, "The head stays bfloat16.", quantization="fp8"),
        ),
        (
            Section("LLaDA-8B through the engine: dual cache, prompt 512, one token a step", ENGINE_HEADINGS),
            engine(many, dual, prompt),
        ),
        (
            Section(
                "d3LLM's window: prompt 128, canvas 256", ENGINE_HEADINGS, notes=["Published: 55 forwards/s."]
            ),
            engine([1], window, 16 if is_tiny else 128),
        ),
        (
            Section("LLaDA2.0-mini: a denoise step, 512 tokens of context, block 32", FORWARD_HEADINGS),
            forwards(
                "llada2-mini",
                few,
                "Read are all weights outside the experts, and the experts that a forward's tokens choose. "
                "Wanted: within 1.5 times the floor.",
            ),
        ),
        (
            Section("LLaDA2.0-mini with fp8 weights: the same step", FORWARD_HEADINGS),
            forwards(
                "llada2-mini",
                few,
                "The experts are fp8 too; head and routers stay as they are.",
                quantization="fp8",
            ),
        ),
        (
            Section("A transformer of Stable Diffusion 3's size, 1024 tokens", gpu_images.HEADINGS),
            gpu_images.fill(machine, few if is_tiny else [1, 4, 8], is_tiny=is_tiny),
        ),
    ]


def run(options: argparse.Namespace) -> list[Section]:
    """Run the sections, and write the report after each."""
    started = time.perf_counter()
    machine = measure(options.device, is_tiny=options.tiny)
    done: list[Section] = []
    for section, fill in sections(machine, is_tiny=options.tiny):
        if options.only and not any(
            part in section.title.lower() for part in options.only.lower().split(",")
        ):
            continue
        begun = time.perf_counter()
        if begun - started > options.budget - _RESERVE:
            section.error = "no time was left for it"
        else:
            try:
                fill(section)
            except Exception:
                section.error = traceback.format_exc(limit=-6)
            section.notes.append(f"{time.perf_counter() - begun:.0f} seconds.")
        done.append(section)
        print(section.markdown(), flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(report(machine, done, options), encoding="utf-8")
        gc.collect()
        if options.device != "cpu":
            torch.cuda.empty_cache()
    return done


def report(machine: Machine, done: list[Section], options: argparse.Namespace) -> str:
    """Return the whole page."""
    command = "python -m benchmarks.gpu" + (f" --device {options.device} --tiny" if options.tiny else "")
    lines = [
        f"# {machine.name}",
        "",
        f"`{command}`, {time.strftime('%Y-%m-%d')}. torch {torch.__version__}, triton {_version('triton')}, "
        f"Python {platform.python_version()}. Random weights in real configurations, "
        f"{'float32' if machine.device == 'cpu' else 'bfloat16'}.",
        "",
        f"Copies move {machine.bandwidth / 1e9:.0f} GB/s, read and written; matrix products reach "
        f"{machine.operations / 1e12:.2f} TFLOP/s. A *floor* is the larger of the times that a step's bytes "
        "and its products take at these rates; attention's products are left out.",
        "",
    ]
    return "\n".join(lines) + "\n" + "\n".join(section.markdown() for section in done)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"


def main() -> int:
    """Run what the command line names; the exit status is 1 where a section did not end."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand parameters")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", default="", help="parts of the titles of sections, separated by commas")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds in all")
    options = parser.parse_args()
    if options.tiny and options.out == OUT:
        parser.error("--tiny needs another --out: its figures are of no machine")
    done = run(options)
    return 1 if any(section.error for section in done) else 0


if __name__ == "__main__":
    raise SystemExit(main())
