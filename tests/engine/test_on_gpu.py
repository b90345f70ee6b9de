"""Laws and modes on a GPU: `pytest -m gpu`; what runs there is what runs on a CPU, token by token."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest
import torch

from sfumato import Engine, EngineConfig, SamplingParams
from sfumato.engine.build import Loaded, load
from sfumato.models.graphs import CudaRecorder
from tests.engine.test_laws_families import CHECKPOINTS, GOLDENS
from tests.engine.test_laws_families import (
    test_results_do_not_depend_on_neighbours_arrivals_or_retractions as check_neighbours,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [[1, 2, 3, 4, 5], [9, 8, 7], list(range(1, 30))]


def load_on(device: str, name: str, dtype: str = "float32") -> Loaded:
    """Load a tiny checkpoint."""
    model = str(Path(GOLDENS) / CHECKPOINTS[name])
    return load(EngineConfig(model=model, dtype=dtype, device=device, kv_memory=8 << 20))


@pytest.fixture(scope="module", params=CHECKPOINTS)
def loaded(request: pytest.FixtureRequest) -> Loaded:
    """Load each family's tiny checkpoint once."""
    return load_on("cuda", request.param)


@pytest.mark.parametrize("seed", range(3))
def test_neighbours_arrivals_and_retractions_change_nothing(loaded: Loaded, seed: int) -> None:
    check_neighbours(loaded, seed)


def answers(loaded: Loaded, temperature: float, **changes: str) -> list[list[int]]:
    """Return tokens of three requests."""
    config = msgspec.structs.replace(loaded.config, **changes)
    engine = Engine.from_loaded(dataclasses.replace(loaded, config=config))
    params = SamplingParams(max_tokens=24, temperature=temperature, top_p=0.9, seed=4, ignore_eos=True)
    found = [choice.token_ids for choice in engine.generate(PROMPTS, params)]
    engine.close()
    return found


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_modes_give_the_tokens_of_the_cpu(name: str, temperature: float) -> None:
    on_gpu, expected = load_on("cuda", name), answers(load_on("cpu", name), temperature)
    for overlap in ("off", "on", "device"):
        for graphs in ("off", "on"):
            found = answers(on_gpu, temperature, overlap=overlap, graphs=graphs)
            assert found == expected, (overlap, graphs)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bfloat16_runs_to_its_end(name: str) -> None:
    for tokens in answers(load_on("cuda", name, "bfloat16"), 0.7):
        assert len(tokens) == 24


def test_a_recording_gives_what_was_recorded() -> None:
    place = torch.zeros(4, device="cuda")
    weight = torch.arange(16.0, device="cuda").view(4, 4)
    with torch.inference_mode():
        recording = CudaRecorder(torch.device("cuda", 0))(lambda: weight @ place)
        for value in (1.0, -3.0):
            place.fill_(value)
            assert torch.equal(recording.replay(), weight @ place)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_steps_are_replayed(name: str) -> None:
    loaded = load_on("cuda", name)
    engine = Engine.from_loaded(loaded)
    parameters = {"cache": "dual"} if name in ("llada", "dream") else {}
    params = SamplingParams(max_tokens=24, ignore_eos=True, algorithm_parameters=parameters)
    if parameters:
        params = msgspec.structs.replace(params, algorithm="fast_dllm")
    engine.generate(PROMPTS, params)
    graphs = engine.loop.lanes[0].runner._graphs  # type: ignore[attr-defined]
    assert graphs.failure is None
    assert graphs.num_replays > 0
    engine.close()
