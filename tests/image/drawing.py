"""Helpers of the image tests: specs for any family, runs on one engine, pictures as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from msgspec.structs import replace as changed

from sfumato.core.messages import FinishReason, Output
from sfumato.core.spec import ImageSpec
from sfumato.engine.build_image import LoadedPipeline
from sfumato.engine.image_engine import ImageEngine
from sfumato.engine.image_params import ImageParams, make_image_spec
from sfumato.engine.limits import Limits

PROMPT = "a photo of a red cat sitting on a blue chair"


def spec_for(loaded: LoadedPipeline, **asked: Any) -> ImageSpec:
    """Return a small request to any family: 32 pixels, guided where the family knows how."""
    traits = loaded.traits
    size = traits.default_height if traits.num_classes else 32
    given: dict[str, Any] = {"height": size, "width": size, "seed": 1, "num_inference_steps": 3}
    if traits.num_classes:
        given["class_labels"] = (207,)
    else:
        given["prompt"] = PROMPT
        given["negative_prompt"] = "blurry"
    if "max_sequence_length" in traits.fields:
        given["max_sequence_length"] = 64
    if traits.is_video:
        given["num_frames"] = 5
    return make_image_spec(ImageParams(**{**given, **asked}), traits)


def start(loaded: LoadedPipeline, **options: Any) -> ImageEngine:
    """Start an engine on a loaded pipeline; options: of its configuration, limits among them."""
    limits = Limits(**options.pop("limits", {}))
    return ImageEngine.from_loaded(replace(loaded, config=changed(loaded.config, limits=limits, **options)))


def run(engine: ImageEngine, specs: Sequence[ImageSpec]) -> list[list[Output]]:
    """Submit specs at once and run them to their ends; return each one's outputs."""
    found: dict[str, list[Output]] = {engine.add_request(spec): [] for spec in specs}
    while engine.has_work:
        for turn in engine.step():
            assert not turn.refusals, turn.refusals
            for output in turn.outputs:
                found[output.request_id].append(output)
    return list(found.values())


def pixels(outputs: Sequence[Output]) -> list[bytes]:
    """Return the finished pictures of a request that ended well."""
    assert outputs[-1].finish_reason is FinishReason.STOP, outputs[-1]
    return [picture.pixels for output in outputs for picture in output.pictures if not picture.is_preview]
