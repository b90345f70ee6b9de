"""Tools in OpenAI's form: how a model is told of them, the grammar of its calls, calls read from its text.

Where a template knows nothing of tools, a system message tells of them, and of calls as tagged JSON.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sfumato.core.spec import Grammar
from sfumato.serve.errors import bad_request
from sfumato.serve.tool_formats import CLOSE, OPEN, Signature, TaggedJson, ToolFormat

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

_SYSTEM = """You may call functions. Their signatures:
<tools>
{tools}
</tools>
To call one, answer with its name and arguments:
<tool_call>
{{"name": <name>, "arguments": <arguments>}}
</tool_call>"""


class Function(BaseModel):
    """What can be called; parameters: the JSON schema of its arguments."""

    model_config = _STRICT

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A function; other kinds of tools run elsewhere."""

    model_config = _STRICT

    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    """The name alone."""

    model_config = _STRICT

    name: str


class NamedTool(BaseModel):
    """The tool that must be called."""

    model_config = _STRICT

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(BaseModel):
    """A call that was made before; arguments: JSON as text."""

    model_config = _STRICT

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call in an assistant's message."""

    model_config = _STRICT

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """Return the call as chat templates expect it. Raises ApiError for arguments that are no JSON."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except ValueError as error:
            raise bad_request(
                f"the arguments of call {self.id!r} are no JSON: {error}", "messages"
            ) from error
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


def chosen_tools(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> list[Function]:
    """Return the functions that may be called. Raises ApiError for a choice among none."""
    functions = [tool.function for tool in tools or ()]
    if isinstance(choice, NamedTool):
        functions = [function for function in functions if function.name == choice.function.name]
        if not functions:
            raise bad_request(f"tool_choice names {choice.function.name!r}, which is no tool", "tool_choice")
    if choice == "required" and not functions:
        raise bad_request("tool_choice is 'required' and there are no tools", "tool_choice")
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise bad_request("two tools have one name", "tools")
    return [] if choice == "none" else functions


def tools_grammar(
    functions: Sequence[Function], form: ToolFormat, *, must_call: bool, is_parallel: bool
) -> Grammar:
    """Return the grammar of an answer: calls alone, or text that may end in calls. Raises RequestError."""
    called = [Signature(function.name, function.parameters) for function in functions]
    return form.grammar(called, must_call=must_call, is_parallel=is_parallel)


def with_tools(
    messages: list[dict[str, Any]], functions: Sequence[Function], *, knows_tools: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Return the messages and what a chat template is given as `tools`.

    knows_tools: the template has a place for tools and calls; else both become text.
    """
    described = [
        {"type": "function", "function": function.model_dump(exclude_none=True)} for function in functions
    ]
    if knows_tools:
        return messages, described or None
    told = [_as_text(message) for message in messages]
    if described:
        system = _SYSTEM.format(tools="\n".join(map(json.dumps, described)))
        if told and told[0]["role"] == "system":
            told[0] = {**told[0], "content": f"{told[0]['content']}\n\n{system}"}
        else:
            told.insert(0, {"role": "system", "content": system})
    return told, None


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without calls and results of its own kinds."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = message.get("tool_calls") or ()
    texts = [message["content"]] if message["content"] else []
    texts += [f"{OPEN}\n{json.dumps(call['function'])}\n{CLOSE}" for call in calls]
    kept = {name: value for name, value in message.items() if name not in ("tool_calls", "tool_call_id")}
    return {**kept, "content": "\n".join(texts)}


@dataclass(slots=True)
class CallStream:
    """An answer's text as it grows: what is shown of it, and the calls that are complete."""

    form: ToolFormat = field(default_factory=TaggedJson)
    _text: str = ""
    _shown: int = 0
    calls: list[dict[str, Any]] = field(default_factory=list)

    def push(self, text: str, *, is_last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """Add text; return what is new outside of calls, and new calls in OpenAI's form."""
        self._text += text
        found: list[dict[str, Any]] = []
        shown = ""
        while (call := self.form.next_call(self._text, self._shown)) is not None:
            start, end, name, arguments = call
            shown += self._text[self._shown : start]
            self._shown = end
            found.append(_call(name, arguments))
        end = len(self._text) if is_last else self._safe_end()
        shown += self._text[self._shown : end]
        self._shown = max(self._shown, end)
        if self.calls or found:
            # Between calls stand only line breaks.
            shown = shown.rstrip("\n") if shown.strip() else ""
        self.calls += found
        return shown, found

    def _safe_end(self) -> int:
        """Return how far the text can be shown: not into a call, nor into what may become its opening."""
        opening = self.form.opening
        opened = self._text.find(opening, self._shown)
        if opened >= 0:
            return opened
        for length in range(min(len(opening) - 1, len(self._text) - self._shown), 0, -1):
            if self._text.endswith(opening[:length]):
                return len(self._text) - length
        return len(self._text)


def _call(name: str, arguments: Any) -> dict[str, Any]:
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
    }
