"""Frozen, validated descriptions of what a request asks for."""

from __future__ import annotations

import msgspec

ParameterValue = bool | int | float | str | None


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How a token is chosen from one position's logits; temperature 0 means the best token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    logit_bias: dict[int, float] = {}

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken and no random number is drawn for it."""
        return self.temperature == 0.0


class Decoding(msgspec.Struct, frozen=True, kw_only=True):
    """The name of a decoding algorithm and the parameters that differ from its defaults."""

    algorithm: str
    parameters: dict[str, ParameterValue] = {}


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer must obey. kind: json_object, json_schema, regex, choice, lark, tools; source: as text.

    The source of a schema and of choices is JSON, that of tools a grammar in Lark's form.
    """

    kind: str
    source: str = ""


class TextSpec(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """One text request, validated against a model's traits.

    prompt_ids: tokens in front of the canvas, all pinned.
    max_tokens: how many tokens may be output; the canvas is rounded up to whole blocks.
    infill: for each position after the prompt the token that is pinned there, or None where it is open.
    stop_token_ids: tokens that end the output, the model's end tokens among them unless they are ignored.
    logprobs: how many alternatives to report per decided token; None reports nothing.
    choice: index among the choices that share one seed. grammar: what the answer obeys.
    delivered: the first tokens of the answer, which its client has from an engine that is gone; only what is
    behind them is output.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    block_length: int
    decoding: Decoding
    sampling: Sampling = Sampling()
    stop_token_ids: tuple[int, ...] = ()
    infill: tuple[int | None, ...] | None = None
    logprobs: int | None = None
    include_canvas: bool = False
    choice: int = 0
    grammar: Grammar | None = None
    delivered: tuple[int, ...] = ()


class ScoreSpec(msgspec.Struct, frozen=True, kw_only=True, tag="score"):
    """The log likelihood of tokens behind others.

    target_ids: what is scored, behind prompt_ids. num_samples: maskings of a Monte Carlo estimate, drawn in
    strata of batch_size; 0 for models that are scored exactly, block by block. cfg_scale: guidance, 0 is off.
    logprobs: how many alternatives to report per scored token; None reports no tokens.
    """

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    block_length: int
    num_samples: int = 0
    batch_size: int = 1
    seed: int = 0
    cfg_scale: float = 0.0
    logprobs: int | None = None


class TimestepSchedulerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A class of diffusers' schedulers, and the options that differ from the pipeline's configuration."""

    name: str
    options: dict[str, ParameterValue] = {}


class InputImage(msgspec.Struct, frozen=True, kw_only=True):
    """A picture to start from: float32[3, height, width] in 0..1, as bytes."""

    pixels: bytes
    height: int
    width: int


class ImageSpec(msgspec.Struct, frozen=True, kw_only=True, tag="image"):
    """One image request, or one of a short video; the meaning of most fields is that of diffusers' pipelines.

    prompts: one per image that is made together; empty texts for models of classes, which class_labels name.
    seeds: one per image, or a single one from which all images draw together. height, width: pixels.
    timesteps, sigmas: a schedule of its own instead of num_inference_steps. strength: how much of it an
    `image` to start from goes through. num_previews: pictures of the estimate on the way.
    """

    prompts: tuple[str, ...]
    height: int
    width: int
    num_inference_steps: int
    seeds: tuple[int, ...]
    guidance_scale: float
    negative_prompts: tuple[str, ...] | None = None
    class_labels: tuple[int, ...] = ()
    num_frames: int = 1
    true_cfg_scale: float = 1.0
    guidance_scale_2: float | None = None
    guidance_rescale: float = 0.0
    cfg_truncation: float = 1.0
    cfg_normalization: float = 0.0
    eta: float = 0.0
    clip_skip: int | None = None
    max_sequence_length: int = 512
    timestep_scheduler: TimestepSchedulerSpec | None = None
    timesteps: tuple[int, ...] = ()
    sigmas: tuple[float, ...] = ()
    image: InputImage | None = None
    strength: float = 1.0
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    num_previews: int = 0

    @property
    def num_images(self) -> int:
        """Return how many images are made together."""
        return len(self.prompts)


Spec = TextSpec | ScoreSpec | ImageSpec
