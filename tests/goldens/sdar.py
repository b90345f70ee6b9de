"""Replays block decoding of block-causal models: SDAR's generate and SGLang's LowConfidence."""

from __future__ import annotations

from typing import Any

import numpy as np

from sfumato.core.messages import FinishReason
from sfumato.core.spec import Sampling
from sfumato.text.decoding.low_confidence import LowConfidence
from sfumato.text.decoding.protocol import Algorithm
from sfumato.text.decoding.sdar import SDAR
from sfumato.text.door import Replay
from sfumato.text.ends import BlockEnd
from sfumato.text.random_source import RandomSource
from tests.goldens.cases import Case
from tests.goldens.replay import Asked, Mismatch, Recording, expect_equal, load_checkpoint, make_spec, run
from tests.goldens.sources import ArgmaxSource, RecordedTokens


def replay_generate(case: Case) -> None:
    """Replay SDAR's block_diffusion_generate, greedy or with the drawn tokens injected."""
    params = case["params"]
    algorithm = SDAR(
        remasking_strategy=params["remasking_strategy"],
        confidence_threshold=params["confidence_threshold"],
        denoising_steps=params["denoising_steps"],
    )
    stops = frozenset(params["stopping_criteria_idx"] or ())
    sampling = Sampling(temperature=params["temperature"], top_k=params["top_k"], top_p=params["top_p"])
    recording = _replay(case, algorithm, stops, params["gen_length"], params["block_length"], sampling)
    expect_equal("sequence", recording.final_ids, case["sequence"])


def replay_sglang_low_confidence(case: Case) -> None:
    """Replay SGLang's LowConfidence over the blocks of one request."""
    params = case["params"]
    algorithm = LowConfidence(threshold=params["algorithm_config"].get("threshold", 0.95))
    stops = frozenset(() if params["eos_id"] is None else (params["eos_id"],))
    recording = _replay(case, algorithm, stops, params["max_new_tokens"], params["block_size"], Sampling())
    expect_equal("output ids", recording.output_ids, case["output_ids"])
    expect_equal("finish reason", recording.finish_reason, FinishReason(case["finish_reason"]))
    untrimmed = case["untrimmed_output_ids"]
    start = len(case["input_ids"])
    expect_equal("untrimmed ids", recording.final_ids[start : start + len(untrimmed)], untrimmed)


def _replay(
    case: Case,
    algorithm: Algorithm,
    stops: frozenset[int],
    max_tokens: int,
    block_length: int,
    sampling: Sampling,
) -> Recording:
    mask_id = case["params"]["mask_id"]
    loaded = load_checkpoint(case.checkpoint_path, block_length=block_length, mask_token_id=mask_id)
    spec = make_spec(case["input_ids"], max_tokens=max_tokens, block_length=block_length, sampling=sampling)
    source = _source(case, block_length)
    (recording,) = run(loaded, [Asked(spec, Replay(algorithm, BlockEnd(stops), source))])
    counted = [entry for entry in case["trace"] if entry["kind"] == "denoise"]
    expect_equal("denoise forwards", recording.usage.denoise_steps, case["forwards"]["denoise"])
    if len(counted) != len(recording.canvases):
        raise Mismatch(f"{len(recording.canvases)} denoise steps, the trace has {len(counted)}")
    for step, (entry, canvas) in enumerate(zip(counted, recording.canvases, strict=True)):
        start = entry["start"]
        found = canvas[start : start + block_length].tolist()
        expect_equal(f"step {step}: block at {start}", found, entry["ids_out"])
    return recording


def _source(case: Case, block_length: int) -> RandomSource:
    if case.kind != "generate_sdar_sample":
        return ArgmaxSource()
    drawn: dict[tuple[int, int], Any] = {}
    steps: dict[int, int] = {}
    for entry in case["trace"]:
        if entry["kind"] == "denoise":
            block = entry["start"] // block_length
            drawn[block, steps.get(block, 0)] = np.asarray(entry["x0"], dtype=np.int64)
            steps[block] = steps.get(block, 0) + 1
    return RecordedTokens(drawn, block_length)
