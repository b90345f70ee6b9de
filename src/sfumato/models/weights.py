"""Reading safetensors into a model: memory-mapped, straight to dtype and device, every name checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sfumato.errors import CheckpointError
from sfumato.models.checkpoint_names import Target
from sfumato.models.folder import Folder, read_json
from sfumato.models.fp8 import FP8, fp8_weight
from sfumato.models.int8 import quantized_weight
from sfumato.models.language_model import LanguageModel
from sfumato.models.registry import family_of
from sfumato.models.split import cuts_of, pieces

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Weights in eight bits by their name, and what makes them with their scales.
NARROW = {"int8": torch.int8, "fp8": FP8}
_NARROWING = {torch.int8: quantized_weight, FP8: fp8_weight}

# Called with (tensors done, tensors in all, bytes read so far).
ProgressCallback = Callable[[int, int, int], None]

# Buffers that some exporters write and no forward pass reads.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def build_on_meta(
    config: dict[str, Any],
    divide: Callable[[LanguageModel], None] | None = None,
    *,
    quantization: str | None = None,
) -> tuple[LanguageModel, dict[str, Target]]:
    """Build a model without memory, and the checkpoint tensors that it expects.

    divide: leaves the part that one of several ranks holds. quantization: of NARROW, or None.
    """
    family = family_of(config)
    shape = family.shape_from_hf(config)
    with torch.device("meta"):
        model = family.build(shape)
        if divide is not None:
            divide(model)
        if quantization is not None:
            model.quantize(NARROW[quantization])
    return model, family.targets(shape)


def count_parameters(targets: dict[str, Target]) -> int:
    """Return how many numbers a checkpoint of these tensors holds."""
    return sum(math.prod(target.shape) for target in targets.values())


def resolve_dtype(name: str, config: dict[str, Any]) -> torch.dtype:
    """Return the dtype of an option ("auto" takes the checkpoint's own)."""
    if name == "auto":
        # A model of several parts may say it in the one that is text.
        parts = (config, config.get("text_config") or {})
        named = [part[key] for part in parts for key in ("torch_dtype", "dtype") if part.get(key)]
        name = str(named[0] if named else "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(f"dtype {name!r} is not supported (supported: auto, {', '.join(DTYPES)})")
    return DTYPES[name]


def load_model(
    folder: Folder,
    *,
    dtype: torch.dtype,
    device: str,
    pack: bool = True,
    divide: Callable[[LanguageModel], None] | None = None,
    on_progress: ProgressCallback | None = None,
) -> LanguageModel:
    """Load a checkpoint's weights; beside the model, one tensor at a time is in memory.

    divide: leaves the part that one of several ranks holds; nothing else is read.
    Raises CheckpointError naming the tensor or the file: missing, extra, of a wrong shape, truncated.
    """
    model, targets = build_on_meta(folder.config, divide, quantization=folder.quantization)
    narrow = {name for name, parameter in model.named_parameters() if parameter.dtype in _NARROWING}
    if folder.is_quantized:
        targets |= _scales(targets, narrow)
    cuts = cuts_of(model)
    model = _with_memory(model, targets, dtype, device)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ignored = model.ignored_prefixes + (("lm_head.weight",) if model.shape.tied else ())
    read = 0
    for done, (name, tensor) in enumerate(tensors_of(folder.path, targets, ignored), start=1):
        target = targets[name]
        shape = tensor.get_shape()
        if tuple(shape) != target.shape:
            raise CheckpointError(
                f"{folder.path}: tensor {name!r} has shape {[*shape]}, expected {[*target.shape]}"
            )
        for piece in pieces(target, cuts.get(target.parameter)):
            part = _read(folder.path, name, tensor, piece.source)
            if target.parameter in narrow and not folder.is_quantized:
                part, scale = _NARROWING[parameters[target.parameter].dtype](part)
                parameters[f"{target.parameter}_scale"][piece.place].copy_(scale)
            wanted = parameters[target.parameter].dtype
            if target.parameter in narrow and part.dtype is not wanted:
                raise CheckpointError(
                    f"{folder.path}: tensor {name!r} is {part.dtype}, expected {_name(wanted)}"
                )
            parameters[target.parameter][piece.place].copy_(part)
            read += part.numel() * part.element_size()
        if on_progress is not None:
            on_progress(done, len(targets), read)
    if pack:
        model.pack()
    return model


def _with_memory(
    model: LanguageModel, targets: dict[str, Target], dtype: torch.dtype, device: str
) -> LanguageModel:
    """Allocate a meta model's parameters, uninitialised."""
    narrow = {name for name, parameter in model.named_parameters() if parameter.dtype in _NARROWING}
    for module in model.modules():
        # `to_empty` would do, but for meta tensors it loads sympy, which takes most of a second.
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            kept = parameter.dtype if parameter.dtype in _NARROWING else dtype
            empty = torch.empty(parameter.shape, dtype=kept, device=device)
            setattr(module, leaf, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    model = model.eval()
    if model.shape.tied:
        model.output.weight = model.embedding
    wide = {target.parameter for target in targets.values() if target.is_float32}
    for name in wide | {f"{weight}_scale" for weight in narrow}:
        owner, _, leaf = name.rpartition(".")
        values = model.get_parameter(name).float()
        setattr(model.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
    return model


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _scales(targets: dict[str, Target], narrow: set[str]) -> dict[str, Target]:
    """Return the scales that a quantized checkpoint holds beside its weights."""
    return {
        f"{name}_scale": replace(
            target, parameter=f"{target.parameter}_scale", shape=(*target.shape[:-1], 1), is_float32=True
        )
        for name, target in targets.items()
        if target.parameter in narrow
    }


def _read(path: Path, name: str, tensor: Any, source: tuple[slice, ...]) -> Tensor:
    try:
        part: Tensor = tensor[source]
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: tensor {name!r} cannot be read: {error}") from error
    return part


def tensors_of(path: Path, targets: dict[str, Target], ignored: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield every expected tensor once, after checking that the names are exactly the expected ones.

    The tensors are safetensors slices, of which nothing has been read. ignored: beginnings of names that may
    stand in the files besides.
    """
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in _weight_files(path):
            handle = stack.enter_context(_opened(file))
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                if name in where:
                    raise CheckpointError(
                        f"{path}: tensor {name!r} stands in two files, the second is {file.name}"
                    )
                where[name] = handle
        missing = sorted(targets.keys() - where.keys())
        extra = sorted(
            name
            for name in where.keys() - targets.keys()
            if not name.startswith(ignored) and not name.endswith(_IGNORED_SUFFIXES)
        )
        if missing:
            raise CheckpointError(f"{path}: tensor {missing[0]!r} is missing{_and_more(missing)}")
        if extra:
            raise CheckpointError(
                f"{path}: tensor {extra[0]!r} is not part of this architecture{_and_more(extra)}"
            )
        for name in targets:
            try:
                tensor = where[name].get_slice(name)
            except (SafetensorError, OSError, RuntimeError) as error:
                raise CheckpointError(f"{path}: tensor {name!r} cannot be read: {error}") from error
            yield name, tensor


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file (truncated?): {error}") from error


def _weight_files(path: Path) -> list[Path]:
    index = read_json(path / _INDEX)
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{path / _INDEX}: field 'weight_map' is missing")
        files = [path / name for name in sorted(set(weight_map.values()))]
    else:
        files = [path / _SINGLE]
    for file in files:
        if not file.exists():
            others = sorted(other.name for other in path.glob("*.bin"))
            hint = f"; {others[0]} is a pickle and is never read" if others else ""
            raise CheckpointError(f"{file}: no such file{hint}")
    return files
