"""Between people and the engine: parameters become a spec, outputs become text. No tensor, no model.

Runs beside the engine, so that tokenisation and detokenisation never hold up a step.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import msgspec

from sfumato.core.messages import CanvasView, FinishReason, Output, TokenLogprob, Usage
from sfumato.core.spec import Decoding, Grammar, ParameterValue, Sampling, ScoreSpec, TextSpec
from sfumato.core.traits import BlockOrigin, ModelTraits
from sfumato.errors import RequestError
from sfumato.text.tokenizer import StopStrings, TextStream, Tokenizer

_SEED_BITS = 63


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller may ask for; None takes the model's or the operator's default.

    max_tokens: output tokens. temperature: 0 takes the best token. seed: drawn and reported where None.
    n: choices. stop: strings that end the text; stop_token_ids: tokens. logprobs: alternatives per token.
    algorithm, algorithm_parameters: the decoding algorithm by name. block_length: tokens denoised together.
    infill: tokens pinned behind the prompt, None where open. grammar: what the answer obeys.
    priority: higher goes first. timeout: seconds.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: dict[int, float] = {}
    algorithm: str | None = None
    algorithm_parameters: dict[str, ParameterValue] = {}
    block_length: int | None = None
    infill: tuple[int | None, ...] | None = None
    grammar: Grammar | None = None
    include_canvas: bool = False
    priority: int = 0
    timeout: float | None = None


# A request that says nothing gets this many tokens where neither the checkpoint nor its context say less.
_DEFAULT_MAX_TOKENS = 1024
MAX_CHOICES = 128
# Maskings of a Monte Carlo estimate, as the LLaDA paper evaluates with, and how many share a stratum.
_DEFAULT_SAMPLES = 128
_DEFAULT_STRATUM = 16


def draw_seed() -> int:
    """Return a seed for a request that brought none."""
    return secrets.randbits(_SEED_BITS)


def check_params(params: SamplingParams) -> None:
    """Raise RequestError for what concerns a whole request rather than one of its choices."""
    if not 1 <= params.n <= MAX_CHOICES:
        raise RequestError(
            f"n is {params.n}, it must be between 1 and {MAX_CHOICES}",
            field="n",
            value=params.n,
            limit=MAX_CHOICES,
        )
    if params.timeout is not None and params.timeout <= 0:
        raise RequestError(
            f"timeout is {params.timeout}, it must be above 0 seconds",
            field="timeout",
            value=params.timeout,
            limit=0,
        )
    if params.block_length is not None and params.block_length < 1:
        raise RequestError(
            f"block_length is {params.block_length}, it must be at least 1",
            field="block_length",
            value=params.block_length,
            limit=1,
        )


def make_spec(
    prompt_ids: Sequence[int], params: SamplingParams, traits: ModelTraits, *, choice: int = 0
) -> TextSpec:
    """Combine a request's parameters with the model's defaults; `params.seed` must be set by now."""
    check_params(params)
    block_length = traits.block_length if params.block_length is None else params.block_length
    stops = params.stop_token_ids if params.ignore_eos else (*traits.eos_token_ids, *params.stop_token_ids)
    return TextSpec(
        prompt_ids=tuple(prompt_ids),
        max_tokens=_max_tokens(len(prompt_ids), params, traits, block_length),
        block_length=block_length,
        decoding=decoding_of(params, traits),
        sampling=Sampling(
            temperature=params.temperature,
            top_k=max(0, params.top_k),
            top_p=params.top_p,
            seed=params.seed or 0,
            logit_bias=params.logit_bias,
        ),
        stop_token_ids=tuple(dict.fromkeys(stops)),
        infill=params.infill,
        grammar=params.grammar,
        logprobs=params.logprobs,
        include_canvas=params.include_canvas,
        choice=choice,
    )


def make_score_spec(
    prompt_ids: Sequence[int],
    target_ids: Sequence[int],
    traits: ModelTraits,
    *,
    num_samples: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    cfg_scale: float = 0.0,
    logprobs: int | None = None,
    block_length: int | None = None,
) -> ScoreSpec:
    """Return what scores target_ids behind prompt_ids; an estimate takes 128 samples in strata of 16."""
    is_exact = traits.has_exact_cache
    samples = (0 if is_exact else _DEFAULT_SAMPLES) if num_samples is None else num_samples
    return ScoreSpec(
        prompt_ids=tuple(prompt_ids),
        target_ids=tuple(target_ids),
        block_length=block_length or traits.block_length,
        num_samples=samples,
        batch_size=min(_DEFAULT_STRATUM, max(1, samples)) if batch_size is None else batch_size,
        seed=seed,
        cfg_scale=cfg_scale,
        logprobs=logprobs,
    )


def decoding_of(params: SamplingParams, traits: ModelTraits) -> Decoding:
    """Return the request's algorithm; the default's own parameters hold where the default is chosen."""
    name = params.algorithm or traits.default_algorithm
    defaults = traits.default_parameters if name == traits.default_algorithm else {}
    return Decoding(algorithm=name, parameters={**defaults, **params.algorithm_parameters})  # type: ignore[dict-item]


def _max_tokens(prompt_len: int, params: SamplingParams, traits: ModelTraits, block_length: int) -> int:
    if params.max_tokens is not None:
        return params.max_tokens
    if params.infill is not None:
        return len(params.infill)
    wanted = traits.default_max_tokens or _DEFAULT_MAX_TOKENS
    origin = 0 if traits.block_origin is BlockOrigin.START else prompt_len
    room = origin + (traits.context_length - origin) // block_length * block_length - prompt_len
    return max(1, min(wanted, room))


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new for one choice: text that can no longer change, its tokens, a canvas, perhaps the end."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    canvas: CanvasView | None = None
    usage: Usage = Usage()
    finish_reason: FinishReason | None = None
    error: str | None = None
    met_stop_string: bool = False
    queue_seconds: float | None = None


@dataclass(slots=True)
class Assembler:
    """Turns the outputs of one choice into text; a stop string ends it before the engine knows.

    shown_tokens: special tokens that are part of the text.
    """

    tokenizer: Tokenizer | None
    stop: tuple[str, ...] = ()
    shown_tokens: Collection[str] = ()
    is_finished: bool = False
    _stream: TextStream | None = field(init=False, default=None)
    _stops: StopStrings | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.tokenizer is not None:
            self._stream = TextStream(self.tokenizer, self.shown_tokens)
            self._stops = StopStrings(self.stop)
        elif self.stop:
            raise RequestError(
                "stop strings need a tokenizer; this model has none", field="stop", value=self.stop
            )

    def push(self, output: Output) -> Delta:
        """Return what an output brings; after a stop string the caller aborts the request."""
        is_last = output.finish_reason is not None
        text, met = "", False
        if self._stream is not None and self._stops is not None:
            text, met = self._stops.push(
                self._stream.push(output.token_ids, is_last=is_last), is_last=is_last
            )
        self.is_finished = is_last or met
        return Delta(
            text=text,
            token_ids=output.token_ids,
            logprobs=output.logprobs,
            canvas=output.canvas,
            usage=output.usage,
            finish_reason=FinishReason.STOP if met else output.finish_reason,
            error=None if met else output.error,
            met_stop_string=met and not is_last,
            queue_seconds=output.queue_seconds,
        )
