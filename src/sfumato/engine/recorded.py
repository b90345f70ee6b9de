"""Whether an engine's forwards are recorded and replayed, and with what."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.config import EngineConfig
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
    is_recorded = config.graphs != "off" and config.tensor_parallel == 1
    return "attention over pages and statistics by Triton kernels, " + (
        "steps as CUDA graphs" if is_recorded else "no CUDA graphs"
    )


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

    whole: what ranks that share weights record in place of the model's own forward.
    Ranks of tensor parallelism record none: a follower has no loop that could agree on one. Nor do ranks that
    share a model whose steps take more than tokens.
    """
    record = None if config.tensor_parallel > 1 else record_for(config, model.device)
    if record is None or (whole is not None and traits.has_self_conditioning):
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
