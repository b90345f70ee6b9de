"""Compiles every kernel for a GPU that need not be there: `python -m tests.kernels.compiled [NAME]`.

Prints a line per kernel and variant: bytes of shared memory. Compute capability 9.0, which is an H200's.
"""

from __future__ import annotations

import os
import sys
from typing import Any

# Interpreted kernels cannot be compiled.
os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sfumato.models.kernels import attention, elementwise, grouped, keeping, narrowing, routing, splitting
from sfumato.text.kernels import filters, reading

# What one program may take of a core's memory.
MOST_SHARED = 227 << 10
_INTEGERS = {
    "size",
    "row_stride",
    "x_stride",
    "key_stride",
    "value_stride",
    "query_stride",
    "output_stride",
    "num_inputs",
    "num_outputs",
}


def variants() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Return name, kernel, types of its arguments by name, constants, options."""
    read = {
        "logits": "*bf16",
        "row_stride": "i32",
        "size": "i32",
        "temperatures": "*fp32",
        "keys": "*i64",
        "cuts": "*fp32",
        "lasts": "*i32",
        "floats": "*fp32",
        "indices": "*i32",
        "part_size": "i32",
    }
    found: list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]] = []
    for processed, cuts, noise in ((False, False, False), (True, True, True)):
        constants = {"WIDTH": 1024, "HAS_PROCESSED": processed, "HAS_CUTS": cuts, "HAS_NOISE": noise}
        found.append(("read part", reading._read_part, read, constants, {"num_warps": 4}))
    join = {
        "logits": "*bf16",
        "row_stride": "i32",
        "size": "i32",
        "modes": "*i32",
        "temperatures": "*fp32",
        "floats": "*fp32",
        "indices": "*i32",
        "num_parts": "i32",
        "tokens": "*i64",
        "results": "*fp32",
        "num_rows": "i32",
    }
    found.append(
        ("join parts", reading._join_parts, join, {"PARTS": 16, "HAS_NOISE": True}, {"num_warps": 1})
    )
    cut = {
        "logits": "*bf16",
        "row_stride": "i32",
        "size": "i32",
        "temperatures": "*fp32",
        "top_ks": "*i32",
        "top_ps": "*fp32",
        "firsts": "*i32",
        "cuts": "*fp32",
        "lasts": "*i32",
    }
    found.append(("cut rows", filters._cut_rows, cut, {"WIDTH": 1024}, {"num_warps": 8}))
    keep = {
        "key": "*bf16",
        "value": "*bf16",
        "key_stride": "i32",
        "value_stride": "i32",
        "keys": "*bf16",
        "values": "*bf16",
        "slots": "*i64",
        "size": "i32",
    }
    found.append(("keep rows", keeping._keep_rows, keep, {"WIDTH": 1024}, {"num_warps": 4}))
    found += [*_attention(), *_elementwise(), *_grouped(), *_routing()]
    return found


def _attention() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    found: list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]] = []
    for kind, width, tile, splits, windowed in (
        ("bf16", 128, 32, 1, False),
        ("bf16", 128, 32, 8, False),
        ("bf16", 128, 4, 1, False),
        ("bf16", 128, 4, 32, False),
        ("bf16", 64, 64, 1, True),
        ("bf16", 256, 64, 1, True),
        ("bf16", 256, 64, 16, True),
        ("bf16", 512, 64, 1, False),
        ("bf16", 512, 64, 32, False),
        ("fp32", 32, 32, 1, True),
        ("fp32", 128, 64, 2, False),
    ):
        types = dict.fromkeys(("query", "keys", "values", "output"), f"*{kind}")
        types |= dict.fromkeys(("totals", "tops", "masses"), "*fp32" if splits > 1 else f"*{kind}")
        types |= dict.fromkeys(("tiles", "firsts", "ends", "pages"), "*i64")
        types |= {"query_stride": "i32", "output_stride": "i32", "scale": "fp32"}
        plan = attention.plan_of(width, shared=4, tile=tile, itemsize=2 if kind == "bf16" else 4)
        constants = {
            "SHARED": 4,
            "KV_HEADS": 4,
            "WIDTH": width,
            "PAGE": 32,
            "TILE": tile,
            "SPLITS": splits,
            "IS_WINDOWED": windowed,
            "IS_WIDE": False,
            **plan.constants(),
        }
        found.append((f"attention {kind}", attention._attend_tile, types, constants, plan.options()))
        if splits > 1:
            names = ("SHARED", "WIDTH", "PADDED_WIDTH", "TILE", "HEADS", "ROWS", "SPLITS")
            constants = {name: constants[name] for name in names}
            found.append((f"join parts of attention {kind}", splitting._join_parts, types, constants, {}))
    return found


def _routing() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    choose = {
        "logits": "*fp32",
        "bias": "*fp32",
        "chosen": "*i64",
        "weights": "*fp32",
        "num_experts": "i32",
        "scale": "fp32",
        "tiny": "fp32",
    }
    chosen = {"EXPERTS": 256, "COUNT": 8, "COUNT_WIDTH": 8, "GROUPS": 8, "KEPT": 4}
    sort = dict.fromkeys(("chosen", "tokens", "places"), "*i64")
    sort |= {"ends": "*i32", "num_chosen": "i32", "num_experts": "i32"}
    total = {
        "computed": "*bf16",
        "places": "*i64",
        "weights": "*fp32",
        "output": "*fp32",
        "size": "i32",
        "num_there": "*i32",
    }
    return [
        ("choose", routing._choose, choose, chosen, {"num_warps": 1}),
        ("sort", routing._sort, sort, {"COUNT": 8, "OWN": 32, "OTHERS": 256}, {"num_warps": 4}),
        ("sum chosen", routing._sum_chosen, total, {"COUNT": 8, "WIDTH": 1024}, {"num_warps": 4}),
    ]


def _grouped() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    found = []
    for kind, rows, itemsize in (
        ("bf16", 256, 2),
        ("bf16", 16384, 2),
        ("fp32", 256, 4),
        ("fp8e4nv", 256, 1),
        ("fp8e4nv", 16384, 1),
    ):
        has_scales = itemsize == 1
        types = dict.fromkeys(("rows", "weights"), f"*{kind}")
        types |= {"output": "*bf16" if has_scales else f"*{kind}"}
        types |= {"ends": "*i32", "num_inputs": "i32", "num_outputs": "i32"}
        plan = grouped.plan_of(rows, 256, itemsize)
        constants: dict[str, Any] = {"HAS_SCALES": has_scales, "IS_WIDE": False, **plan.constants()}
        if has_scales:
            types |= {"row_scales": "*fp32", "scales": "*fp32"}
        else:
            constants |= {"row_scales": None, "scales": None}
        found.append((f"grouped {kind}", grouped._multiply, types, constants, plan.options()))
    return found


def _elementwise() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    norm = {
        "x": "*bf16",
        "x_stride": "i32",
        "more": "*bf16",
        "total": "*bf16",
        "weight": "*bf16",
        "output": "*bf16",
        "size": "i32",
        "eps": "fp32",
    }
    turn = {
        "x": "*bf16",
        "x_stride": "i32",
        "weight": "*bf16",
        "cos": "*fp32",
        "sin": "*fp32",
        "output": "*bf16",
        "heads": "i32",
        "eps": "fp32",
    }
    turned = {"SIZE": 128, "TURNED": 64, "WIDTH": 128, "HAS_NORM": True, "IS_WIDE": True}
    narrow = {
        "x": "*bf16",
        "x_stride": "i32",
        "narrow": "*fp8e4nv",
        "scales": "*fp32",
        "size": "i32",
        "largest": "fp32",
        "least": "fp32",
    }
    gate = {"x": "*bf16", "output": "*bf16", "size": "i32"}
    return [
        *(
            (
                "norm",
                elementwise._norm,
                norm,
                {"HAS_MORE": has_more, "IS_WIDE": False, "WIDTH": 4096},
                {"num_warps": 8},
            )
            for has_more in (False, True)
        ),
        ("turn", elementwise._turn, turn, turned, {"num_warps": 1}),
        *(
            ("gate", elementwise._gate, gate, {"KIND": kind, "WIDTH": 1024}, {"num_warps": 4})
            for kind in (elementwise.SILU, elementwise.GELU_TANH)
        ),
        ("narrow rows", narrowing._narrow_rows, narrow, {"WIDTH": 16384}, {"num_warps": 8}),
    ]


def main() -> int:
    """Compile all; the exit status is 1 where one needs more shared memory than there is."""
    status = 0
    target = GPUTarget("cuda", 90, 32)
    chosen = sys.argv[1] if len(sys.argv) > 1 else ""
    for name, kernel, types, constants, options in variants():
        if chosen not in name:
            continue
        names = [parameter for parameter in kernel.arg_names if parameter not in constants]
        signature = {parameter: types[parameter] for parameter in names}
        # As at run time: tensors lie at multiples of 16 bytes, and real sizes are multiples of 16.
        aligned = {
            (index,): [["tt.divisibility", 16]]
            for index, parameter in enumerate(kernel.arg_names)
            if types.get(parameter, "").startswith("*") or parameter in _INTEGERS
        }
        source = ASTSource(
            kernel,
            signature=signature | dict.fromkeys(constants, "constexpr"),
            constexprs=constants,
            attrs=aligned,
        )
        made = triton.compile(source, target=target, options=options)
        shared = made.metadata.shared
        status |= shared > MOST_SHARED
        print(f"{name}: {shared} bytes of shared memory, {constants}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
