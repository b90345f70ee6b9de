"""Writing a checkpoint with eight-bit weights: the same tensor names, and a scale beside each weight."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sfumato.errors import CheckpointError, ConfigError
from sfumato.models.folder import Folder
from sfumato.models.int8 import quantized_weight
from sfumato.models.quantization import quantization_config
from sfumato.models.weights import ProgressCallback, build_on_meta, tensors_of

_SHARD_BYTES = 4 << 30
_INDEX = "model.safetensors.index.json"


def save_int8(folder: Folder, out: Path, on_progress: ProgressCallback | None = None) -> int:
    """Write a folder's checkpoint to `out`; return its bytes. At most one shard is in memory.

    Raises ConfigError where `out` holds something, CheckpointError where the folder is quantized already.
    """
    if folder.is_quantized:
        raise CheckpointError(f"{folder.path}: its weights are int8 already")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty")
    out.mkdir(parents=True, exist_ok=True)
    for file in folder.path.iterdir():
        if file.suffix in (".json", ".jinja", ".txt", ".model") and file.name not in ("config.json", _INDEX):
            shutil.copyfile(file, out / file.name)
    where, total = _save_shards(_narrow(folder, on_progress), out)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (out / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
    config = {**folder.config, "quantization_config": quantization_config()}
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return total


def _narrow(folder: Folder, on_progress: ProgressCallback | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the checkpoint's tensors, weights of layers as int8 with their scales."""
    model, targets = build_on_meta(folder.config, quantization="int8")
    narrow = {name for name, parameter in model.named_parameters() if parameter.dtype is torch.int8}
    ignored = model.ignored_prefixes + (("lm_head.weight",) if model.shape.tied else ())
    read = 0
    for done, (name, slices) in enumerate(tensors_of(folder.path, targets, ignored), start=1):
        tensor = slices[:]
        read += tensor.nbytes
        if targets[name].parameter in narrow:
            tensor, scale = quantized_weight(tensor)
            yield f"{name}_scale", scale
        yield name, tensor
        if on_progress is not None:
            on_progress(done, len(targets), read)


def _save_shards(tensors: Iterator[tuple[str, Tensor]], out: Path) -> tuple[dict[str, str], int]:
    """Write files of about _SHARD_BYTES; return the file of each tensor, and all bytes."""
    where: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    size = total = number = 0

    def write() -> None:
        nonlocal size, number
        number += 1
        file = f"model-{number:05}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
        shard.clear()
        size = 0

    for name, tensor in tensors:
        shard[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
        if size >= _SHARD_BYTES:
            write()
    if shard:
        write()
    return where, total
