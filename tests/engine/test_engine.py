"""The in-process engine as a library user meets it: errors at once, several prompts, models without text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sfumato import Engine, EngineConfig, Limits, SamplingParams
from sfumato.core.messages import FinishReason
from sfumato.engine import build
from sfumato.errors import ConfigError, EngineError, RequestError
from sfumato.models.folder import read_folder
from sfumato.text.runner import TextRunner

SDAR = Path(__file__).resolve().parent.parent / "data" / "goldens" / "sdar" / "checkpoints" / "sdar-tiny"


@pytest.fixture(scope="module")
def engine() -> Engine:
    """A model without a tokenizer."""
    return Engine.load(str(SDAR), kv_memory=8 << 20, device="cpu")


def test_token_ids_in_token_ids_out(engine: Engine) -> None:
    first, second = engine.generate(
        [[1, 2, 3], [4, 5, 6, 7, 8]], SamplingParams(max_tokens=6, ignore_eos=True)
    )
    assert len(first.token_ids) == len(second.token_ids) == 6
    assert first.text == ""
    assert second.usage.prompt_tokens == 5


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (SamplingParams(max_tokens=0), "max_tokens"),
        (SamplingParams(temperature=-1.0), "temperature"),
        (SamplingParams(temperature=float("nan")), "temperature"),
        (SamplingParams(top_p=0.0), "top_p"),
        (SamplingParams(top_p=1.5), "top_p"),
        (SamplingParams(top_k=9999), "top_k"),
        (SamplingParams(n=0), "n"),
        (SamplingParams(logprobs=21), "top_logprobs"),
        (SamplingParams(stop_token_ids=(320,)), "stop_token_ids"),
        (SamplingParams(logit_bias={500: 1.0}), "logit_bias"),
        (SamplingParams(block_length=6), "block_length"),
        (SamplingParams(block_length=0), "block_length"),
        (SamplingParams(algorithm="magic"), "algorithm"),
        (SamplingParams(timeout=0.0), "timeout"),
        (SamplingParams(infill=(1, None), max_tokens=3), "infill"),
        (SamplingParams(infill=(1000, None)), "infill"),
        (SamplingParams(infill=(None,) * 100_000), "infill"),
        (SamplingParams(stop=("x",)), "stop"),
    ],
)
def test_bad_parameters_are_refused_at_once(engine: Engine, params: SamplingParams, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        engine.generate([[1, 2, 3]], params)
    assert field in caught.value.field
    engine.step()
    assert not engine.has_work


def test_text_needs_a_tokenizer(engine: Engine) -> None:
    with pytest.raises(RequestError, match="tokenizer"):
        engine.generate("hello")
    with pytest.raises(RequestError, match="vocabulary of 320"):
        engine.generate([[999]])
    with pytest.raises(RequestError, match="empty"):
        engine.generate([[]])


def test_an_active_id_is_refused_and_may_be_used_again(engine: Engine) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    engine.add_request([1, 2], params, request_id="same")
    with pytest.raises(RequestError, match="already active"):
        engine.add_request([1, 2], params, request_id="same")
    while engine.has_work:
        engine.step()
    assert engine.add_request([1, 2], params, request_id="same") == "same"
    engine.abort("same")
    (output,) = [output for turn in engine.step() for output in turn.outputs]
    assert output.finish_reason is FinishReason.ABORT


def test_a_closed_stream_aborts_its_request(engine: Engine) -> None:
    stream = engine.stream([1, 2, 3], SamplingParams(max_tokens=64, ignore_eos=True))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    engine.step()
    assert not engine.has_work


def test_a_closed_engine_takes_nothing() -> None:
    engine = Engine.load(str(SDAR), kv_memory=1 << 20, device="cpu")
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.generate([[1]], SamplingParams(max_tokens=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "--device 'tpu'"),
        ({"kv_memory": 10}, "--kv-memory 10"),
        ({"page_size": 3}, "--page-size 3"),
        ({"limits": Limits(policy="fifo")}, "--policy 'fifo'"),
        ({"limits": Limits(order="lifo")}, "--order 'lifo'"),
        ({"limits": Limits(max_running_requests=0)}, "--max-running-requests 0"),
        ({"limits": Limits(denoise_every=0)}, "--denoise-every 0"),
        ({"parameters": {"threshold": 0.5}}, "--algorithm-parameters"),
        ({"algorithm": "sdar", "parameters": {"threshold": 0.5}}, "threshold"),
    ],
)
def test_options_that_cannot_work_fail_at_start(options: dict[str, object], message: str) -> None:
    with pytest.raises((ConfigError, RequestError), match=message):
        Engine.load(EngineConfig(model=str(SDAR), **options))  # type: ignore[arg-type]


def test_an_operators_algorithm_is_the_default_with_its_parameters() -> None:
    config = EngineConfig(
        model=str(SDAR),
        device="cpu",
        kv_memory=1 << 20,
        algorithm="low_confidence",
        parameters={"threshold": 0.0},
    )
    engine = Engine.load(config)
    (choice,) = engine.generate([[1, 2, 3, 4]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert choice.usage.denoise_steps == 1
    (choice,) = engine.generate(
        [[1, 2, 3, 4]], SamplingParams(max_tokens=4, ignore_eos=True, algorithm="sdar")
    )
    assert choice.usage.denoise_steps > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_tokens_of_the_cpu(engine: Engine) -> None:
    params = SamplingParams(max_tokens=40, temperature=0.7, seed=4, ignore_eos=True)
    prompts = [[1, 2, 3, 4, 5], [9, 8, 7]]
    on_gpu = Engine.load(str(SDAR), kv_memory=8 << 20, device="cuda").generate(prompts, params)
    on_cpu = engine.generate(prompts, params)
    assert [choice.token_ids for choice in on_gpu] == [choice.token_ids for choice in on_cpu]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_no_launch_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    engine = Engine.load(str(SDAR), kv_memory=8 << 20, device="cuda")
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=4, ignore_eos=True)
    prompts = [[1, 2, 3, 4, 5], [9, 8, 7]]
    expected = [choice.token_ids for choice in engine.generate(prompts, params)]
    begin = TextRunner.begin

    def strictly(*arguments: object) -> object:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return begin(*arguments)  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(TextRunner, "begin", strictly)
    assert [choice.token_ids for choice in engine.generate(prompts, params)] == expected


@pytest.mark.parametrize(
    ("native", "memory", "dtype", "expected"),
    [
        (True, 1 << 40, "auto", torch.bfloat16),
        (False, 1 << 40, "auto", torch.float32),
        (False, 1 << 20, "auto", torch.bfloat16),
        (False, 1 << 40, "bfloat16", torch.bfloat16),
    ],
    ids=["native", "imitated", "too large", "asked for"],
)
def test_auto_avoids_bfloat16_where_a_cpu_only_imitates_it(
    monkeypatch: pytest.MonkeyPatch, native: bool, memory: int, dtype: str, expected: torch.dtype
) -> None:
    monkeypatch.setattr(build, "has_bfloat16", lambda: native)
    monkeypatch.setattr(build, "memory_bytes", lambda: memory)
    folder = read_folder("sfumato-tiny-sdar")
    config = EngineConfig(model="sfumato-tiny-sdar", dtype=dtype)
    assert build.choose_dtype(config, folder, "cpu") is expected
    if dtype == "auto":
        assert build.choose_dtype(config, folder, "cuda") is torch.bfloat16
