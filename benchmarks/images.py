"""Image requests together against diffusers' pipelines one after another: `python -m benchmarks.images`.

Twelve requests arrive over time, with 4 to 30 steps, several timestep schedulers and guidance scales, and
three previews each. One after another: the same weights in diffusers' own pipeline, each request when the one
before has ended; it is run once alone, and who waits for whom follows from its times. A request's solo
latency is that of this pipeline, its slowdown its latency over that. A preview there costs nothing.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from msgspec.structs import replace as changed
from rich.console import Console
from rich.table import Table

from sfumato.config import EngineConfig
from sfumato.core.spec import ImageSpec, ParameterValue
from sfumato.engine.build_image import LoadedPipeline, load_pipeline
from sfumato.engine.image_engine import ImageEngine
from sfumato.engine.image_params import ImageParams, make_image_spec
from sfumato.engine.limits import Limits
from sfumato.image.schedule import clone
from sfumato.image.work import preview_steps

PIPELINES = Path(__file__).resolve().parent.parent / "tests" / "data" / "goldens" / "images" / "pipelines"
STEPS = (4, 30, 8, 16, 6, 24, 12, 4, 20, 8, 10, 28)
SCALES = (4.0, 1.0, 7.0)
SCHEDULERS = {
    "sd3": (None, "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"),
    "sd15": (None, "DDIMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"),
}
# Clipping would make the random model's pictures depend on the last bit.
OPTIONS: dict[str | None, dict[str, ParameterValue]] = {"DDIMScheduler": {"clip_sample": False}}
PROMPTS = ("a photo of a red cat", "an astronaut on the moon", "two birds over the old city")
_NUM_PREVIEWS = 3
# Requests arrive within this share of the time that all of them take one after another.
_ARRIVING = 0.4
# An SD3 transformer of about 50 million parameters; 64 pixels are 256 image tokens.
_LARGE = {"num_layers": 6, "attention_head_dim": 64, "num_attention_heads": 8, "caption_projection_dim": 512}


@dataclass
class Timeline:
    """Seconds on one clock: arrival, first preview, end."""

    arrival: float
    preview: float = 0.0
    end: float = 0.0


@dataclass(frozen=True)
class Figures:
    """What one way of running the requests gave."""

    total: float
    latency: float
    latency_p95: float
    preview: float
    slowdown_p95: float
    forwards: int
    scheduler_share: float = 0.0


def make_pipeline(name: str) -> LoadedPipeline:
    """Return a tiny pipeline, or the one of 50 million parameters around the tiny one's other parts."""
    folder = PIPELINES / ("sd15-tiny" if name == "sd15-tiny" else "sd3-tiny")
    loaded = load_pipeline(EngineConfig(model=str(folder), dtype="float32"), folder, "cpu")
    if name == "sd3-50m":
        from diffusers import SD3Transformer2DModel

        torch.manual_seed(0)
        config = {**loaded.family.pipeline.transformer.config, **_LARGE, "sample_size": 32}
        config = {key: value for key, value in config.items() if not key.startswith("_")}
        loaded.family.pipeline.transformer = SD3Transformer2DModel(**config).eval().requires_grad_(False)
    return loaded


def make_specs(loaded: LoadedPipeline, name: str) -> list[ImageSpec]:
    """Return the twelve requests."""
    side = 64 if name == "sd3-50m" else 32
    asked = SCHEDULERS[name.split("-")[0]]
    specs = []
    for number, steps in enumerate(STEPS):
        params = ImageParams(
            prompt=PROMPTS[number % len(PROMPTS)],
            negative_prompt="blurry",
            height=side,
            width=side,
            num_inference_steps=steps,
            guidance_scale=SCALES[number % len(SCALES)],
            scheduler=asked[number % len(asked)],
            scheduler_options=OPTIONS.get(asked[number % len(asked)], {}),
            seed=number,
            partial_images=_NUM_PREVIEWS,
            **({"max_sequence_length": 16} if name.startswith("sd3") else {}),
        )
        specs.append(make_image_spec(params, loaded.traits))
    return specs


def run_diffusers(loaded: LoadedPipeline, specs: Sequence[ImageSpec]) -> list[tuple[float, float, Any]]:
    """Run each alone in diffusers' pipeline; return seconds to its preview's step, to its end, and pixels."""
    found = []
    for spec in specs:
        parts = {
            **loaded.family.pipeline.components,
            "scheduler": clone(loaded.family.pipeline.scheduler, spec),
        }
        pipeline = type(loaded.family.pipeline)(**parts)
        pipeline.set_progress_bar_config(disable=True)
        seen: dict[int, float] = {}
        preview = min(preview_steps(spec.num_inference_steps, _NUM_PREVIEWS))

        def note(
            pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any], seen: dict[int, float] = seen
        ) -> dict[str, Any]:
            seen[step + 1] = time.perf_counter()
            return kwargs

        extra = {"max_sequence_length": spec.max_sequence_length} if "sd3" in loaded.path else {}
        started = time.perf_counter()
        with torch.no_grad():
            picture = pipeline(
                prompt=spec.prompts[0],
                negative_prompt="blurry",
                height=spec.height,
                width=spec.width,
                num_inference_steps=spec.num_inference_steps,
                guidance_scale=spec.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(spec.seeds[0]),
                output_type="np",
                callback_on_step_end=note,
                **extra,
            ).images[0]
        found.append((seen[preview] - started, time.perf_counter() - started, picture))
    return found


def in_turn(solo: Sequence[tuple[float, float, Any]], arrivals: Sequence[float]) -> list[Timeline]:
    """Return the timelines of requests that wait for one another as they come."""
    free, lines = 0.0, []
    for (preview, seconds, _), arrival in zip(solo, arrivals, strict=True):
        begin = max(free, arrival)
        free = begin + seconds
        lines.append(Timeline(arrival, begin + preview, free))
    return lines


def run_engine(
    loaded: LoadedPipeline, specs: Sequence[ImageSpec], arrivals: Sequence[float], order: str
) -> tuple[list[Timeline], list[bytes], int, float]:
    """Submit requests when they arrive; return timelines, pixels, forwards, the scheduler's share of time."""
    limits = Limits(order=order)
    engine = ImageEngine.from_loaded(replace(loaded, config=changed(loaded.config, limits=limits)))
    planning = _timed(engine)
    lines = [Timeline(arrival) for arrival in arrivals]
    pixels = [b""] * len(specs)
    waiting, names, started = list(range(len(specs))), {}, time.perf_counter()
    num_forwards, denoising = 0, 0.0
    while waiting or engine.has_work:
        now = time.perf_counter() - started
        while waiting and arrivals[waiting[0]] <= now:
            index = waiting.pop(0)
            names[engine.add_request(specs[index])] = index
        if not engine.has_work:
            time.sleep(max(0.0, arrivals[waiting[0]] - now))
            continue
        for turn in engine.step():
            now = time.perf_counter() - started
            steps = [step for step in turn.steps if step.kind == "denoise"]
            num_forwards += len(steps)
            denoising += sum(step.device_seconds for step in steps)
            for output in turn.outputs:
                assert output.error is None, output.error
                line = lines[names[output.request_id]]
                for picture in output.pictures:
                    line.preview = line.preview or now
                    if not picture.is_preview:
                        line.end = now
                        pixels[names[output.request_id]] = picture.pixels
    engine.close()
    return lines, pixels, num_forwards, planning() / denoising


def _timed(engine: ImageEngine) -> Callable[[], float]:
    """Return what tells how long the scheduler has planned so far."""
    seconds, plan = 0.0, engine.loop.scheduler.plan

    def timed(live: Any, kinds: Any) -> Any:
        nonlocal seconds
        started = time.perf_counter()
        made = plan(live, kinds)
        seconds += time.perf_counter() - started
        return made

    engine.loop.scheduler.plan = timed  # type: ignore[method-assign]
    return lambda: seconds


def figures(
    lines: Sequence[Timeline], solo: Sequence[tuple[float, float, Any]], forwards: int, share: float = 0.0
) -> Figures:
    """Sum up one way of running the requests."""
    latencies = [line.end - line.arrival for line in lines]
    slowdowns = [latency / alone[1] for latency, alone in zip(latencies, solo, strict=True)]
    return Figures(
        total=max(line.end for line in lines),
        latency=statistics.mean(latencies),
        latency_p95=float(np.percentile(latencies, 95)),
        preview=statistics.mean(line.preview - line.arrival for line in lines),
        slowdown_p95=float(np.percentile(slowdowns, 95)),
        forwards=forwards,
        scheduler_share=share,
    )


def run_pair(loaded: LoadedPipeline, specs: Sequence[ImageSpec], seed: int) -> dict[str, Figures]:
    """Run the requests all ways; raises AssertionError where pictures differ."""
    solo = run_diffusers(loaded, specs)
    rng = random.Random(seed)
    span = _ARRIVING * sum(seconds for _, seconds, _ in solo)
    arrivals = [0.0, *sorted(rng.uniform(0, span) for _ in specs[1:])]
    found = {"diffusers, one after another": figures(in_turn(solo, arrivals), solo, sum(STEPS))}
    for order in ("fair", "shortest"):
        lines, pixels, forwards, share = run_engine(loaded, specs, arrivals, order)
        for number, ((_, _, picture), drawn) in enumerate(zip(solo, pixels, strict=True)):
            levels = np.frombuffer(drawn, np.uint8).reshape(picture.shape).astype(int)
            near = np.abs(levels - np.round(picture * 255)) <= 1
            assert near.mean() >= 0.999, f"{order}: request {number} differs from diffusers' picture"
        found[f"together, --order {order}"] = figures(lines, solo, forwards, share)
    return found


def add_rows(table: Table, name: str, pairs: Sequence[dict[str, Figures]]) -> None:
    """Add medians over pairs; a ratio above 1 is better than one after another."""
    base = next(iter(pairs[0]))
    for way in pairs[0]:
        cells = []
        for key in ("total", "latency", "latency_p95", "preview", "slowdown_p95"):
            value = statistics.median(getattr(pair[way], key) for pair in pairs)
            ratio = statistics.median(getattr(pair[base], key) / getattr(pair[way], key) for pair in pairs)
            cells += [f"{value:.2f}", f"{ratio:.2f}"]
        last = pairs[-1][way]
        share = "" if way == base else f"{100 * last.scheduler_share:.2f} %"
        table.add_row(name, way, *cells, str(last.forwards), share)


def clone_seconds(loaded: LoadedPipeline, spec: ImageSpec, count: int = 200) -> float:
    """Return the mean time of cloning and planning one request's timestep scheduler."""
    from sfumato.image.stages import begin

    started = time.perf_counter()
    for _ in range(count):
        begin(loaded.family, spec)
    return (time.perf_counter() - started) / count


def main() -> None:
    """Measure what the command line names and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.images", description=__doc__)
    parser.add_argument("--pipelines", default="sd15-tiny,sd3-tiny,sd3-50m")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    console = Console(width=200)
    console.print(f"{platform.machine()}, torch {torch.__version__}, float32, {options.threads} threads")
    table = Table(title=f"twelve image requests over time, medians of {options.pairs} pairs, seconds")
    headings = ("total", "mean latency", "95th percentile", "to first preview", "95th of slowdown")
    table.add_column("pipeline")
    table.add_column("way")
    for heading in headings:
        table.add_column(heading, justify="right")
        table.add_column("ratio", justify="right")
    table.add_column("forwards", justify="right")
    table.add_column("scheduler", justify="right")
    for name in options.pipelines.split(","):
        loaded = make_pipeline(name)
        specs = make_specs(loaded, name)
        console.print(f"{name}: a clone and its plan take {1000 * clone_seconds(loaded, specs[0]):.2f} ms")
        short = [changed(spec, num_inference_steps=4) for spec in specs[:3]]
        run_diffusers(loaded, short)
        run_engine(loaded, short, [0.0] * 3, "fair")
        add_rows(table, name, [run_pair(loaded, specs, seed) for seed in range(options.pairs)])
    console.print(table)


if __name__ == "__main__":
    main()
