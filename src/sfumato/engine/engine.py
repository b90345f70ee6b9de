"""The engine in this process: generate, stream, or drive it step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sfumato.config import EngineConfig
from sfumato.core.messages import (
    FinishReason,
    Score,
    Submit,
    TokenLogprob,
    Usage,
)
from sfumato.core.recording import UNRECORDED, Recorder
from sfumato.core.spec import Spec
from sfumato.core.traits import ModelTraits
from sfumato.engine.build import Loaded, build_loop, load
from sfumato.engine.direct import DirectInbox, DirectOutbox, SteppedEngine
from sfumato.engine.frontend import (
    Assembler,
    Delta,
    SamplingParams,
    check_params,
    draw_seed,
    make_score_spec,
    make_spec,
)
from sfumato.engine.loop import EngineLoop
from sfumato.engine.peering import MakeEndpoint
from sfumato.errors import ConfigError, EngineError, RequestError
from sfumato.models.weights import ProgressCallback
from sfumato.text.door import Replay, ScoreReplay, TextDoor
from sfumato.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]


@dataclass(slots=True)
class Choice:
    """One finished choice: text, tokens, why it ended and what it cost; seed and choice repeat it."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    usage: Usage = Usage()
    seed: int = 0


class Engine(SteppedEngine):
    """Holds one model and its loop; not thread-safe.

    >>> engine = Engine.load("sfumato-tiny-sdar")
    >>> engine.generate("12+7=", SamplingParams(max_tokens=16))[0].text
    """

    def __init__(
        self, loaded: Loaded, loop: EngineLoop, door: TextDoor, inbox: DirectInbox, outbox: DirectOutbox
    ):
        super().__init__(loop, inbox, outbox)
        self._loaded = loaded
        self._door = door
        self._tokenizer: Tokenizer | None = None
        self._owns_model = False

    @classmethod
    def load(
        cls, model: str | EngineConfig, *, on_progress: ProgressCallback | None = None, **options: Any
    ) -> Engine:
        """Load a model by embedded name, folder or hub id; options are `EngineConfig`'s fields."""
        config = model if isinstance(model, EngineConfig) else EngineConfig(model=model, **options)
        if config.data_parallel_attention > 1:
            raise ConfigError(
                f"data_parallel_attention {config.data_parallel_attention}: ranks that share weights step "
                "together, each in a process of its own; an engine that its caller steps cannot be one"
            )
        engine = cls.from_loaded(load(config, on_progress))
        engine._owns_model = True
        return engine

    @classmethod
    def from_loaded(
        cls,
        loaded: Loaded,
        *,
        make_endpoint: MakeEndpoint | None = None,
        recorder: Recorder = UNRECORDED,
    ) -> Engine:
        """Start an engine on a model that is in memory.

        make_endpoint: links to engines of this process. recorder: told what each step does.
        """
        inbox, outbox = DirectInbox(), DirectOutbox()
        loop, door = build_loop(loaded, inbox, outbox, make_endpoint=make_endpoint, recorder=recorder)
        return cls(loaded, loop, door, inbox, outbox)

    @property
    def traits(self) -> ModelTraits:
        """Return what the model declares."""
        return self._loaded.traits

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Return the checkpoint's tokenizer, read when it is first needed; None if it has none."""
        if self._tokenizer is None and self._loaded.folder.has_tokenizer:
            self._tokenizer = Tokenizer(self._loaded.folder.path)
        return self._tokenizer

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a text, a list of chat messages, or token ids."""
        if isinstance(prompt, str):
            return self._need_tokenizer().encode(prompt)
        if prompt and isinstance(prompt[0], dict):
            return self._need_tokenizer().apply_chat_template(list(prompt))  # type: ignore[arg-type]
        return [int(token) for token in prompt]  # type: ignore[arg-type]

    def _need_tokenizer(self) -> Tokenizer:
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise RequestError("this model has no tokenizer; give token ids", field="prompt")
        return tokenizer

    def add_request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        choice: int = 0,
        replay: Replay | ScoreReplay | None = None,
        spec: Spec | None = None,
    ) -> str:
        """Queue one choice of a request for the next step and return its id.

        replay: reference mode; spec: a finished spec instead of params. Raises RequestError, also for an id
        that is active.
        """
        params = params or SamplingParams()
        request_id = self.claim(request_id)
        if spec is None:
            if params.seed is None:
                params = msgspec.structs.replace(params, seed=draw_seed())
            spec = make_spec(prompt_ids, params, self.traits, choice=choice)
        if replay is not None:
            self._door.replays[request_id] = replay
        else:
            self._door.check(spec)
        return self.submit(
            Submit(request_id=request_id, spec=spec, priority=params.priority, timeout=params.timeout)
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Choice]:
        """Run prompts to their ends together; return their choices in order, n per prompt.

        prompts: a text, token ids, chat messages, or a list of such. params: one for all, or one each.
        """
        each: list[Any] = [prompts] if _is_one_prompt(prompts) else list(prompts)
        given = params if isinstance(params, Sequence) else [params or SamplingParams()] * len(each)
        if len(given) != len(each):
            raise RequestError(
                f"{len(each)} prompts and {len(given)} params", field="params", value=len(given)
            )
        finished: list[Choice] = []
        for index, delta in self._stream_all([(self.encode(p), q) for p, q in zip(each, given, strict=True)]):
            if isinstance(delta, int):
                finished.append(Choice(seed=delta))
                continue
            _add(finished[index], delta)
        return finished

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[tuple[int, Delta]]:
        """Yield (choice, delta) as text is committed; a generator that is closed aborts its request."""
        for index, delta in self._stream_all([(self.encode(prompt), params or SamplingParams())]):
            if isinstance(delta, Delta):
                yield index, delta

    def _stream_all(self, asked: list[tuple[list[int], SamplingParams]]) -> Iterator[tuple[int, Delta | int]]:
        """Yield first the seed of each choice, then the deltas."""
        open_choices: dict[str, tuple[int, Assembler]] = {}
        seeds: list[int] = []
        try:
            for prompt_ids, params in asked:
                check_params(params)
                seed = draw_seed() if params.seed is None else params.seed
                params = msgspec.structs.replace(params, seed=seed)
                for choice in range(params.n):
                    assembler = Assembler(self.tokenizer, params.stop)
                    request_id = self.add_request(prompt_ids, params, choice=choice)
                    open_choices[request_id] = (len(seeds), assembler)
                    seeds.append(seed)
            yield from enumerate(seeds)
            while open_choices:
                for turn in self.step():
                    for refusal in turn.refusals:
                        raise RequestError(refusal.message, field=refusal.field or "request")
                    for output in turn.outputs:
                        if output.request_id not in open_choices:
                            continue
                        index, assembler = open_choices[output.request_id]
                        delta = assembler.push(output)
                        if assembler.is_finished:
                            del open_choices[output.request_id]
                        if delta.met_stop_string:
                            self.abort(output.request_id)
                        yield index, delta
        finally:
            for request_id in open_choices:
                self.abort(request_id)

    def log_likelihood(
        self,
        prompt: Prompt,
        completion: str | Sequence[int],
        *,
        num_samples: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        cfg_scale: float = 0.0,
        logprobs: int | None = None,
    ) -> Score:
        """Return the log likelihood in nats of a completion behind a prompt.

        Exact, as left-to-right decoding within blocks draws it, where the model's context is causal; else the
        Monte Carlo estimate of arXiv:2502.09992 over num_samples maskings in strata of batch_size, with
        guidance of cfg_scale. logprobs: alternatives per token of an exact score. Raises RequestError.
        """
        spec = make_score_spec(
            self.encode(prompt),
            self.encode(completion),
            self.traits,
            num_samples=num_samples,
            batch_size=batch_size,
            seed=seed,
            cfg_scale=cfg_scale,
            logprobs=logprobs,
        )
        request_id = self.add_request((), spec=spec)
        while True:
            for turn in self.step():
                for output in turn.outputs:
                    if output.request_id == request_id and output.finish_reason is not None:
                        if output.score is None:
                            raise EngineError(output.error or "the score was not computed")
                        return output.score

    def close(self) -> None:
        """End every request and the loop, and the processes that this engine has started."""
        super().close()
        if self._owns_model:
            self._loaded.close()


def _is_one_prompt(prompts: Any) -> bool:
    return isinstance(prompts, str) or not prompts or isinstance(prompts[0], int | dict)


def _add(choice: Choice, delta: Delta) -> None:
    choice.text += delta.text
    choice.token_ids.extend(delta.token_ids)
    if delta.logprobs is not None:
        choice.logprobs = [*(choice.logprobs or []), *delta.logprobs]
    choice.usage = delta.usage
    choice.finish_reason = delta.finish_reason or choice.finish_reason
    choice.error = delta.error or choice.error
