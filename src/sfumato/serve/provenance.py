"""Where a picture comes from: the request that draws it again, as a body of the API."""

from __future__ import annotations

from typing import Any

from sfumato.core.spec import ImageSpec
from sfumato.engine.image_params import ImageParams
from sfumato.serve.image_fields import size_text

# What a request says only where it says something else than the default.
_OPTIONAL = (
    "true_cfg_scale",
    "guidance_scale_2",
    "guidance_rescale",
    "cfg_truncation",
    "cfg_normalization",
    "eta",
    "clip_skip",
    "max_sequence_length",
    "timesteps",
    "sigmas",
    "strength",
    "original_size",
    "crops_coords_top_left",
    "target_size",
    "num_frames",
)


def request_of(
    model: str, params: ImageParams, spec: ImageSpec, index: int, *, scheduler: str
) -> dict[str, Any]:
    """Return the body that draws one of a call's pictures again, alone where it has a seed of its own.

    scheduler: the pipeline's own.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": params.prompt,
        "negative_prompt": params.negative_prompt,
        "size": size_text(spec.width, spec.height),
        "seed": spec.seeds[index] if len(spec.seeds) > 1 else spec.seeds[0],
        "num_inference_steps": spec.num_inference_steps,
        "scheduler": {"name": params.scheduler or scheduler, "options": params.scheduler_options},
        "guidance_scale": spec.guidance_scale,
    }
    unset = ImageParams()
    for name in _OPTIONAL:
        value = getattr(params, name)
        if value != getattr(unset, name):
            body[name] = value
    if params.shares_seed:
        body |= {"shares_seed": True, "n": spec.num_images, "class_labels": spec.class_labels}
    elif spec.class_labels:
        body["class_labels"] = (spec.class_labels[index],)
    return {name: value for name, value in body.items() if value not in (None, ())}
