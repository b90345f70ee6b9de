"""Plans the generate kinds of the LLaDA family: official, Fast-dLLM, dInfer, d3LLM."""

from __future__ import annotations

from typing import Any

from sfumato.core.messages import Output
from sfumato.core.spec import Sampling
from sfumato.engine.engine import Engine
from sfumato.engine.frontend import make_score_spec
from sfumato.text.decoding.d3llm import D3LLM
from sfumato.text.decoding.entropy_threshold import EntropyThreshold
from sfumato.text.decoding.fast_dllm import FastDLLM
from sfumato.text.decoding.llada import LLaDA
from sfumato.text.decoding.protocol import Algorithm
from sfumato.text.door import Replay, ScoreReplay
from sfumato.text.ends import CanvasEnd, EndRule, FillAfterEos
from sfumato.text.random_source import RandomSource
from tests.goldens.cases import Case
from tests.goldens.replay import (
    Asked,
    Checkpoint,
    Mismatch,
    Planned,
    Recording,
    expect_canvases,
    expect_equal,
    load_for,
    make_spec,
)
from tests.goldens.sources import ArgmaxSource, RecordedOrder, TorchSource

# The official code names both ids as numbers; the cases record what they were replaced by.
_OFFICIAL_EOT = "126348"
# The README's.
_LIKELIHOOD_TOLERANCE = 1e-2


def plan_official(case: Case) -> Planned:
    """Plan ML-GSAI/LLaDA's generate, one request per row."""
    params = case["params"]
    algorithm = LLaDA(
        steps=params["steps"],
        remasking=params.get("remasking", "low_confidence"),
        cfg_scale=params.get("cfg_scale", 0.0),
        logits_eos_inf=params.get("logits_eos_inf", False),
        confidence_eos_eot_inf=params.get("confidence_eos_eot_inf", False),
        is_reference=True,
        spares_eos=params.get("temperature", 0.0) > 0,
    )
    return _plan(case, algorithm, CanvasEnd())


def plan_fast_dllm(case: Case) -> Planned:
    """Plan Fast-dLLM's generate and dInfer's variant of it, without a cache or with either."""
    params = case["params"]
    family, _, cache = case.kind.partition("_")
    cache = cache.removesuffix("_cache").replace("generate", "none")
    algorithm = FastDLLM(
        threshold=params.get("threshold"),
        factor=params.get("factor"),
        cache=cache,
        steps=params["steps"],
        looks_late=family == "fastdllm" and cache != "none",
    )
    end_rule: EndRule = CanvasEnd()
    if params.get("early_stop"):
        end_rule = FillAfterEos(params["eos_id"], spares_first=cache != "none")
    return _plan(case, algorithm, end_rule)


def plan_d3llm_generate(case: Case) -> Planned:
    """Plan d3LLM's block by block form."""
    algorithm = EntropyThreshold(threshold=case["params"]["threshold"], is_inclusive=True)
    return _plan(case, algorithm, CanvasEnd())


def plan_d3llm_multi_block(case: Case) -> Planned:
    """Plan d3LLM's multi-block loops for LLaDA, without and with a cache."""
    params = case["params"]
    has_cache = case.kind.endswith("kv_cache")
    algorithm = D3LLM(
        threshold=params["threshold"],
        block_add_threshold=params["block_add_threshold"],
        decoded_token_threshold=params["decoded_token_threshold"],
        cache_delay_iter=params["cache_delay_iter"] if has_cache else None,
        refresh_interval=params["refresh_interval"] if has_cache else 10_000,
        early_stop=params.get("early_stop", False),
        variant="llada",
        is_reference=True,
        reference_eos=params.get("eos_token_id"),
    )
    return _plan(case, algorithm, CanvasEnd())


def replay_log_likelihood(case: Case) -> None:
    """Replay ML-GSAI/LLaDA's get_log_likelihood on its recorded maskings, through the engine."""
    params = case["params"]
    loaded = load_for(Checkpoint(case.checkpoint_path, mask_token_id=params["mask_id"]))
    (prompt,) = case["prompt_ids"]
    target = case["answer_ids"][0] if isinstance(case["answer_ids"][0], list) else case["answer_ids"]
    sequences = case.tensors["perturbed_seq"].flatten(0, 1)[:, len(prompt) :]
    spec = make_score_spec(
        prompt,
        target,
        loaded.traits,
        num_samples=params["mc_num"],
        batch_size=params["batch_size"],
        cfg_scale=params.get("cfg_scale", 0.0),
    )
    engine = Engine.from_loaded(loaded)
    masks = (sequences == params["mask_id"]).numpy()
    engine.add_request((), spec=spec, replay=ScoreReplay(masks))
    outputs: list[Output] = []
    while engine.has_work:
        outputs += [output for turn in engine.step() for output in turn.outputs]
    score = outputs[-1].score
    if score is None:
        raise Mismatch(f"no score: {outputs[-1].error}")
    if not abs(score.log_likelihood - case["log_likelihood"]) <= _LIKELIHOOD_TOLERANCE:
        raise Mismatch(f"log likelihood {score.log_likelihood}, expected {case['log_likelihood']}")


def _plan(case: Case, algorithm: Algorithm, end_rule: EndRule) -> Planned:
    params = case["params"]
    eot = case.get("constants_replaced", {}).get(_OFFICIAL_EOT)
    checkpoint = Checkpoint(case.checkpoint_path, mask_token_id=params["mask_id"], eot_token_id=eot)
    paddings = _paddings(case)
    sampling = Sampling(temperature=params.get("temperature", 0.0))
    max_tokens = params.get("gen_length") or params["max_new_tokens"]
    asked = []
    for row, (prompt, padding) in enumerate(zip(case["prompt_ids"], paddings, strict=True)):
        spec = make_spec(
            prompt[padding:],
            max_tokens=max_tokens,
            block_length=params.get("block_length") or params["block_size"],
            sampling=sampling,
            infill=(None,) * max_tokens,
        )
        source = _source(case, params, row, padding, load_for(checkpoint).traits.vocab_size)
        asked.append(Asked(spec, Replay(algorithm, end_rule, source)))

    def verify(recordings: list[Recording]) -> None:
        for row, (recording, padding) in enumerate(zip(recordings, paddings, strict=True)):
            canvases = [entry["canvas_after"][row][padding:] for entry in case["trace"]]
            expect_canvases(f"row {row}, ", recording, canvases)
            expect_equal(f"row {row}: forwards", recording.usage.denoise_steps, case["num_forwards"])
            expect_equal(f"row {row}: final ids", recording.final_ids, case["final_ids"][row][padding:])

    return Planned(checkpoint, asked, verify)


def _paddings(case: Case) -> list[int]:
    masks = case.get("attention_mask") or [[1] * len(prompt) for prompt in case["prompt_ids"]]
    return [mask.index(1) for mask in masks]


def _source(case: Case, params: dict[str, Any], row: int, padding: int, vocab_size: int) -> RandomSource:
    is_random = params.get("remasking") == "random"
    is_sampled = params.get("temperature", 0.0) > 0
    if not is_random and not is_sampled:
        return ArgmaxSource()
    steps_per_block = params["steps"] // (params["gen_length"] // params["block_length"])
    if not is_sampled:
        return RecordedOrder(case.tensors["rands"][:, row, padding:], steps_per_block)
    prompts = case["prompt_ids"]
    return TorchSource(
        seed=case["torch_seed"],
        shape=(len(prompts), len(prompts[0]) + params["gen_length"], vocab_size),
        row=row,
        padding=padding,
        steps_per_block=steps_per_block,
        has_tokens=True,
        has_order=is_random,
    )
