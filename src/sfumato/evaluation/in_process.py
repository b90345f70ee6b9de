"""A model in this process: questions go through the engine together and join and leave between steps."""

from __future__ import annotations

import os
import platform
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from sfumato.core.messages import FinishReason, Output
from sfumato.engine.frontend import Assembler
from sfumato.errors import RequestError
from sfumato.evaluation.backend import Ask, ModelCard, OnReply, Reply

if TYPE_CHECKING:
    from sfumato.engine.build import Loaded

_ENDS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


@dataclass(slots=True)
class _Open:
    """One ask that is being answered."""

    ask: Ask
    assembler: Assembler
    started: float
    text: str = ""


class InProcess:
    """Owns an engine on a loaded model."""

    def __init__(self, name: str, loaded: Loaded) -> None:
        # Imported here, because it loads torch; whoever has a loaded model has done so.
        from sfumato.engine.engine import Engine
        from sfumato.text.decoding.registry import ALGORITHMS, describe

        self._engine = Engine.from_loaded(loaded)
        tokenizer, traits = self._engine.tokenizer, loaded.traits
        self._card = msgspec.convert(
            {
                "id": name,
                "dtype": str(loaded.dtype).removeprefix("torch."),
                "device": loaded.device,
                "has_chat_template": tokenizer is not None and tokenizer.has_chat_template,
                "block_length": traits.block_length,
                "default_max_tokens": traits.default_max_tokens,
                "default_algorithm": traits.default_algorithm,
                "default_algorithm_parameters": traits.default_parameters,
                "algorithms": [{"name": each, "parameters": describe(each)} for each in ALGORITHMS],
            },
            ModelCard,
        )
        self._open: dict[str, _Open] = {}

    @property
    def card(self) -> ModelCard:
        """What the model says about itself."""
        return self._card

    @property
    def where(self) -> dict[str, Any]:
        """The machine with its processor and the packages that computed."""
        import torch

        on_gpu = self._card.device.startswith("cuda")
        return {
            "device": torch.cuda.get_device_name(self._card.device) if on_gpu else _processor(),
            "machine": platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "sfumato": version("sfumato"),
        }

    def check(self, ask: Ask) -> None:
        """Let the engine look at an ask and take it back before anything is computed."""
        engine = self._engine
        engine.abort(engine.add_request(engine.encode(ask.prompt), ask.params))
        while engine.has_work:
            engine.step()

    def run(self, asks: Sequence[Ask], on_reply: OnReply, *, concurrency: int) -> None:
        """Answer every ask, so many at once; those that are open when this is interrupted are aborted."""
        waiting = deque(asks)
        try:
            while waiting or self._open:
                while waiting and len(self._open) < concurrency:
                    self._start(waiting.popleft(), on_reply)
                self._step(on_reply)
        finally:
            for request_id in self._open:
                self._engine.abort(request_id)
            self._open.clear()

    def _start(self, ask: Ask, on_reply: OnReply) -> None:
        engine, started = self._engine, time.monotonic()
        try:
            assembler = Assembler(engine.tokenizer, ask.params.stop)
            request_id = engine.add_request(engine.encode(ask.prompt), ask.params)
        except RequestError as error:
            on_reply(Reply(id=ask.id, error=str(error)))
            return
        self._open[request_id] = _Open(ask, assembler, started)

    def _step(self, on_reply: OnReply) -> None:
        for turn in self._engine.step():
            for refusal in turn.refusals:
                asked = self._open.pop(refusal.request_id, None)
                if asked is not None:
                    on_reply(Reply(id=asked.ask.id, error=refusal.message))
            for output in turn.outputs:
                # What was aborted, here or by an interrupted run, still says that it ended.
                if output.request_id in self._open:
                    self._take(output, on_reply)

    def _take(self, output: Output, on_reply: OnReply) -> None:
        request_id = output.request_id
        asked = self._open[request_id]
        delta = asked.assembler.push(output)
        asked.text += delta.text
        if delta.met_stop_string:
            self._engine.abort(request_id)
        if delta.finish_reason is None:
            return
        del self._open[request_id]
        end = _ENDS.get(delta.finish_reason)
        seconds = time.monotonic() - asked.started
        if end is None:
            reason = delta.error or f"the request ended with {delta.finish_reason}"
            on_reply(Reply(id=asked.ask.id, error=reason, seconds=seconds))
            return
        on_reply(
            Reply(
                id=asked.ask.id,
                output=asked.text,
                usage=delta.usage,
                finish_reason=end,
                seconds=seconds,
            )
        )


def _processor() -> str:
    """Return the processor's name; Linux keeps it from `platform`."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
