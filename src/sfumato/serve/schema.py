"""What may stand in a request's body: OpenAI's documented fields and ours; all else is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from sfumato.core.spec import Grammar
from sfumato.engine.frontend import MAX_CHOICES, SamplingParams
from sfumato.serve.errors import bad_request
from sfumato.serve.fields import (
    Biases,
    Content,
    Count,
    Parameters,
    Priority,
    Prompts,
    Seed,
    Stops,
    TokenIds,
    TopK,
    neutral,
    whole,
)
from sfumato.serve.grammar_fields import Choices, ResponseFormat, grammar_of
from sfumato.serve.tool_formats import ToolFormat
from sfumato.serve.tools import Function, NamedTool, Tool, ToolCall, ToolChoice, chosen_tools, tools_grammar

MAX_ALTERNATIVES = 20
# Choices of one call, prompts times n; a larger job is several calls.
MAX_CHOICES_PER_CALL = 1024

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(BaseModel):
    """How a stream is sent; include_canvas adds the open block of every denoise step."""

    model_config = STRICT

    include_usage: bool | None = None
    include_canvas: bool | None = None
    include_obfuscation: Annotated[Any, neutral(False)] = None


class TextRequest(BaseModel):
    """The fields that chat and plain completions share."""

    model_config = STRICT

    model: str
    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Seed | None = None
    stop: Stops = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Biases = None
    # A label for whoever runs the server; it never changes an answer.
    user: str | None = None
    frequency_penalty: Annotated[Any, neutral(0)] = None
    presence_penalty: Annotated[Any, neutral(0)] = None

    algorithm: str | None = None
    algorithm_parameters: Parameters = None
    block_length: Count | None = None
    response_format: ResponseFormat | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    top_k: TopK | None = None
    ignore_eos: bool | None = None
    stop_token_ids: TokenIds = None
    priority: Priority | None = None
    timeout: Annotated[float, Field(gt=0, le=1e9)] | None = None
    return_token_ids: bool | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_canvas(self) -> bool:
        """Whether a stream carries the open block of every step."""
        return self.stream_options is not None and bool(self.stream_options.include_canvas)

    def check_stream(self) -> None:
        """Refuse stream options where nothing is streamed."""
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options need stream: true", "stream_options")

    def sampling(self, *, max_tokens: int | None, logprobs: int | None, seed: int) -> SamplingParams:
        """Return the engine's parameters; what is not given takes the model's default, temperature 0."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=seed,
            n=self.n or 1,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            logit_bias=self.logit_bias or {},
            algorithm=self.algorithm,
            algorithm_parameters=self.algorithm_parameters or {},
            block_length=self.block_length,
            grammar=grammar_of(self.response_format, self.regex, self.choice, self.grammar),
            include_canvas=self.wants_canvas,
            priority=self.priority or 0,
            timeout=self.timeout,
        )


def _role(value: object) -> object:
    if value == "function":
        raise PydanticCustomError("unsupported", "{role} is what tool was called before", {"role": value})
    return value


class Message(BaseModel):
    """One turn of a conversation; developer is what system was called before."""

    model_config = STRICT

    role: Annotated[Literal["system", "developer", "user", "assistant", "tool"], BeforeValidator(_role)]
    content: Content = ""
    name: str | None = None
    refusal: Annotated[Any, neutral()] = None
    audio: Annotated[Any, neutral()] = None
    tool_calls: list[ToolCall] | None = None
    function_call: Annotated[Any, neutral()] = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_tools(self) -> Message:
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise PydanticCustomError(
                "tools", "a message of role tool needs a tool_call_id, and no other has one"
            )
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tools", "tool_calls stand in messages of the role assistant")
        return self

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates expect it."""
        role = "system" if self.role == "developer" else self.role
        named = {} if self.name is None else {"name": self.name}
        calls = [call.for_template() for call in self.tool_calls or ()]
        answered = {} if self.tool_call_id is None else {"tool_call_id": self.tool_call_id}
        return {
            "role": role,
            "content": self.content,
            **named,
            **({"tool_calls": calls} if calls else {}),
            **answered,
        }


Messages = Annotated[list[Message], Field(min_length=1)]


class ChatRequest(TextRequest):
    """Body of /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    # Labels and hints for OpenAI's own bookkeeping; they never change an answer.
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    audio: Annotated[Any, neutral()] = None
    function_call: Annotated[Any, neutral("none", "auto")] = None
    functions: Annotated[Any, neutral([])] = None
    modalities: Annotated[Any, neutral(["text"])] = None
    moderation: Annotated[Any, neutral()] = None
    parallel_tool_calls: bool | None = None
    prediction: Annotated[Any, neutral()] = None
    prompt_cache_options: Annotated[Any, neutral()] = None
    prompt_cache_retention: Annotated[Any, neutral("in_memory")] = None
    reasoning_effort: Annotated[Any, neutral("none")] = None
    service_tier: Annotated[Any, neutral("auto", "default")] = None
    store: Annotated[Any, neutral(False)] = None
    tool_choice: ToolChoice | None = None
    tools: list[Tool] | None = None
    verbosity: Annotated[Any, neutral("medium")] = None
    web_search_options: Annotated[Any, neutral()] = None

    def params(self, seed: int) -> SamplingParams:
        """Return the engine's parameters. Raises ApiError for fields that contradict each other."""
        self.check_stream()
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs need logprobs: true", "top_logprobs")
        limits = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            raise bad_request("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling(max_tokens=next(iter(limits), None), logprobs=logprobs, seed=seed)

    def callable_functions(self) -> list[Function]:
        """Return the functions that may be called."""
        return chosen_tools(self.tools, self.tool_choice)

    def tools_grammar(self, form: ToolFormat, params: SamplingParams) -> Grammar | None:
        """Return what an answer with tools obeys, in a model's form of calls; None without tools.

        Raises ApiError for tools beside another grammar, RequestError for a schema that is not supported.
        """
        functions = self.callable_functions()
        if not functions:
            return None
        if params.grammar is not None:
            raise bad_request(
                "tools do not go together with another form of the answer; tool_choice 'none' does", "tools"
            )
        must_call = self.tool_choice not in (None, "auto")
        is_parallel = self.parallel_tool_calls is not False and not isinstance(self.tool_choice, NamedTool)
        return tools_grammar(functions, form, must_call=must_call, is_parallel=is_parallel)


class CompletionRequest(TextRequest):
    """Body of /v1/completions."""

    prompt: Prompts
    # 0 only scores the prompt, with echo and logprobs.
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    echo: bool | None = None
    best_of: Count | None = None
    suffix: Annotated[str, AfterValidator(whole)] | None = None

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's own tokens are given log probabilities."""
        return bool(self.echo) and self.logprobs is not None

    def params(self, seed: int) -> SamplingParams:
        """Return the engine's parameters. Raises ApiError for what is not supported together."""
        self.check_stream()
        n = self.n or 1
        if self.suffix and self.scores_prompt:
            raise bad_request("echo with logprobs scores a prompt that nothing follows", "suffix")
        if self.best_of not in (None, 1, n):
            raise bad_request(f"best_of {self.best_of} is not supported unless it equals n", "best_of")
        if self.scores_prompt and self.stream:
            raise bad_request("echo with logprobs is not streamed; leave stream out", "stream")
        if self.max_tokens == 0 and not self.scores_prompt:
            raise bad_request("max_tokens is 0: only echo with logprobs generates nothing", "max_tokens")
        if len(self.prompt) * n > MAX_CHOICES_PER_CALL:
            raise bad_request(
                f"{len(self.prompt)} prompts times n {n} is more than {MAX_CHOICES_PER_CALL} choices",
                "prompt",
            )
        return self.sampling(max_tokens=self.max_tokens, logprobs=self.logprobs, seed=seed)


class TokenizeRequest(BaseModel):
    """Body of /tokenize: a prompt or messages."""

    model_config = STRICT

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: Annotated[Any, neutral(True)] = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """Body of /detokenize."""

    model_config = STRICT

    model: str | None = None
    tokens: TokenIds
