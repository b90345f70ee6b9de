"""Replays image and video cases through the image engine: schedules, each step, pictures.

Tolerances are those of the cases' README: another batching, thread count or machine changes the last bits.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
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
from tests.goldens.replay import Mismatch

_LATENTS, _IMAGE = 1e-4, 2e-3
_SAME_BYTES = 0.999
_TURNS_PER_ARRIVAL = 3
# Arguments of the reference's call that the spec names otherwise, or that say how images are drawn.
_RENAMED = {"prompt", "negative_prompt", "num_images_per_prompt"}


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
    from fnmatch import fnmatch

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


def make_engine(loaded: LoadedPipeline, num_rows: int | None, overlap: bool = False) -> ImageEngine:
    """Start an engine; num_rows: deterministic mode."""
    from dataclasses import replace

    from msgspec.structs import replace as changed

    config = changed(loaded.config, deterministic_rows=num_rows, overlap="on" if overlap else "auto")
    return ImageEngine.from_loaded(replace(loaded, config=config))


def run(
    cases: Sequence[ImageCase],
    loaded: LoadedPipeline,
    *,
    seed: int | None = None,
    num_rows: int | None = None,
    overlap: bool = False,
) -> list[Recording]:
    """Run cases of one pipeline on one engine: at once, or arriving at random times."""
    engine = make_engine(loaded, num_rows, overlap)
    rng = random.Random(seed)
    order = list(range(len(cases)))
    if seed is not None:
        rng.shuffle(order)
    recordings: dict[str, Recording] = {}
    waiting = [(str(index), spec_of(cases[index], loaded)) for index in order]
    while waiting or engine.has_work:
        while waiting and (seed is None or not engine.has_work or not rng.randrange(_TURNS_PER_ARRIVAL)):
            request_id, spec = waiting.pop(0)
            work = RecordingWork(
                begin(loaded.family, spec), loaded.family, is_deterministic=num_rows is not None
            )
            recordings[engine.add_request(work, request_id=request_id)] = Recording(work)
        for turn in engine.step():
            assert not turn.refusals, turn.refusals
            for output in turn.outputs:
                recording = recordings[output.request_id]
                recording.pictures += output.pictures
                recording.last = output
    engine.close()
    return [recordings[str(index)] for index in range(len(cases))]


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


def replay(
    cases: Sequence[ImageCase], seed: int | None, num_rows: int | None, overlap: bool
) -> Iterator[tuple[ImageCase, str | None]]:
    """Replay cases, each alone or all of a pipeline together; yield what differs, or None."""
    by_pipeline: dict[Path, list[ImageCase]] = {}
    for case in cases:
        by_pipeline.setdefault(case.pipeline, []).append(case)
    for path, members in by_pipeline.items():
        loaded = load_case_pipeline(path)
        alone = [run([case], loaded, num_rows=num_rows, overlap=overlap)[0] for case in members]
        recordings = alone
        if seed is not None:
            recordings = run(members, loaded, seed=seed, num_rows=num_rows, overlap=overlap)
        for case, recording, single in zip(members, recordings, alone, strict=True):
            try:
                verify(case, recording)
                if num_rows is not None:
                    same_bits(single, recording)
                yield case, None
            except AssertionError as error:
                yield case, f"{type(error).__name__}: {error}"
