"""The door: what can never be served is refused here, with the field, the value and the limit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from sfumato.core.spec import ImageSpec, ScoreSpec, Spec, TextSpec
from sfumato.core.traits import ModelTraits
from sfumato.errors import NotSupported, RequestError
from sfumato.text.canvas import Canvas, canvas_length, make_canvas
from sfumato.text.checks import check_range, check_tokens
from sfumato.text.constraint import Constraint
from sfumato.text.decoding.protocol import Algorithm
from sfumato.text.decoding.registry import make_algorithm
from sfumato.text.ends import EndRule, PrefixEnd
from sfumato.text.grammars import Grammars, field_of
from sfumato.text.random_source import CounterSource, RandomSource
from sfumato.text.scoring import MonteCarloWork, SequentialWork, check_score, draw_masks
from sfumato.text.work import TextWork

MAX_ALTERNATIVES = 20


@dataclass(frozen=True, slots=True)
class Replay:
    """What reference mode puts in place of the served parts; in-process only."""

    algorithm: Algorithm
    end_rule: EndRule
    random_source: RandomSource


@dataclass(frozen=True, slots=True)
class ScoreReplay:
    """The maskings of a recorded estimate, bool[S, T]."""

    masks: NDArray[np.bool_]


@dataclass(slots=True)
class TextDoor:
    """Checks specs and builds the work of requests.

    num_pages: pages of the pool. max_score_tokens: of one step's scoring rows. grammars: None for a model
    without a tokenizer. replays: prepared by an in-process caller, by request id.
    """

    traits: ModelTraits
    page_size: int
    num_pages: int
    max_logits_bytes: int
    max_score_tokens: int
    grammars: Grammars | None = None
    replays: dict[str, Replay | ScoreReplay] = field(default_factory=dict)

    def __call__(self, request_id: str, spec: Spec) -> TextWork | MonteCarloWork | SequentialWork:
        """Build the work of one request. Raises RequestError."""
        replay = self.replays.pop(request_id, None)
        match spec:
            case ScoreSpec():
                return self._score(spec, replay if isinstance(replay, ScoreReplay) else None)
            case TextSpec():
                assert not isinstance(replay, ScoreReplay)
                return self._text(spec, replay)
            case ImageSpec():
                raise _no_image()
            case _:
                assert_never(spec)

    def _score(self, spec: ScoreSpec, replay: ScoreReplay | None = None) -> MonteCarloWork | SequentialWork:
        check_score(spec, self.traits, self.page_size)
        work: MonteCarloWork | SequentialWork
        if self.traits.has_exact_cache:
            work = SequentialWork(spec, self.traits, self.page_size, self.max_score_tokens)
        else:
            masks = draw_masks(len(spec.target_ids), spec) if replay is None else replay.masks
            work = MonteCarloWork(spec, self.traits, masks, self.max_score_tokens)
        self._check_pages(work.standing("").pages_at_most, len(work.token_ids))
        return work

    def _text(self, spec: TextSpec, replay: Replay | None) -> TextWork:
        if replay is None:
            work = self._build(spec, self._check_spec(spec))
        else:
            work = self._build(spec, replay.algorithm, replay)
        self._check_pages(work.standing("").pages_at_most, work.canvas.length)
        return work

    def check(self, spec: Spec) -> None:
        """Raise RequestError for what can never be served."""
        match spec:
            case ScoreSpec():
                self._score(spec)
            case TextSpec():
                self._text(spec, None)
            case ImageSpec():
                raise _no_image()
            case _:
                assert_never(spec)

    def _build(self, spec: TextSpec, algorithm: Algorithm, replay: Replay | None = None) -> TextWork:
        source: RandomSource = CounterSource(spec.sampling.seed, spec.choice)
        end_rule: EndRule = PrefixEnd(frozenset(spec.stop_token_ids))
        if replay is not None:
            source, end_rule = replay.random_source, replay.end_rule
        canvas = make_canvas(spec, self.traits, source, is_one_block=algorithm.spans_canvas)
        return TextWork(
            spec,
            self.traits,
            canvas=canvas,
            algorithm=algorithm,
            walk=algorithm.walk(canvas, spec, self.traits),
            end_rule=end_rule,
            page_size=self.page_size,
            excluded_ids=(self.traits.mask_token_id,)
            if replay is None and self.traits.has_mask_token
            else (),
            constraint=self._constraint(spec, algorithm, canvas),
        )

    def _constraint(self, spec: TextSpec, algorithm: Algorithm, canvas: Canvas) -> Constraint | None:
        """Return a request's grammar where it has one. Raises RequestError."""
        grammar = spec.grammar
        if grammar is None:
            return None
        field = field_of(grammar)
        if self.grammars is None:
            raise NotSupported(f"{field}: this model has no tokenizer", field=field)
        if not algorithm.obeys_grammars:
            raise NotSupported(f"{field} does not go with algorithm {spec.decoding.algorithm!r}", field=field)
        if not set(self.traits.eos_token_ids) <= set(spec.stop_token_ids):
            raise RequestError(
                f"{field} does not go with ignore_eos: the grammar says where to end", field=field
            )
        made = Constraint(
            self.grammars.matcher(grammar),
            vocab_size=self.traits.vocab_size,
            end_ids=self.traits.eos_token_ids,
            field=field,
        )
        made.follow(canvas)
        return made

    def _check_spec(self, spec: TextSpec) -> Algorithm:
        """Return the request's algorithm. Raises RequestError."""
        self._check_tokens(spec)
        self._check_delivered(spec)
        self._check_sampling(spec)
        self._check_room(spec)
        algorithm = make_algorithm(spec.decoding)
        if algorithm.renoises == self.traits.has_mask_token:
            needs = "no mask token" if algorithm.renoises else "a mask token"
            raise NotSupported(
                f"algorithm {spec.decoding.algorithm!r} needs a model with {needs}",
                field="algorithm",
                value=spec.decoding.algorithm,
            )
        num_open = max(1, self._canvas_length(spec) - len(spec.prompt_ids))
        algorithm.check(
            block_length=spec.block_length,
            num_blocks=-(-num_open // spec.block_length),
            is_bidirectional=not self.traits.has_exact_cache,
        )
        return algorithm

    def _check_pages(self, num_pages: int, length: int) -> None:
        if num_pages > self.num_pages:
            raise RequestError(
                f"prompt and max_tokens need {num_pages} KV pages of {self.page_size} tokens, "
                f"the engine has {self.num_pages}",
                field="max_tokens",
                value=length,
                limit=self.num_pages * self.page_size,
            )

    def _canvas_length(self, spec: TextSpec) -> int:
        return canvas_length(
            self.traits,
            prompt_len=len(spec.prompt_ids),
            max_tokens=spec.max_tokens,
            block_length=spec.block_length,
            is_exact=spec.infill is not None,
        )

    def _check_tokens(self, spec: TextSpec) -> None:
        vocab_size = self.traits.vocab_size
        if not spec.prompt_ids and spec.infill is None:
            raise RequestError(
                "the prompt is empty; at least one token is needed", field="prompt", value=[], limit=1
            )
        given = {"prompt": spec.prompt_ids, "stop_token_ids": spec.stop_token_ids}
        given["infill"] = tuple(token for token in spec.infill or () if token is not None)
        given["logit_bias"] = tuple(spec.sampling.logit_bias)
        for name, tokens in given.items():
            check_tokens(name, tokens, vocab_size)
        if spec.infill is not None and len(spec.infill) != spec.max_tokens:
            raise RequestError(
                f"infill has {len(spec.infill)} positions, max_tokens is {spec.max_tokens}; not equal",
                field="infill",
                value=len(spec.infill),
                limit=spec.max_tokens,
            )

    def _check_delivered(self, spec: TextSpec) -> None:
        check_tokens("delivered", spec.delivered, self.traits.vocab_size)
        length = len(spec.delivered)
        if length and length >= spec.max_tokens:
            raise RequestError(
                f"delivered has {length} tokens, an answer of {spec.max_tokens} has ended with them",
                field="delivered",
                value=length,
                limit=spec.max_tokens - 1,
            )
        for token in spec.delivered:
            if token in spec.stop_token_ids:
                raise RequestError(
                    f"delivered has the stop token {token}: the answer has ended with it",
                    field="delivered",
                    value=token,
                )

    def _check_sampling(self, spec: TextSpec) -> None:
        sampling = spec.sampling
        check_range("temperature", sampling.temperature, 0.0, 100.0)
        check_range("top_p", sampling.top_p, 0.0, 1.0)
        if sampling.top_p == 0.0:
            raise RequestError("top_p is 0, it must be above 0", field="top_p", value=0.0, limit="(0, 1]")
        check_range("top_k", sampling.top_k, 0, self.traits.vocab_size)
        check_range("max_tokens", spec.max_tokens, 1, None)
        for token, bias in sampling.logit_bias.items():
            check_range(f"logit_bias.{token}", bias, -100.0, 100.0)
        if spec.logprobs is not None:
            check_range("top_logprobs", spec.logprobs, 0, MAX_ALTERNATIVES)

    def _check_room(self, spec: TextSpec) -> None:
        traits, block = self.traits, spec.block_length
        check_range("block_length", block, 1, traits.context_length)
        if traits.fixed_block_length and block != traits.block_length:
            raise NotSupported(
                f"block_length {block}: this model only decodes blocks of {traits.block_length}",
                field="block_length",
                value=block,
                limit=traits.block_length,
            )
        if traits.has_exact_cache and traits.context_granularity != 1 and block % self.page_size:
            raise NotSupported(
                f"block_length {block} is not a whole number of pages of {self.page_size} tokens",
                field="block_length",
                value=block,
                limit=self.page_size,
            )
        length = self._canvas_length(spec)
        if length <= len(spec.prompt_ids):
            raise RequestError(
                f"the prompt's {len(spec.prompt_ids)} tokens leave no room for a token "
                f"in the context of {traits.context_length}",
                field="prompt",
                value=len(spec.prompt_ids),
                limit=traits.context_length,
            )
        wanted = len(spec.prompt_ids) + spec.max_tokens
        if spec.infill is not None and length < wanted:
            raise RequestError(
                f"the prompt and the infill have {wanted} tokens, the context {traits.context_length}",
                field="infill",
                value=wanted,
                limit=traits.context_length,
            )
        logits_bytes = min(block, length) * traits.vocab_size * 4
        if logits_bytes > self.max_logits_bytes:
            raise RequestError(
                f"block_length {block} needs {logits_bytes} logits bytes of {self.max_logits_bytes}",
                field="block_length",
                value=block,
                limit=self.max_logits_bytes,
            )


def _no_image() -> RequestError:
    return RequestError("this model writes text; an image model draws", field="model")
