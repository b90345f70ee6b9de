"""Laws 1, 2 and 5 on the embedded models: a request's result is its own, whatever its neighbours do."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import msgspec
import pytest

from sfumato import Engine, EngineConfig, Limits, SamplingParams
from sfumato.core.request import Status
from sfumato.engine.build import Loaded, load
from sfumato.engine.frontend import Assembler

MODELS = ("sfumato-tiny-sdar", "sfumato-tiny-llada")

QUESTIONS = (
    "Tom has 12 apples and buys 7 more. How many apples does Tom have now?",
    "Mia, 34, nurse in Oslo",
    "Sort the words: pear apple fig",
    "12+7=",
    "Reverse the list: red, green, blue",
)


@pytest.fixture(scope="module", params=MODELS)
def loaded(request: pytest.FixtureRequest) -> Loaded:
    """Load each embedded model once, in float32."""
    limits = Limits(max_running_requests=16)
    return load(
        EngineConfig(model=request.param, dtype="float32", device="cpu", kv_memory=32 << 20, limits=limits)
    )


def random_params(rng: random.Random, *, is_causal: bool) -> SamplingParams:
    """Draw an algorithm with parameters, a temperature and a seed."""
    algorithms: list[tuple[str, dict[str, Any]]] = [
        ("fast_dllm", {"threshold": rng.choice([0.5, 0.9])}),
        ("fast_dllm", {"factor": 1.0}),
        ("low_confidence", {"threshold": 0.8}),
        ("llada", {"remasking": rng.choice(["low_confidence", "random"])}),
        ("sdar", {"remasking_strategy": rng.choice(["sequential", "low_confidence_static"])}),
    ]
    if not is_causal:
        algorithms.append(("llada", {"cfg_scale": 0.5}))
    name, parameters = rng.choice(algorithms)
    return SamplingParams(
        max_tokens=rng.choice([5, 16, 33]),
        temperature=rng.choice([0.0, 0.0, 0.7]),
        top_k=rng.choice([0, 20]),
        top_p=rng.choice([1.0, 0.9]),
        seed=rng.randrange(100),
        block_length=rng.choice([16, 32]),
        algorithm=name,
        algorithm_parameters=parameters,
        logprobs=rng.choice([None, 2]),
    )


def ask(engine: Engine, rng: random.Random) -> tuple[list[int], SamplingParams]:
    """Draw a question and how it is to be answered."""
    messages = [{"role": "user", "content": rng.choice(QUESTIONS)}]
    return engine.encode(messages), random_params(rng, is_causal=engine.traits.has_exact_cache)


def run_with_arrivals(
    engine: Engine, asks: list[tuple[list[int], SamplingParams]], arrivals: list[int], rng: random.Random
) -> list[list[int]]:
    """Run all asks, each submitted at its step; retract a random running request now and then."""
    tokens: dict[str, list[int]] = {}
    step = 0
    while engine.has_work or step <= max(arrivals):
        for index, arrival in enumerate(arrivals):
            if arrival == step:
                prompt, params = asks[index]
                tokens[engine.add_request(prompt, params, request_id=f"r{index}")] = []
        running = [r for r in engine.loop.live.values() if r.status is Status.RUNNING]
        if running and rng.random() < 0.15:
            engine.loop.scheduler._retract(rng.choice(running))
        for turn in engine.step():
            for output in turn.outputs:
                assert output.error is None
                tokens[output.request_id].extend(output.token_ids)
        engine.loop.scheduler.check()
        step += 1
    return [tokens[f"r{index}"] for index in range(len(asks))]


@pytest.mark.parametrize("seed", range(4))
def test_results_do_not_depend_on_neighbours_arrivals_or_retractions(loaded: Loaded, seed: int) -> None:
    rng = random.Random(seed)
    limits = Limits(
        max_running_requests=16,
        policy=("separate", "mixed")[seed % 2],
        order=("fair", "shortest")[seed // 2],
        max_prefill_tokens=64,
    )
    config = msgspec.structs.replace(
        loaded.config, limits=limits, overlap=("off", "on", "device", "device")[seed]
    )
    engine = Engine.from_loaded(dataclasses.replace(loaded, config=config))
    asks = [ask(engine, rng) for _ in range(rng.choice([2, 5, 10, 16]))]
    arrivals = [rng.randrange(12) for _ in asks]
    together = run_with_arrivals(engine, asks, arrivals, rng)
    for (prompt, params), found in zip(asks, together, strict=True):
        (alone,) = Engine.from_loaded(loaded).generate([prompt], params)
        assert found == alone.token_ids


def test_a_prefix_hit_changes_nothing(loaded: Loaded) -> None:
    engine = Engine.from_loaded(loaded)
    prompt = engine.encode([{"role": "user", "content": QUESTIONS[0]}])
    params = SamplingParams(max_tokens=24, temperature=0.6, seed=3)
    first, second = engine.generate([prompt], params), engine.generate([prompt], params)
    assert first[0].token_ids == second[0].token_ids
    if engine.traits.has_exact_cache:
        assert second[0].usage.cached_tokens == len(prompt) // 16 * 16


def test_choices_differ_and_repeat(loaded: Loaded) -> None:
    engine = Engine.from_loaded(loaded)
    params = SamplingParams(max_tokens=24, temperature=8.0, seed=11, n=4, ignore_eos=True)
    first, second = engine.generate(QUESTIONS[1], params), engine.generate(QUESTIONS[1], params)
    assert [choice.token_ids for choice in first] == [choice.token_ids for choice in second]
    assert len({tuple(choice.token_ids) for choice in first}) > 1


def test_a_missing_seed_is_drawn_and_reported(loaded: Loaded) -> None:
    engine = Engine.from_loaded(loaded)
    params = SamplingParams(max_tokens=16, temperature=8.0, ignore_eos=True)
    (drawn,) = engine.generate(QUESTIONS[0], params)
    (other,) = engine.generate(QUESTIONS[0], params)
    (again,) = engine.generate(QUESTIONS[0], msgspec.structs.replace(params, seed=drawn.seed))
    assert again.token_ids == drawn.token_ids
    assert other.seed != drawn.seed
    assert other.token_ids != drawn.token_ids


def test_streamed_text_is_the_generated_text(loaded: Loaded) -> None:
    engine = Engine.from_loaded(loaded)
    params = SamplingParams(max_tokens=32, algorithm="fast_dllm")
    streamed: dict[int, str] = {}
    for index, delta in engine.stream([{"role": "user", "content": QUESTIONS[1]}], params):
        streamed[index] = streamed.get(index, "") + delta.text
    (whole,) = engine.generate([[{"role": "user", "content": QUESTIONS[1]}]], params)
    assert streamed[0] == whole.text


def test_logprobs_are_of_the_deciding_step(loaded: Loaded) -> None:
    engine = Engine.from_loaded(loaded)
    (choice,) = engine.generate(QUESTIONS[1], SamplingParams(max_tokens=16, logprobs=3))
    assert choice.logprobs is not None
    assert len(choice.logprobs) == len(choice.token_ids)
    for token, entry in zip(choice.token_ids, choice.logprobs, strict=True):
        assert entry.top_ids[0] == token
        assert entry.logprob == pytest.approx(entry.top_logprobs[0])
        assert list(entry.top_logprobs) == sorted(entry.top_logprobs, reverse=True)


def test_stop_strings_end_the_text(loaded: Loaded) -> None:
    engine = Engine.from_loaded(loaded)
    (whole,) = engine.generate("12+7=", SamplingParams(max_tokens=16, ignore_eos=True))
    stop = whole.text[2:4]
    (cut,) = engine.generate("12+7=", SamplingParams(max_tokens=16, ignore_eos=True, stop=(stop,)))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    # The request was aborted when its stop string was met; the next step takes it out.
    engine.step()
    assert not engine.loop.live


def test_a_canvas_view_shows_the_open_block(loaded: Loaded) -> None:
    engine = Engine.from_loaded(loaded)
    prompt = engine.encode(QUESTIONS[1])
    views = []
    for _, delta in engine.stream(prompt, SamplingParams(max_tokens=20, include_canvas=True)):
        if delta.canvas is not None:
            views.append(delta.canvas)
    assert views
    assert [view.step for view in views] == list(range(1, len(views) + 1))
    for view in views:
        assert len(view.token_ids) == len(view.confidence) == len(view.undecided)
        assert view.start >= 0


def test_an_assembler_shows_whole_characters(loaded: Loaded) -> None:
    engine = Engine.from_loaded(loaded)
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    text = "Zoë, 41, café owner in Köln ☕"
    assembler = Assembler(tokenizer)
    from sfumato.core.messages import FinishReason, Output

    ids = tokenizer.encode(text)
    shown = "".join(assembler.push(Output(request_id="a", token_ids=(token,))).text for token in ids)
    shown += assembler.push(Output(request_id="a", finish_reason=FinishReason.STOP)).text
    assert shown == text


def test_memory_and_records_do_not_grow(loaded: Loaded) -> None:
    engine = Engine.from_loaded(loaded)
    params = SamplingParams(max_tokens=2, algorithm="fast_dllm", algorithm_parameters={"threshold": 0.0})
    for index in range(40):
        engine.generate([[1 + index % 40, 2, 3]], params)
    assert not engine.loop.live
    pool = engine.loop.scheduler._pages.pool
    assert pool.num_leased == 0
