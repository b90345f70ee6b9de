"""Denoise forwards and whole engines on a GPU, beside the time that their bytes take to be read."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_models import random_loaded, weight_bytes
from benchmarks.gpu_timing import Machine, Section, seconds_of
from sfumato import Engine, Limits, SamplingParams
from sfumato.core.plan import Row, RowKind
from sfumato.core.spec import Sampling
from sfumato.engine.build import Loaded
from sfumato.engine.recorded import graphs_for
from sfumato.models.batch import KVStore
from sfumato.models.experts import Experts
from sfumato.models.layers import Linear
from sfumato.text.batching import FedRow
from sfumato.text.decoding.protocol import Transform
from sfumato.text.paged_batching import batch_of
from sfumato.text.random_source import CounterSource
from sfumato.text.statistics import PackedStatistics, compute_statistics
from sfumato.text.transform import Reading

_GIB = 1 << 30


class Forwards:
    """Denoise forwards of R requests: one block each behind a context whose keys are there."""

    def __init__(self, loaded: Loaded, num_rows: int, context: int, temperature: float = 0.0) -> None:
        self.loaded, self.context = loaded, context
        self.block = loaded.traits.block_length
        pages = -(-(context + self.block) // self.block)
        self.store = KVStore.allocate(
            shapes=loaded.model.kv_shapes,
            num_slots=num_rows * pages * self.block,
            dtype=loaded.dtype,
            device=loaded.device,
        )
        for layer in (*self.store.keys, *self.store.values):
            layer.normal_()
        config = msgspec.structs.replace(loaded.config, graphs="on")
        self.graphs = graphs_for(config, loaded.model, loaded.traits, self.store, self.block)
        rng = np.random.default_rng(0)
        self.fed = [
            FedRow(
                Row(
                    request_id=str(index),
                    kind=RowKind.DENOISE,
                    start=context,
                    end=context + self.block,
                    slot=context,
                    visible=context + self.block,
                ),
                rng.integers(0, loaded.traits.vocab_size - 2, self.block),
                range(index * pages, (index + 1) * pages),
                self.block,
            )
            for index in range(num_rows)
        ]
        self.readings = [
            Reading(
                positions=np.arange(context, context + self.block),
                hidden_rows=np.arange(index * self.block, (index + 1) * self.block),
                sampling=Sampling(temperature=temperature),
                transform=Transform(),
                random_source=CounterSource(index),
                block=0,
                step=0,
                excluded_ids=(loaded.traits.mask_token_id,),
            )
            for index in range(num_rows)
        ]

    @torch.inference_mode()
    def hidden(self, *, by_graph: bool) -> Tensor:
        """Return the hidden states of all blocks."""
        total = len(self.fed) * self.block
        batch = batch_of(
            self.fed,
            traits=self.loaded.traits,
            output_tokens=np.arange(total),
            store=self.store,
            page_size=self.block,
            device=self.loaded.model.device,
            graphs=self.graphs if by_graph else None,
        )
        if batch.shape is None or self.graphs is None:
            return self.loaded.model.hidden(batch)
        return self.graphs.hidden(batch)

    @torch.inference_mode()
    def step(self, *, by_graph: bool = True) -> PackedStatistics:
        """Make one step: layout, forward, head and statistics."""
        return compute_statistics(
            self.hidden(by_graph=by_graph),
            self.loaded.model.head,
            self.readings,
            vocab_size=self.loaded.traits.vocab_size,
            chunk_bytes=self.loaded.config.max_chunk_bytes,
        )

    def kv_bytes(self) -> int:
        """Return the bytes of keys and values that a forward reads."""
        per_slot = sum(2 * heads * width for heads, width in self.loaded.model.kv_shapes)
        seen = len(self.fed) * (self.context + self.block)
        return per_slot * seen * self.loaded.dtype.itemsize


@torch.inference_mode()
def touched_bytes(forwards: Forwards) -> int:
    """Return the bytes of weights that a forward reads: of mixtures of experts those that are chosen."""
    model = forwards.loaded.model
    mixtures = [module for module in model.modules() if isinstance(module, Experts)]
    if not mixtures:
        return weight_bytes(model)
    total = weight_bytes(model, without=".experts.")
    hooks = []

    def count(module: Any, inputs: tuple[Tensor, ...]) -> None:
        nonlocal total
        own = sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        total += own * len(inputs[1].unique()) // module.num_experts

    for module in mixtures:
        hooks.append(module.register_forward_pre_hook(count))
    forwards.hidden(by_graph=False)
    for hook in hooks:
        hook.remove()
    return total


def operations(forwards: Forwards) -> float:
    """Return the operations of a step's products, attention left out: a token uses its own experts alone."""
    model = forwards.loaded.model
    tokens = len(forwards.fed) * forwards.block
    products = 0
    for module in model.modules():
        if isinstance(module, Linear):
            products += module.weight.numel()
        elif isinstance(module, Experts):
            own = module.gate_up.numel() + module.down.numel()
            products += own // module.num_experts * module.num_chosen
    return 2.0 * products * tokens


def forward_table(
    machine: Machine,
    name: str,
    batches: list[int],
    *,
    is_tiny: bool,
    wanted: str,
    quantization: str | None = None,
) -> Callable[[Section], None]:
    """Return what fills a table of denoise forwards at some numbers of requests."""

    def fill(section: Section) -> None:
        loaded = random_loaded(
            name,
            machine.device,
            is_tiny=is_tiny,
            limits=Limits(),
            kv_memory=_GIB,
            quantization=quantization,
        )
        context = 16 if is_tiny else 512
        first = first_floor = 0.0
        for number in batches:
            forwards = Forwards(loaded, number, context)
            read = touched_bytes(forwards) + forwards.kv_bytes()
            needed = operations(forwards)
            floor = max(read / machine.bandwidth, needed / machine.operations)
            first_floor = first_floor or floor
            graph = seconds_of(forwards.step, machine.device)
            eager = seconds_of(
                lambda forwards=forwards: forwards.step(by_graph=False), machine.device, runs=5
            )
            bare = seconds_of(lambda forwards=forwards: forwards.hidden(by_graph=True), machine.device)
            first = first or graph
            section.rows.append(
                [
                    str(number),
                    f"{read / 1e9:.2f}",
                    f"{needed / 1e12:.2f}",
                    f"{1e3 * floor:.3f}",
                    f"{1e3 * graph:.3f}",
                    f"{graph / floor:.2f}",
                    f"{1e3 * bare:.3f}",
                    f"{1e3 * eager:.3f}",
                    f"{number * first / graph:.2f}",
                    f"{number * first_floor / floor:.2f}",
                ]
            )
            drift = _difference(forwards)
            section.notes.append(f"{number} request(s): graph against eager, largest difference {drift:.2e}.")
        section.notes.append(wanted)

    return fill


FORWARD_HEADINGS = [
    "requests",
    "GB read",
    "TFLOP",
    "floor ms",
    "step ms",
    "step / floor",
    "forward alone ms",
    "eager step ms",
    "tokens/s over one request",
    "at the floors",
]


def _difference(forwards: Forwards) -> float:
    """Return the largest difference of hidden states by graph and eager, over the largest hidden state."""
    expected = forwards.hidden(by_graph=False).float()
    found = forwards.hidden(by_graph=True).float()
    return float((found - expected).abs().max() / expected.abs().max())


def engine_table(
    machine: Machine, name: str, batches: list[int], params: SamplingParams, prompt: int, *, is_tiny: bool
) -> Callable[[Section], None]:
    """Return what fills a table of whole requests through an engine."""

    def fill(section: Section) -> None:
        loaded = random_loaded(
            name,
            machine.device,
            is_tiny=is_tiny,
            limits=Limits(max_running_requests=max(batches)),
            kv_memory=(64 << 20) if is_tiny else 16 * _GIB,
        )
        rng = random.Random(0)
        draw = lambda: [
            rng.randrange(3, loaded.traits.vocab_size - 700 * (not is_tiny) - 3) for _ in range(prompt)
        ]
        first = 0.0
        for number in batches:
            engine = Engine.from_loaded(replace(loaded))
            engine.generate([draw() for _ in range(number)], params)
            rates, speeds = [], []
            for _ in range(3):
                engine.steps.clear()
                started = time.perf_counter()
                found = engine.generate([draw() for _ in range(number)], params)
                seconds = time.perf_counter() - started
                forwards = len(engine.steps)
                tokens = sum(len(choice.token_ids) for choice in found)
                rates.append(forwards / seconds)
                speeds.append(tokens / seconds)
            nfe = statistics.mean(choice.usage.nfe for choice in found)
            rate, speed = statistics.median(rates), statistics.median(speeds)
            first = first or speed
            section.rows.append(
                [
                    str(number),
                    str(forwards),
                    f"{nfe:.0f}",
                    f"{tokens / len(found) / nfe:.2f}",
                    f"{1e3 / rate:.2f}",
                    f"{rate:.1f}",
                    f"{speed:.0f}",
                    f"{speed / first:.2f}",
                ]
            )
            engine.close()

    return fill


ENGINE_HEADINGS = [
    "requests",
    "forwards",
    "NFE",
    "TPF",
    "ms per forward",
    "forwards/s",
    "tokens/s",
    "over one request",
]
