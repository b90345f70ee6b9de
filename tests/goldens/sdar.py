"""Replays block decoding of block-causal models: SDAR's generate and SGLang's LowConfidence."""

from __future__ import annotations

from collections.abc import Callable
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
from tests.goldens.replay import Asked, Checkpoint, Planned, Recording, expect_equal, make_spec
from tests.goldens.sources import ArgmaxSource, RecordedTokens


def plan_generate(case: Case) -> Planned:
    """Plan SDAR's block_diffusion_generate, greedy or with the drawn tokens injected."""
    params = case["params"]
    algorithm = SDAR(
        remasking_strategy=params["remasking_strategy"],
        confidence_threshold=params["confidence_threshold"],
        denoising_steps=params["denoising_steps"],
    )
    stops = frozenset(params["stopping_criteria_idx"] or ())
    sampling = Sampling(temperature=params["temperature"], top_k=params["top_k"], top_p=params["top_p"])

    def verify(recording: Recording) -> None:
        expect_equal("sequence", recording.final_ids, case["sequence"])

    return _plan(case, algorithm, stops, params["gen_length"], params["block_length"], sampling, verify)


def plan_sglang_low_confidence(case: Case) -> Planned:
    """Plan SGLang's LowConfidence over the blocks of one request."""
    algorithm = LowConfidence(threshold=case["params"]["algorithm_config"].get("threshold", 0.95))
    return plan_sglang(case, algorithm)


def plan_sglang(case: Case, algorithm: Algorithm) -> Planned:
    """Plan one of SGLang's algorithms over the blocks of one request."""
    params = case["params"]
    stops = frozenset(() if params["eos_id"] is None else (params["eos_id"],))

    def verify(recording: Recording) -> None:
        expect_equal("output ids", recording.output_ids, case["output_ids"])
        expect_equal("finish reason", recording.finish_reason, FinishReason(case["finish_reason"]))
        untrimmed = case["untrimmed_output_ids"]
        start = len(case["input_ids"])
        expect_equal("untrimmed ids", recording.final_ids[start : start + len(untrimmed)], untrimmed)

    return _plan(case, algorithm, stops, params["max_new_tokens"], params["block_size"], Sampling(), verify)


def _plan(
    case: Case,
    algorithm: Algorithm,
    stops: frozenset[int],
    max_tokens: int,
    block_length: int,
    sampling: Sampling,
    verify_end: Callable[[Recording], None],
) -> Planned:
    checkpoint = Checkpoint(case.checkpoint_path, block_length, mask_token_id=case["params"]["mask_id"])
    spec = make_spec(case["input_ids"], max_tokens=max_tokens, block_length=block_length, sampling=sampling)
    replay = Replay(algorithm, BlockEnd(stops), _source(case, block_length))

    def verify(recordings: list[Recording]) -> None:
        (recording,) = recordings
        kinds = _counted(case)
        counted = [entry for entry in case["trace"] if entry["kind"] in kinds]
        for step, (entry, canvas) in enumerate(zip(counted, recording.canvases, strict=False)):
            start = entry["start"]
            found = canvas[start : start + block_length].tolist()
            expect_equal(f"step {step}: block at {start}", found, entry["ids_out"])
        expect_equal("steps of the trace", len(recording.canvases), len(counted))
        forwards = sum(case["forwards"][kind] for kind in kinds)
        expect_equal("denoise forwards", recording.usage.denoise_steps, forwards)
        verify_end(recording)

    return Planned(checkpoint, [Asked(spec, replay)], verify)


def _counted(case: Case) -> tuple[str, ...]:
    """Return which forwards of a trace are denoise steps: joint threshold ends on one without changes."""
    config = case["params"].get("algorithm_config", {})
    ends_unchanged = case.kind.endswith("joint_threshold") and config.get("max_post_edit_steps", 16) > 0
    return ("denoise", "commit") if ends_unchanged else ("denoise",)


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
