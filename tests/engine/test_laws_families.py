"""Law 1 on every family and algorithm: unlike requests share forwards, and each gets what it gets alone."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sfumato import Engine, EngineConfig, Limits, SamplingParams
from sfumato.engine.build import Loaded, load
from sfumato.errors import NotSupported
from sfumato.text.decoding.registry import ALGORITHMS, algorithm_class
from tests.engine.test_laws import run_with_arrivals

GOLDENS = Path(__file__).resolve().parent.parent / "data" / "goldens"
CHECKPOINTS = {
    "llada": "llada/checkpoints/llada-tiny-mha",
    "dream": "dream/checkpoints/dream-tiny-a",
    "llada2": "llada2/checkpoints/llada2-tiny",
    "sdar_moe": "sdar/checkpoints/sdar-moe-tiny",
    "diffusion_gemma": "diffusion_gemma/checkpoints/dgemma-tiny",
}

# Parameters that a random mix draws from; several entries for what has several ways to cache.
BIDIRECTIONAL: list[tuple[str, dict[str, Any]]] = [
    ("llada", {}),
    ("llada", {"cfg_scale": 0.5}),
    ("fast_dllm", {"threshold": 0.5, "cache": "prefix"}),
    ("fast_dllm", {"threshold": 0.6, "cache": "dual"}),
    ("fast_dllm_dream", {"threshold": 0.5, "cache": "dual"}),
    ("fast_dllm_dream", {"alg": "entropy", "cache": "prefix"}),
    ("fast_dllm_dream", {"alg": "entropy_threshold", "threshold": 1.0}),
    ("dinfer", {"rule": "hierarchy", "threshold": 0.7, "low_threshold": 0.3, "cache": "dual"}),
    ("dinfer", {"rule": "credit", "threshold": 0.7}),
    ("entropy_threshold", {"threshold": 0.8, "cache": "prefix"}),
    ("d3llm", {"threshold": 0.7}),
    ("d3llm", {"threshold": 0.7, "cache_delay_iter": 1, "refresh_interval": 3, "variant": "llada"}),
    ("d3llm", {"threshold": 0.9, "cache_delay_iter": 2, "block_add_threshold": 0.4}),
    ("dream", {"alg": "topk_margin"}),
    ("dream", {"alg": "entropy", "steps": 7}),
    ("dream", {"alg": "origin", "steps": 9}),
    ("dream", {"alg": "confidence_threshold", "steps": 5, "threshold": 0.5}),
    ("dream", {"alg": "maskgit_plus", "alg_temp": 0.3}),
]
BLOCK_CAUSAL: list[tuple[str, dict[str, Any]]] = [
    ("low_confidence", {"threshold": 0.6}),
    ("joint_threshold", {"threshold": 0.6, "edit_threshold": 0.7, "penalty_lambda": 0.5}),
    (
        "joint_threshold_indel",
        {"threshold": 0.6, "edit_threshold": 0.7, "delete_token_id": 9, "split_token_id": 11},
    ),
    ("block_refinement", {"threshold": 0.6, "editing_threshold": 0.7}),
    ("block_refinement", {"threshold": 0.6}),
    ("sdar", {}),
    ("dinfer", {"threshold": 0.6}),
    ("dinfer", {"rule": "credit", "threshold": 0.7}),
    ("fast_dllm", {"factor": 1.0}),
    ("entropy_threshold", {"threshold": 0.8}),
]
RENOISING: list[tuple[str, dict[str, Any]]] = [
    ("entropy_bound", {"max_denoising_steps": 8, "entropy_bound": 1.0}),
    ("entropy_bound", {"max_denoising_steps": 12, "stability_threshold": 0, "confidence_threshold": 0.3}),
    ("uniform_refinement", {"num_inference_steps": 5, "editing_threshold": 0.6}),
    ("discrete_ddim", {"num_inference_steps": 6}),
    ("discrete_ddim", {"num_inference_steps": 4, "corrector_steps": 1, "corrector_k": 3}),
]


def choices_for(loaded: Loaded) -> list[tuple[str, dict[str, Any]]]:
    """Return what fits a model."""
    if not loaded.traits.has_mask_token:
        return RENOISING
    return BLOCK_CAUSAL if loaded.traits.has_exact_cache else BIDIRECTIONAL


@pytest.fixture(scope="module", params=CHECKPOINTS)
def loaded(request: pytest.FixtureRequest) -> Loaded:
    """Load each family's tiny checkpoint once."""
    return load(
        EngineConfig(
            model=str(GOLDENS / CHECKPOINTS[request.param]), dtype="float32", device="cpu", kv_memory=8 << 20
        )
    )


def engine_with(
    loaded: Loaded,
    limits: Limits,
    num_tokens: int | None = None,
    overlap: str = "off",
    graphs: str = "auto",
) -> Engine:
    """Start an engine; num_tokens: how many tokens its pages hold."""
    memory = loaded.config.kv_memory
    if num_tokens is not None:
        memory = num_tokens * loaded.traits.kv_bytes_per_token(4)
    config = msgspec.structs.replace(
        loaded.config, limits=limits, kv_memory=memory, overlap=overlap, graphs=graphs
    )
    return Engine.from_loaded(dataclasses.replace(loaded, config=config))


def draw(loaded: Loaded, rng: random.Random) -> tuple[list[int], SamplingParams]:
    """Draw a prompt and how it is to be answered."""
    traits = loaded.traits
    prompt = [rng.randrange(1, 200) for _ in range(rng.choice([1, 5, 17, 34]))]
    name, parameters = rng.choice(choices_for(loaded))
    params = SamplingParams(
        max_tokens=rng.choice([5, 16, 40]),
        temperature=rng.choice([0.0, 0.0, 0.7]),
        top_p=rng.choice([1.0, 0.9]),
        seed=rng.randrange(100),
        block_length=None if traits.fixed_block_length else rng.choice([traits.block_length, 32]),
        algorithm=name,
        algorithm_parameters=parameters,
        logprobs=rng.choice([None, 2]),
        ignore_eos=rng.random() < 0.3,
    )
    if parameters.get("rule") == "credit":
        params = msgspec.structs.replace(params, temperature=0.0)
    if "steps" in parameters and name != "dream":
        params = msgspec.structs.replace(params, max_tokens=params.block_length)
    return prompt, params


def alone(loaded: Loaded, prompt: list[int], params: SamplingParams) -> list[int]:
    """Return what a request gets on an engine of its own."""
    (choice,) = engine_with(loaded, Limits()).generate([prompt], params)
    assert choice.error is None
    return choice.token_ids


@pytest.mark.parametrize("seed", range(3))
def test_results_do_not_depend_on_neighbours_arrivals_or_retractions(loaded: Loaded, seed: int) -> None:
    rng = random.Random(seed)
    limits = Limits(
        max_running_requests=8,
        policy=("separate", "mixed")[seed % 2],
        order=("fair", "shortest")[seed // 2],
        max_prefill_tokens=32,
    )
    asks = [draw(loaded, rng) for _ in range(12)]
    arrivals = [rng.randrange(10) for _ in asks]
    # Room for about two of them: pages run out, and requests are retracted on top of the random ones.
    engine = engine_with(
        loaded, limits, 192, overlap=("on", "off", "device")[seed % 3], graphs=("off", "on", "on")[seed % 3]
    )
    together = run_with_arrivals(engine, asks, arrivals, rng)
    for (prompt, params), found in zip(asks, together, strict=True):
        assert found == alone(loaded, prompt, params), params


def test_every_choice_runs_to_its_end(loaded: Loaded) -> None:
    for name, parameters in choices_for(loaded):
        params = SamplingParams(
            max_tokens=24, algorithm=name, algorithm_parameters=parameters, ignore_eos=True, seed=1
        )
        (choice,) = engine_with(loaded, Limits()).generate([[5, 6, 7]], params)
        assert choice.finish_reason == "length", (name, parameters, choice.error)
        assert len(choice.token_ids) == 24
        assert loaded.traits.mask_token_id not in choice.token_ids


def test_log_probabilities_are_of_the_decided_tokens(loaded: Loaded) -> None:
    for name, parameters in choices_for(loaded):
        params = SamplingParams(
            max_tokens=16,
            algorithm=name,
            algorithm_parameters=parameters,
            ignore_eos=True,
            seed=2,
            logprobs=20,
        )
        (choice,) = engine_with(loaded, Limits()).generate([[5, 6, 7]], params)
        assert choice.logprobs is not None
        for token, entry in zip(choice.token_ids, choice.logprobs, strict=True):
            known = dict(zip(entry.top_ids, entry.top_logprobs, strict=True))
            assert entry.logprob == pytest.approx(known.get(token, entry.logprob), abs=1e-5), (
                name,
                parameters,
            )


def test_what_does_not_fit_the_model_is_refused_by_name(loaded: Loaded) -> None:
    for name in ALGORITHMS:
        if algorithm_class(name).renoises == loaded.traits.has_mask_token:
            with pytest.raises(NotSupported, match="mask token") as refused:
                engine_with(loaded, Limits()).generate([[5]], SamplingParams(max_tokens=4, algorithm=name))
            assert refused.value.field == "algorithm"


@pytest.mark.parametrize("loaded", ["llada", "dream"], indirect=True)
def test_a_retracted_cache_comes_back_as_it_was(loaded: Loaded) -> None:
    for name, parameters in BIDIRECTIONAL:
        if not ("cache" in parameters or "cache_delay_iter" in parameters):
            continue
        params = SamplingParams(
            max_tokens=48, algorithm=name, algorithm_parameters=parameters, block_length=16
        )
        prompt = list(range(3, 20))
        wanted = alone(loaded, prompt, params)
        for retract_at in (1, 2, 3, 5, 8, 13):
            engine = engine_with(loaded, Limits())
            request_id = engine.add_request(prompt, params)
            tokens: list[int] = []
            step = 0
            while engine.has_work:
                request = engine.request(request_id)
                if step == retract_at and request is not None:
                    engine.loop.scheduler._retract(request)
                for turn in engine.step():
                    for output in turn.outputs:
                        tokens.extend(output.token_ids)
                step += 1
            assert tokens == wanted, (name, parameters, retract_at)
