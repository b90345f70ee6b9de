"""Replays image and video cases through the image engine: schedules, each step, pictures.

Tolerances are those of the cases' README: another batching, thread count or machine changes the last bits.
"""

from __future__ import annotations

import argparse
import json
import random
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace as changed
from safetensors.torch import load_file
from torch import Tensor

from sfumato.config import EngineConfig
from sfumato.core.messages import Output, Picture
from sfumato.core.plan import RowResult
from sfumato.core.request import Progress
from sfumato.core.spec import ImageSpec, InputImage, TimestepSchedulerSpec
from sfumato.engine.build_image import LoadedPipeline, load_pipeline
from sfumato.engine.image_engine import ImageEngine
from sfumato.engine.image_params import DEFAULT_STRENGTH
from sfumato.image.families.protocol import Family
from sfumato.image.stages import begin
from sfumato.image.state import ImageState
from sfumato.image.work import ImageWork
from tests.goldens.images_apart import start_apart
from tests.goldens.replay import Mismatch

_LATENTS, _IMAGE = 1e-4, 2e-3
_SAME_BYTES = 0.999
_TURNS_PER_ARRIVAL = 3
# Arguments of the reference's call that the spec names otherwise, or that say how images are drawn.
_RENAMED = {"prompt", "negative_prompt", "num_images_per_prompt"}


@dataclass(frozen=True)
class ImageMode:
    """How cases are run: seed of random arrivals, rows of every forward, depth, engines, stages apart."""

    seed: int | None = None
    num_rows: int | None = None
    overlap: str = "off"
    num_replicas: int = 1
    transport: str | None = None


@dataclass(frozen=True)
class ImageCase:
    """One recorded call of a pipeline."""

    name: str
    pipeline: Path
    content: dict[str, Any]
    tensors: dict[str, Tensor]


class RecordingWork(ImageWork):
    """A work that keeps each state and picture that it goes through."""

    def __init__(self, state: ImageState, family: Family, *, is_deterministic: bool = False) -> None:
        super().__init__(state, family, is_deterministic=is_deterministic)
        self.states: list[ImageState] = []

    def advance(self, results: Sequence[RowResult]) -> Progress:
        """Take a stage's outcome and keep it."""
        progress = super().advance(results)
        self.states.append(self.state)
        return progress


@dataclass
class Recording:
    """What one request went through: the state behind each stage, its pictures, how it ended."""

    work: RecordingWork
    pictures: list[Picture] = field(default_factory=list)
    last: Output | None = None

    @property
    def steps(self) -> list[ImageState]:
        """Return the state behind each denoise step."""
        return [state for state in self.work.states if state.noise_pred is not None and state.images is None]


def is_image_folder(folder: Path) -> bool:
    """Whether a folder holds pipelines and recorded calls of them."""
    return (folder / "pipelines").is_dir() and (folder / "cases").is_dir()


def find_image_cases(folder: Path, pattern: str = "*") -> list[ImageCase]:
    """Return the cases whose pipeline matches one of the patterns, by name."""
    found = []
    for path in sorted((folder / "cases").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if any(fnmatch(content["pipeline"], part) for part in pattern.split(",")):
            tensors = load_file(path.with_suffix(".safetensors"))
            found.append(ImageCase(path.stem, folder / "pipelines" / content["pipeline"], content, tensors))
    return found


@lru_cache(maxsize=8)
def load_case_pipeline(path: Path) -> LoadedPipeline:
    """Load a pipeline in float32."""
    return load_pipeline(EngineConfig(model=str(path), dtype="float32"), path, "cpu")


def spec_of(case: ImageCase, loaded: LoadedPipeline) -> ImageSpec:
    """Return the request that a recorded call made."""
    call, traits = dict(case.content["call"]), loaded.traits
    prompts = _texts(call.get("prompt", ""))
    per_prompt = call.get("num_images_per_prompt", 1)
    labels = tuple(call.get("class_labels", ()))
    if labels:
        prompts = ("",) * len(labels)
    negative = call.get("negative_prompt")
    negatives = None if negative is None else _repeated(_texts(negative, len(prompts)), per_prompt)
    image = _input_image(case)
    given = {
        "guidance_scale": traits.default_guidance_scale,
        "num_inference_steps": traits.default_steps,
        "height": traits.default_height if image is None else image.height,
        "width": traits.default_width if image is None else image.width,
        "max_sequence_length": traits.max_sequence_length,
        "true_cfg_scale": traits.default_true_cfg_scale,
        "strength": 1.0 if image is None else DEFAULT_STRENGTH,
    }
    given |= {name: _frozen(value) for name, value in call.items() if name not in _RENAMED}
    return ImageSpec(
        prompts=_repeated(prompts, per_prompt),
        negative_prompts=negatives,
        seeds=tuple(case.content["seeds"]),
        timestep_scheduler=_scheduler(case, loaded),
        image=image,
        **given,
    )


def _texts(given: str | list[str], count: int = 1) -> tuple[str, ...]:
    return (given,) * count if isinstance(given, str) else tuple(given)


def _repeated(texts: tuple[str, ...], times: int) -> tuple[str, ...]:
    return tuple(text for text in texts for _ in range(times))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _scheduler(case: ImageCase, loaded: LoadedPipeline) -> TimestepSchedulerSpec | None:
    asked = case.content["scheduler"]
    if asked["class"] == loaded.traits.scheduler and not asked["overrides"]:
        return None
    return TimestepSchedulerSpec(name=asked["class"], options=asked["overrides"])


def _input_image(case: ImageCase) -> InputImage | None:
    name = case.content.get("image_input")
    if name is None:
        return None
    pixels = case.tensors[name]
    return InputImage(
        pixels=pixels.float().contiguous().numpy().tobytes(), height=pixels.shape[2], width=pixels.shape[3]
    )


def make_engine(loaded: LoadedPipeline, mode: ImageMode) -> ImageEngine:
    """Start an engine as a mode says."""
    config = changed(loaded.config, deterministic_rows=mode.num_rows, overlap=mode.overlap)
    loaded = replace(loaded, config=config)
    return ImageEngine.from_loaded(loaded) if mode.transport is None else start_apart(loaded, mode.transport)


def run(cases: Sequence[ImageCase], loaded: LoadedPipeline, mode: ImageMode) -> list[Recording]:
    """Run cases of one pipeline together: from the start, or arriving at random times, on engines in turn."""
    engines = [make_engine(loaded, mode) for _ in range(mode.num_replicas)]
    rng = random.Random(mode.seed)
    waiting = list(range(len(cases)))
    if mode.seed is not None:
        rng.shuffle(waiting)
    recordings: dict[str, Recording] = {}
    while waiting or any(engine.has_work for engine in engines):
        is_idle = not any(engine.has_work for engine in engines)
        while waiting and (mode.seed is None or is_idle or not rng.randrange(_TURNS_PER_ARRIVAL)):
            is_idle, index = False, waiting.pop(0)
            state = begin(loaded.family, spec_of(cases[index], loaded))
            work = RecordingWork(state, loaded.family, is_deterministic=mode.num_rows is not None)
            engines[index % len(engines)].add_request(work, request_id=str(index))
            recordings[str(index)] = Recording(work)
        for engine in engines:
            _step(engine, recordings)
    for engine in engines:
        engine.close()
    return [recordings[str(index)] for index in range(len(cases))]


def _step(engine: ImageEngine, recordings: dict[str, Recording]) -> None:
    for turn in engine.step() if engine.has_work else []:
        assert not turn.refusals, turn.refusals
        for output in turn.outputs:
            recordings[output.request_id].pictures += output.pictures
            recordings[output.request_id].last = output


def verify(case: ImageCase, recording: Recording) -> None:
    """Compare with what the reference recorded; raises Mismatch naming the first difference."""
    assert recording.last is not None
    if recording.last.error is not None:
        raise Mismatch(recording.last.error)
    tensors, work = case.tensors, recording.work
    scheduler = work.state.timestep_scheduler
    close("timesteps", scheduler.timesteps.float(), tensors["sched.timesteps"].float(), 1e-6)
    if "sched.sigmas" in tensors:
        close("sigmas", scheduler.sigmas.float(), tensors["sched.sigmas"].float(), 1e-6)
    steps = case.content["num_scheduler_steps"]
    if len(recording.steps) != steps:
        raise Mismatch(f"{len(recording.steps)} steps, expected {steps}")
    first = work.states[0].latents
    assert first is not None
    close("initial latents", first, _own_half(tensors["initial_latents"], first), _LATENTS)
    for number, state in enumerate(recording.steps):
        assert state.noise_pred is not None
        assert state.latents is not None
        for name, found in (("noise_pred", state.noise_pred), ("latents", state.latents)):
            close(f"{name}.{number:03d}", found, _own_half(tensors[f"{name}.{number:03d}"], found), _LATENTS)
    _verify_pictures(case, recording)


def _own_half(expected: Tensor, found: Tensor) -> Tensor:
    """DiT steps both branches; the first half is the image's."""
    return expected[: len(found)] if len(expected) == 2 * len(found) else expected


def _verify_pictures(case: ImageCase, recording: Recording) -> None:
    images = recording.work.state.images
    assert images is not None
    expected = case.tensors["image"]
    expected = expected[:, None] if expected.dim() == 4 else expected
    close("image", images, expected, _IMAGE, relative=False)
    levels = case.tensors["image_uint8"].reshape(len(recording.pictures), -1).int()
    for picture, wanted in zip(recording.pictures, levels, strict=True):
        found = torch.frombuffer(bytearray(picture.pixels), dtype=torch.uint8).int()
        share = ((found - wanted).abs() <= 1).float().mean().item()
        if share < _SAME_BYTES:
            raise Mismatch(f"only {share:.4f} of the bytes are within one level")


def close(name: str, found: Tensor, expected: Tensor, tolerance: float, *, relative: bool = True) -> None:
    """Raise Mismatch unless all numbers are within a tolerance, relative to the largest expected one."""
    if found.shape != expected.shape:
        raise Mismatch(f"{name} has shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    limit = tolerance * float(expected.abs().max()) if relative else tolerance
    worst = float((found - expected).abs().max())
    if not worst <= limit:
        raise Mismatch(f"{name} differs by {worst:.3g}, allowed are {limit:.3g}")


def same_bits(alone: Recording, together: Recording) -> None:
    """Raise Mismatch unless every step and picture is the same, bit by bit."""
    for number, (one, other) in enumerate(zip(alone.steps, together.steps, strict=True)):
        assert one.latents is not None
        assert other.latents is not None
        if not torch.equal(one.latents, other.latents):
            worst = float((one.latents - other.latents).abs().max())
            raise Mismatch(f"latents.{number:03d} differ by {worst:.3g} from those alone")
    if [picture.pixels for picture in alone.pictures] != [picture.pixels for picture in together.pictures]:
        raise Mismatch("the pictures differ from those alone")


def refusal(options: argparse.Namespace) -> str | None:
    """Say why a mode cannot run images, or None."""
    if options.tensor_parallel != 1:
        return "--tensor-parallel is for language models: diffusers' models are not divided"
    if options.disaggregate == "nixl":
        return "nixl carries keys and values, of which images have none"
    return None


def replay_folder(
    folder: Path, pipelines: str, options: argparse.Namespace
) -> Iterator[tuple[str, str | None]]:
    """Replay a folder's cases as the command line says; yield each one's name and what differs, or None."""
    mode = ImageMode(
        seed=options.together,
        num_rows=options.deterministic,
        overlap=options.overlap,
        num_replicas=options.data_parallel,
        transport=options.disaggregate,
    )
    cases = find_image_cases(folder, pipelines)
    if not cases:
        yield str(folder), "no case was chosen"
    for path, members in by_pipeline(cases).items():
        try:
            yield from replay(members, load_case_pipeline(path), mode)
        except Exception:  # one broken pipeline must not hide the results of the others
            yield from ((case.name, f"raised\n{traceback.format_exc()}") for case in members)


def by_pipeline(cases: Sequence[ImageCase]) -> dict[Path, list[ImageCase]]:
    """Return cases by the pipeline that they call."""
    found: dict[Path, list[ImageCase]] = {}
    for case in cases:
        found.setdefault(case.pipeline, []).append(case)
    return found


def replay(
    cases: Sequence[ImageCase], loaded: LoadedPipeline, mode: ImageMode
) -> Iterator[tuple[str, str | None]]:
    """Replay cases of one pipeline, each alone or all together; yield what differs, or None."""
    recordings = run(cases, loaded, mode) if mode.seed is not None else None
    for index, case in enumerate(cases):
        needs_single = recordings is None or mode.num_rows is not None
        single = run([case], loaded, replace(mode, seed=None))[0] if needs_single else None
        recording = single if recordings is None else recordings[index]
        assert recording is not None
        try:
            verify(case, recording)
            if single is not None and single is not recording:
                same_bits(single, recording)
            yield case.name, None
        except AssertionError as error:
            yield case.name, f"{type(error).__name__}: {error}"
