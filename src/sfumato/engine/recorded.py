"""Whether an engine's forwards are recorded and replayed, and with what."""

from __future__ import annotations

import torch

from sfumato.config import ATTENTION_LIBRARIES, EngineConfig
from sfumato.core.traits import ModelTraits
from sfumato.models.batch import KVStore
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
    is_recorded = config.graphs != "off" and config.world_size == 1
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
) -> Graphs | None:
    """Return the recorded forwards of an engine that is alone with its model; None where none are kept.

    Ranks that hold a model together make collectives inside their forwards and vote for no graph. On a GPU
    torch's attention is one call per shape of rows, which no recording has.
    """
    is_by_torch = config.attention_backend == "torch" and model.device.type == "cuda"
    record = None if config.world_size > 1 or is_by_torch else record_for(config, model.device)
    if record is None:
        return None
    return Graphs(
        model.hidden,
        store,
        record,
        page_size=page_size,
        unit=traits.block_length,
        most_pages=_MOST_PAGES,
        device=torch.device(model.device),
    )
