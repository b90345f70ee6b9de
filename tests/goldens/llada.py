"""Replays the generate kinds of the LLaDA family without a cache: official, Fast-dLLM, dInfer."""

from __future__ import annotations

from typing import Any

from sfumato.core.spec import Sampling
from sfumato.text.decoding.fast_dllm import FastDLLM
from sfumato.text.decoding.llada import LLaDA
from sfumato.text.decoding.protocol import Algorithm
from sfumato.text.door import Replay
from sfumato.text.ends import CanvasEnd, EndRule, FillAfterEos
from sfumato.text.random_source import RandomSource
from tests.goldens.cases import Case
from tests.goldens.replay import Asked, expect_equal, load_checkpoint, make_spec, run
from tests.goldens.sources import ArgmaxSource, RecordedOrder, TorchSource

# The official code names both ids as numbers; the cases record what they were replaced by.
_OFFICIAL_EOT = "126348"


def replay_official(case: Case) -> None:
    """Replay ML-GSAI/LLaDA's generate, one request per row."""
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
    _replay(case, algorithm, CanvasEnd())


def replay_fast_dllm(case: Case) -> None:
    """Replay Fast-dLLM's generate and dInfer's variant of it."""
    params = case["params"]
    algorithm = FastDLLM(
        threshold=params.get("threshold"), factor=params.get("factor"), steps=params["steps"]
    )
    end_rule: EndRule = FillAfterEos(params["eos_id"]) if params.get("early_stop") else CanvasEnd()
    _replay(case, algorithm, end_rule)


def _replay(case: Case, algorithm: Algorithm, end_rule: EndRule) -> None:
    params = case["params"]
    eot = case.get("constants_replaced", {}).get(_OFFICIAL_EOT)
    loaded = load_checkpoint(case.checkpoint_path, mask_token_id=params["mask_id"], eot_token_id=eot)
    paddings = _paddings(case)
    sampling = Sampling(temperature=params.get("temperature", 0.0))
    asked = []
    for row, (prompt, padding) in enumerate(zip(case["prompt_ids"], paddings, strict=True)):
        spec = make_spec(
            prompt[padding:],
            max_tokens=params["gen_length"],
            block_length=params["block_length"],
            sampling=sampling,
        )
        source = _source(case, params, row, padding, loaded.traits.vocab_size)
        asked.append(Asked(spec, Replay(algorithm, end_rule, source)))
    for row, (recording, padding) in enumerate(zip(run(loaded, asked), paddings, strict=True)):
        expect_equal(f"row {row}: forwards", recording.usage.denoise_steps, case["num_forwards"])
        for step, entry in enumerate(case["trace"]):
            found = recording.canvases[step].tolist()
            expect_equal(f"row {row}, step {step}: canvas", found, entry["canvas_after"][row][padding:])
        expect_equal(f"row {row}: final ids", recording.final_ids, case["final_ids"][row][padding:])


def _paddings(case: Case) -> list[int]:
    masks = case.get("attention_mask") or [[1] * len(prompt) for prompt in case["prompt_ids"]]
    return [mask.index(1) for mask in masks]


def _source(case: Case, params: dict[str, Any], row: int, padding: int, vocab_size: int) -> RandomSource:
    steps_per_block = params["steps"] // (params["gen_length"] // params["block_length"])
    is_random = params.get("remasking") == "random"
    is_sampled = params.get("temperature", 0.0) > 0
    if is_random and not is_sampled:
        return RecordedOrder(case.tensors["rands"][:, row, padding:], steps_per_block)
    if not is_sampled:
        return ArgmaxSource()
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
