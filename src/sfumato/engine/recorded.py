"""Whether an engine's forwards are recorded and replayed, and with what."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.config import ATTENTION_LIBRARIES, EngineConfig
from sfumato.core.traits import ModelTraits
from sfumato.models.batch import Batch, KVStore
from sfumato.models.graphs import CudaRecorder, Graphs, Record, RunAgain
from sfumato.models.kernels import why_not
from sfumato.models.language_model import LanguageModel

# Entries of page tables that a recorded forward's fixed place has room for: half a megabyte.
_MOST_PAGES = 1 << 16


def how_forwards_run(config: EngineConfig, device: torch.device) -> str:
    """Return one sentence: what computes attention and statistics on a device, and whether it is recorded."""
    if device.type != "cuda":
        return "attention by grouped SDPA, statistics by torch"
    reason = why_not(device)
    if reason is not None:
        return f"attention by grouped SDPA, statistics by torch: {reason}"
    name = config.attention_backend
    if name == "torch":
        return "attention by grouped SDPA, statistics by Triton kernels, no CUDA graphs"
    is_recorded = config.graphs == "on" or (config.graphs == "auto" and config.world_size == 1)
    is_recorded = is_recorded and config.tensor_parallel == 1
    said = "attention over pages and statistics by Triton kernels, " + (
        "steps as CUDA graphs" if is_recorded else "no CUDA graphs"
    )
    if name in ATTENTION_LIBRARIES:
        said += f"; attention by {name} in steps that are not recorded"
    return said


def record_for(config: EngineConfig, device: torch.device) -> Record | None:
    """Return what records forwards on a device; None where none are.

    On a CPU, where a launch costs nothing that a graph would save, "on" runs the same fixed places without.
    """
    is_on_gpu = device.type == "cuda"
    if config.graphs == "off" or (config.graphs == "auto" and not is_on_gpu):
        return None
    return CudaRecorder(device) if is_on_gpu else RunAgain


def graphs_for(
    config: EngineConfig,
    model: LanguageModel,
    traits: ModelTraits,
    store: KVStore,
    page_size: int,
    whole: Callable[[Batch], Tensor] | None = None,
) -> Graphs | None:
    """Return the recorded forwards of an engine; None where none are kept.

    whole: what ranks that share weights record in place of the model's own forward; they do only where graphs
    are asked for by name, as no exchange inside a graph has ever run.
    Ranks of tensor parallelism record none: a follower has no loop that could agree on one. Nor do ranks that
    share a model whose steps take more than tokens. On a GPU torch's attention is one call per shape of rows,
    which no recording has.
    """
    is_by_torch = config.attention_backend == "torch" and model.device.type == "cuda"
    is_shared = whole is not None and (traits.has_self_conditioning or config.graphs != "on")
    if config.tensor_parallel > 1 or is_by_torch or is_shared:
        return None
    record = record_for(config, model.device)
    if record is None:
        return None
    return Graphs(
        whole or model.hidden,
        store,
        record,
        page_size=page_size,
        unit=traits.block_length,
        most_pages=_MOST_PAGES,
        device=torch.device(model.device),
    )
