"""Kernels on the device in the shapes of real models, against their torch forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_timing import Machine, Section, seconds_of
from sfumato.models.kernels import why_not
from sfumato.models.paged import PagedRow, numbers_of, views_of
from sfumato.text.random_source import CounterSource
from sfumato.text.sampling import scale_and_filter

HEADINGS = ["kernel", "shape", "us", "torch us", "GB/s", "largest difference"]
# Of one kernel: name, shape, what runs it, what runs the torch form, bytes, difference of both.
Case = tuple[str, str, Callable[[], object], Callable[[], object], int, Callable[[], float]]


def fill(machine: Machine, *, is_tiny: bool) -> Callable[[Section], None]:
    """Return what fills the table; without triton there is nothing to fill it with."""

    def run(section: Section) -> None:
        reason = "it is a CPU" if machine.device == "cpu" else why_not(torch.empty(1, device="cuda").device)
        if reason is not None:
            section.notes.append(f"No kernel runs on this device: {reason}.")
            return
        for make in (_statistics, _filters, _attention, _norm):
            try:
                for name, shape, kernel, plain, size, difference in make(machine.device, is_tiny=is_tiny):
                    seconds, other = (
                        seconds_of(kernel, machine.device),
                        seconds_of(plain, machine.device, runs=3),
                    )
                    section.rows.append(
                        [
                            name,
                            shape,
                            f"{1e6 * seconds:.1f}",
                            f"{1e6 * other:.1f}",
                            f"{size / seconds / 1e9:.0f}",
                            f"{difference():.2e}",
                        ]
                    )
            except Exception as error:
                section.rows.append([make.__name__.strip("_"), f"{type(error).__name__}: {error}"[:200]])

    return run


def _statistics(device: str, *, is_tiny: bool) -> Iterator[Case]:
    from sfumato.text.kernels.reading import IS_DRAWN, IS_PROCESSED, RowModes, read_rows

    size = 1000 if is_tiny else 126464
    for rows in (32, 512):
        logits = torch.randn(rows, size, device=device).bfloat16() * 3
        for drawn in (False, True):
            mode = (IS_PROCESSED | IS_DRAWN) * drawn
            keys = CounterSource(1).token_keys(0, 0, np.arange(rows))
            modes = RowModes(
                mode=torch.full((rows,), mode, dtype=torch.int32, device=device),
                temperature=torch.full((rows,), 0.8 if drawn else 1.0, device=device),
                key=torch.from_numpy(keys).to(device),
                cut=None,
                last=None,
                has_processed=drawn,
                has_noise=drawn,
            )

            def plain(logits: Tensor = logits) -> Tensor:
                return logits.float().softmax(-1).max(-1).values

            def wrong(
                logits: Tensor = logits, modes: RowModes = modes, drawn: bool = drawn, rows: int = rows
            ) -> float:
                found = read_rows(logits, modes)
                if not drawn:
                    return float((found.confidence - plain(logits)).abs().max())
                noise = CounterSource(1).gumbel(0, 0, np.arange(rows), logits.shape[1]).to(device)
                expected = (logits.float() / 0.8 + noise).argmax(-1)
                return float((found.token != expected).float().mean())

            name = "statistics, share of other draws" if drawn else "statistics"
            kernel = lambda logits=logits, modes=modes: read_rows(logits, modes)
            yield name, f"{rows} x {size}", kernel, plain, logits.nbytes, wrong


def _filters(device: str, *, is_tiny: bool) -> Iterator[Case]:
    from sfumato.text.kernels.filters import cut_rows

    size, rows = 1000 if is_tiny else 126464, 32
    logits = torch.randn(rows, size, device=device) * 3
    whole = lambda value, kind: torch.full((rows,), value, dtype=kind, device=device)
    arguments = (
        whole(0.8, torch.float32),
        whole(50, torch.int32),
        whole(0.9, torch.float32),
        whole(0, torch.int32),
    )

    def plain() -> Tensor:
        return scale_and_filter(logits, temperature=0.8, top_k=50, top_p=0.9)

    def wrong() -> float:
        cut, last = cut_rows(logits, *arguments)
        scaled, at = logits / 0.8, torch.arange(size, device=device)
        kept = (scaled > cut[:, None]) | ((scaled == cut[:, None]) & (at <= last[:, None]))
        return float((kept != plain().isfinite()).sum())

    yield (
        "top-k and top-p, tokens kept otherwise",
        f"{rows} x {size}",
        lambda: cut_rows(logits, *arguments),
        plain,
        logits.nbytes,
        wrong,
    )


def _attention(device: str, *, is_tiny: bool) -> Iterator[Case]:
    from sfumato.models.kernels.attention import attend_tiles

    block, context = 32, 512
    for rows, heads, kv_heads, width in ((1, 32, 32, 128), (16, 32, 32, 128), (4, 16, 4, 128)):
        if is_tiny and rows > 1:
            return
        pages = (context + block) // block
        made = [
            PagedRow(
                index * block,
                *(np.zeros(block, dtype=np.int64) for _ in range(4)),
                np.full(block, context + block, dtype=np.int64),
                np.arange(index * pages, (index + 1) * pages),
            )
            for index in range(rows)
        ]
        numbers = numbers_of(made, np.zeros(1, dtype=np.int64))
        paged = views_of(numbers, torch.from_numpy(numbers.values).to(device), block).paged
        store = torch.randn(2, rows * pages * block, kv_heads, width, device=device).bfloat16()
        query = torch.randn(rows * block, heads, width, device=device).bfloat16()
        output = torch.empty_like(query)

        def kernel(
            query: Tensor = query, store: Tensor = store, paged: object = paged, output: Tensor = output
        ) -> Tensor:
            attend_tiles(query, *store, paged, output, windowed=False, scale=query.shape[-1] ** -0.5)  # type: ignore[arg-type]
            return output

        def plain(query: Tensor = query, store: Tensor = store, rows: int = rows) -> Tensor:
            split = lambda part: part.view(rows, -1, *part.shape[1:]).transpose(1, 2)
            found = F.scaled_dot_product_attention(split(query), *map(split, store), enable_gqa=True)
            return found.transpose(1, 2).reshape(query.shape)

        def wrong(kernel: Callable[[], Tensor] = kernel, plain: Callable[[], Tensor] = plain) -> float:
            return float((kernel().float() - plain().float()).abs().max())

        shape = f"{rows} x {block} x {heads}/{kv_heads} x {width}, {context + block} keys"
        yield "attention over pages", shape, kernel, plain, store.nbytes, wrong


def _norm(device: str, *, is_tiny: bool) -> Iterator[Case]:
    from sfumato.models.kernels import elementwise
    from sfumato.models.layers import gated, rms_norm

    width = 64 if is_tiny else 4096
    x, weight = (torch.randn(*shape, device=device).bfloat16() for shape in ((32, width), (width,)))
    wrong = lambda: float(
        (elementwise.norm(x, weight, 1e-5, is_wide=False) - rms_norm(x, weight, 1e-5)).abs().max()
    )
    yield (
        "norm",
        f"32 x {width}",
        lambda: elementwise.norm(x, weight, 1e-5, is_wide=False),
        lambda: rms_norm(x, weight, 1e-5),
        2 * x.nbytes,
        wrong,
    )
    wide = torch.randn(32, 6 * width, device=device).bfloat16()

    def plain() -> Tensor:
        gate, up = wide.chunk(2, -1)
        return F.silu(gate) * up

    yield (
        "gated activation",
        f"32 x {6 * width}",
        lambda: gated(wide, F.silu),
        plain,
        wide.nbytes * 3 // 2,
        lambda: float((gated(wide, F.silu) - plain()).abs().max()),
    )
