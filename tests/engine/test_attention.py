"""Which attention an engine computes, what is refused, and whole cases through what libraries publish."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.config import ATTENTION_BACKENDS, EngineConfig
from sfumato.engine import attention, build, recorded
from sfumato.engine.attention import attention_for, check_attention
from sfumato.engine.recorded import graphs_for, how_forwards_run
from sfumato.errors import ConfigError
from sfumato.models import paged
from sfumato.models.attending import Attention, Pool
from sfumato.models.attending.flash_attention import FlashAttention3
from sfumato.models.attending.flash_infer import FlashInfer
from sfumato.models.language_model import LanguageModel
from sfumato.text import paged_batching
from sfumato.text.paged_batching import batch_of
from tests.engine.test_graphs import World, load_tiny
from tests.goldens.__main__ import replay_each
from tests.goldens.replay import Mode, load_checkpoint
from tests.goldens.test_modes import engine_cases
from tests.models import foreign_attention
from tests.models.foreign_attention import CALLS

GPU = torch.device("cuda", 0)
KINDS = (
    "generate_sdar_greedy",
    "fastdllm_dual_cache",
    "d3llm_multi_block_kv_cache",
    "generate_dinfer_threshold",
)
LIBRARIES = {"flash_attn_interface": FlashAttention3, "flashinfer": FlashInfer}


def config_of(**options: Any) -> EngineConfig:
    """Return a configuration."""
    return EngineConfig(model="m", **options)


def chosen(name: str, **changes: Any) -> Attention:
    """Return the attention of an engine on a GPU that need not be there."""
    kept: dict[str, Any] = {"dtype": torch.bfloat16, "kv_shapes": ((2, 64),)}
    model = SimpleNamespace(device=GPU, **(kept | changes))
    return attention_for(config_of(attention_backend=name), model, model.dtype, 32)  # type: ignore[arg-type]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a Hopper GPU be there on which kernels run; tensors stay where they are."""
    monkeypatch.setattr(attention, "why_not", lambda device: None)
    monkeypatch.setattr(recorded, "why_not", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "Pool", lambda device, *facts: Pool(torch.device("cpu"), *facts))


@pytest.mark.parametrize(
    ("options", "device", "said"),
    [
        (
            {"attention_backend": "flash"},
            "cpu",
            "'flash' is not one of auto, triton, flash-attn, flashinfer, torch",
        ),
        ({"attention_backend": "triton"}, "cpu", "triton needs a GPU, and the device is cpu"),
        ({"attention_backend": "flashinfer"}, "cpu", "flashinfer needs a GPU"),
        ({"attention_backend": "flash-attn"}, "cuda:0", "flash-attn is not installed"),
        ({"attention_backend": "torch", "graphs": "on"}, "cuda", "does not go with --graphs on"),
        ({"attention_backend": "flashinfer", "tensor_parallel": 2}, "cuda", "not go with --tensor-parallel"),
    ],
)
def test_what_is_not_here_is_refused(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], device: str, said: str
) -> None:
    foreign_attention.install(monkeypatch)

    def check(config: EngineConfig) -> None:
        config.check()
        check_attention(config, device)

    with pytest.raises(ConfigError, match="--attention-backend") as refused:
        check(config_of(**options))
    assert said in str(refused.value)


def test_what_is_here_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign_attention.install(monkeypatch, "flash_attn", "flashinfer")
    for name in ATTENTION_BACKENDS:
        config = config_of(attention_backend=name)
        config.check()
        check_attention(config, "cuda")
    for name in ("auto", "torch"):
        check_attention(config_of(attention_backend=name, graphs="on"), "cpu")
        check_attention(config_of(attention_backend=name, tensor_parallel=2), "cuda")


@pytest.mark.usefixtures("gpu")
def test_who_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign_attention.install(monkeypatch, *LIBRARIES)
    assert chosen("auto") == chosen("triton") == Attention()
    assert chosen("torch") == Attention(has_kernels=False)
    assert isinstance(chosen("flash-attn").adapter, FlashAttention3)
    assert isinstance(chosen("flashinfer").adapter, FlashInfer)
    with pytest.raises(ConfigError, match="--attention-backend flashinfer cannot be used: heads of 80"):
        chosen("flashinfer", kv_shapes=((2, 80),))
    with pytest.raises(ConfigError, match="flash-attn cannot be used: it takes bfloat16 and float16"):
        chosen("flash-attn", dtype=torch.float32)


def test_libraries_need_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "why_not", lambda device: "no C compiler")
    with pytest.raises(ConfigError, match="flashinfer: cuda:0 runs no Triton kernel: no C compiler"):
        chosen("flashinfer")
    assert chosen("auto") == Attention()


@pytest.mark.usefixtures("gpu")
def test_it_is_said() -> None:
    said = {name: how_forwards_run(config_of(attention_backend=name), GPU) for name in ATTENTION_BACKENDS}
    assert said["auto"] == said["triton"]
    assert said["torch"].startswith("attention by grouped SDPA, statistics by Triton kernels, no CUDA graphs")
    assert said["flashinfer"].endswith("attention by flashinfer in steps that are not recorded")


def test_torch_takes_rows_without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_batching, "run_on", lambda tensor: True)
    world = World(load_tiny("llada"))
    found = [
        batch_of(
            [world.row(8, 8, None, [1, 2])],
            traits=world.loaded.traits,
            output_tokens=np.asarray([0]),
            store=world.store,
            page_size=8,
            device=world.loaded.model.device,
            attention=Attention(has_kernels=has_kernels),
        )
        for has_kernels in (True, False)
    ]
    assert [batch.paged is not None for batch in found] == [True, False]


def test_torch_is_not_recorded_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_tiny("llada")
    model = SimpleNamespace(device=GPU, hidden=None)
    monkeypatch.setattr(recorded, "CudaRecorder", lambda device: None)
    config = config_of(attention_backend="torch")
    assert graphs_for(config, model, loaded.traits, None, 8) is None  # type: ignore[arg-type]


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Let engines on a CPU compute with what a library publishes, and in torch what that cannot express."""
    foreign_attention.install(monkeypatch, request.param)
    monkeypatch.setattr(paged_batching, "run_on", lambda tensor: True)
    monkeypatch.setattr(paged, "run_on", lambda tensor: False)

    def make(config: EngineConfig, model: LanguageModel, dtype: torch.dtype, page_size: int) -> Attention:
        pool = Pool(model.device, (9, 0), dtype, tuple(model.kv_shapes), page_size)
        return Attention(adapter=LIBRARIES[request.param](pool))

    monkeypatch.setattr(build, "attention_for", make)
    load_checkpoint.cache_clear()
    yield request.param
    load_checkpoint.cache_clear()


def problems_of(kinds: tuple[str, ...], mode: Mode) -> dict[str, str]:
    """Replay the smallest case of each kind."""
    cases = [
        min((case for case in engine_cases() if case.kind == kind), key=lambda case: case.path.stat().st_size)
        for kind in kinds
    ]
    return {case.name: problem for case, problem in replay_each(cases, mode) if problem is not None}


def test_cases_through_a_library(library: str) -> None:
    assert problems_of((*KINDS, "generate_transformers"), Mode(graphs="off")) == {}
    assert CALLS[library] > 0


def test_recorded_forwards_are_none_of_a_library(library: str) -> None:
    assert problems_of(KINDS, Mode(graphs="on")) == {}
    assert library not in CALLS
