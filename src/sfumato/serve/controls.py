"""What a request may choose, with defaults and ranges, so that a client can draw its controls from it.

The doors check the same ranges; a test asks them at both ends of each.
"""

from __future__ import annotations

import msgspec

from sfumato.core.traits import ImageTraits, ModelTraits
from sfumato.serve.fields import INT64_MAX, INT64_MIN
from sfumato.serve.image_fields import size_text

_MAX_TEMPERATURE = 100.0
_MAX_IMAGE_STEPS = 1000
_MAX_SCALE = 100.0
_MAX_TEXT = 1024


class Control(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One field of a request; default: what leaving it out means, null where that depends or is drawn.

    type: "int", "float", "str" or "size". unit: values are whole multiples of it.
    """

    name: str
    type: str
    doc: str
    # Sent where it is null too: the value of a factory is not taken for one to be left out.
    default: bool | int | float | str | None = msgspec.field(default_factory=lambda: None)
    minimum: int | float | None = None
    maximum: int | float | None = None
    unit: int | None = None
    choices: tuple[str, ...] | None = None


def text_controls(traits: ModelTraits, page_size: int) -> list[Control]:
    """Return what every text request may choose beside its algorithm."""
    most = traits.context_length
    unit = page_size if traits.has_exact_cache and traits.context_granularity != 1 else 1
    shortest, longest = unit, most // unit * unit
    if traits.fixed_block_length:
        shortest = longest = unit = traits.block_length
    return [
        Control(
            name="max_tokens",
            type="int",
            default=traits.default_max_tokens,
            minimum=1,
            maximum=most,
            doc="output tokens at most",
        ),
        Control(
            name="block_length",
            type="int",
            default=traits.block_length,
            minimum=shortest,
            maximum=longest,
            unit=unit,
            doc="tokens that are denoised together",
        ),
        Control(
            name="temperature",
            type="float",
            default=0.0,
            minimum=0.0,
            maximum=_MAX_TEMPERATURE,
            doc="0 takes the best token",
        ),
        Control(
            name="top_p",
            type="float",
            default=1.0,
            minimum=0.0,
            maximum=1.0,
            doc="share of the probability that is drawn from; above 0",
        ),
        Control(
            name="top_k",
            type="int",
            default=0,
            minimum=0,
            maximum=traits.vocab_size,
            doc="so many of the best tokens are drawn from; 0 is all",
        ),
        Control(name="ignore_eos", type="bool", default=False, doc="go on behind the model's end tokens"),
        Control(
            name="seed", type="int", minimum=INT64_MIN, maximum=INT64_MAX, doc="drawn where it is left out"
        ),
    ]


def image_controls(traits: ImageTraits) -> list[Control]:
    """Return what a request for a picture may choose beside its prompt."""
    return [
        Control(
            name="size",
            type="size",
            default=size_text(traits.default_width, traits.default_height),
            unit=traits.size_unit,
            doc=f"width and height, multiples of {traits.size_unit}",
        ),
        Control(
            name="num_inference_steps",
            type="int",
            default=traits.default_steps,
            minimum=1,
            maximum=_MAX_IMAGE_STEPS,
            doc="denoise steps",
        ),
        Control(
            name="scheduler",
            type="str",
            default=traits.scheduler,
            choices=traits.schedulers,
            doc="the timestep scheduler: which noise levels, and how a step is taken",
        ),
        *(control for control in _family_controls(traits) if control.name in traits.fields),
        Control(name="seed", type="int", minimum=0, maximum=INT64_MAX, doc="drawn where it is left out"),
    ]


def _family_controls(traits: ImageTraits) -> list[Control]:
    """Return what only some families know."""
    return [
        Control(
            name="guidance_scale",
            type="float",
            default=traits.default_guidance_scale,
            minimum=0.0,
            maximum=_MAX_SCALE,
            doc="how strongly the prompt pulls",
        ),
        Control(name="negative_prompt", type="str", default="", doc="what the picture is to be unlike"),
        Control(
            name="true_cfg_scale",
            type="float",
            default=traits.default_true_cfg_scale,
            minimum=0.0,
            maximum=_MAX_SCALE,
            doc="guidance away from the negative prompt; 1 is off",
        ),
        Control(
            name="guidance_rescale",
            type="float",
            default=0.0,
            minimum=0.0,
            maximum=1.0,
            doc="share of the answer whose contrast is brought back",
        ),
        Control(
            name="eta",
            type="float",
            default=0.0,
            minimum=0.0,
            maximum=1.0,
            doc="fresh noise in a step, where the timestep scheduler knows it",
        ),
        Control(
            name="max_sequence_length",
            type="int",
            default=traits.max_sequence_length,
            minimum=1,
            maximum=_MAX_TEXT,
            doc="text tokens that are read",
        ),
    ]
