"""Plans the generate kinds of LLaDA2: SGLang's joint threshold, dInfer, diffusers' block refinement."""

from __future__ import annotations

from sfumato.text.decoding.block_refinement import BlockRefinement
from sfumato.text.decoding.dinfer import DInfer
from sfumato.text.decoding.joint_threshold import JointThreshold
from sfumato.text.door import Replay
from sfumato.text.ends import BlockFillAfterEos, CanvasEnd, EndRule, WrittenEos
from tests.goldens.cases import Case
from tests.goldens.replay import (
    Asked,
    Checkpoint,
    Planned,
    Recording,
    expect_equal,
    make_spec,
)
from tests.goldens.sdar import plan_sglang
from tests.goldens.sources import ArgmaxSource


def plan_sglang_joint_threshold(case: Case) -> Planned:
    """Plan SGLang's JointThreshold over the blocks of one request."""
    return plan_sglang(case, JointThreshold(**case["params"]["algorithm_config"]))


def plan_dinfer_threshold(case: Case) -> Planned:
    """Plan dInfer's BlockDiffusionLLM; its forwards without an undecided position are not made."""
    params = case["params"]
    block = params["block_length"]
    checkpoint = Checkpoint(case.checkpoint_path, block, mask_token_id=params["mask_id"])
    end_rule: EndRule = CanvasEnd()
    if params["early_stop"] and params["eos_id"] is not None:
        end_rule = BlockFillAfterEos(params["eos_id"])
    spec = make_spec(case["input_ids"], max_tokens=params["gen_length"], block_length=block)
    replay = Replay(DInfer(threshold=params["threshold"]), end_rule, ArgmaxSource())

    def verify(recordings: list[Recording]) -> None:
        (recording,) = recordings
        counted = [entry for entry in case["trace"] if entry["kind"] == "denoise"]
        for step, (entry, canvas) in enumerate(zip(counted, recording.canvases, strict=False)):
            found = canvas[entry["start"] : entry["start"] + block].tolist()
            expect_equal(f"step {step}: block at {entry['start']}", found, entry["ids_out"])
        expect_equal("denoise forwards", recording.usage.denoise_steps, case["forwards"]["denoise"])
        expect_equal("canvas", recording.final_ids, case["canvas"])

    return Planned(checkpoint, [Asked(spec, replay)], verify)


def plan_block_refinement(case: Case) -> Planned:
    """Plan diffusers' LLaDA2 pipeline, one request per row.

    Where the last block reaches beyond what was asked for, the reference hides its tail from all but itself;
    that block is not compared (see expected_differences.md).
    """
    params = case["params"]
    block, length = params["block_length"], params["gen_length"]
    checkpoint = Checkpoint(case.checkpoint_path, block, mask_token_id=params["mask_token_id"])
    algorithm = BlockRefinement(
        threshold=params["threshold"],
        editing_threshold=params["editing_threshold"] or None,
        num_inference_steps=min(params["num_inference_steps"], length // params["minimal_topk"]),
        max_post_steps=params["max_post_steps"],
        is_reference=True,
    )
    end_rule: EndRule = CanvasEnd()
    if params["eos_early_stop"] and params["eos_token_id"] is not None:
        end_rule = WrittenEos(params["eos_token_id"])
    prompts = case["input_ids"] if isinstance(case["input_ids"][0], list) else [case["input_ids"]]
    asked = [
        Asked(
            make_spec(prompt, max_tokens=length, block_length=block),
            Replay(algorithm, end_rule, ArgmaxSource()),
        )
        for prompt in prompts
    ]
    end = len(prompts[0]) + length
    last = end if end % block == 0 else end // block * block

    def verify(recordings: list[Recording]) -> None:
        for row, recording in enumerate(recordings):
            found = [canvas[:last].tolist() for canvas in recording.canvases]
            expected = _canvases(case, row, prompts[row], last)
            if len(recordings) > 1:
                # Rows of a batch wait for one another; steps that change nothing are not the row's own.
                found, expected = _changes(found), _changes(expected)
            for step, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
                expect_equal(f"row {row}, step {step}: canvas", ours, theirs)
            if len(recordings) == 1 and last == end:
                expect_equal("forwards", recording.usage.denoise_steps, case["forwards"]["total"])
            sequence = case["sequences"][row][: last - len(prompts[row])]
            generated = recording.final_ids[len(prompts[row]) : last]
            expect_equal(f"row {row}: sequence", generated, sequence)

    return Planned(checkpoint, asked, verify)


def _canvases(case: Case, row: int, prompt: list[int], last: int) -> list[list[int]]:
    """Return the canvas up to `last` after each forward of the reference on blocks before it."""
    mask, block = case["params"]["mask_token_id"], case["params"]["block_length"]
    canvas = [*prompt, *[mask] * (last - len(prompt))]
    canvases = []
    for entry in case["trace"]:
        start = entry["block_start"]
        if start < last:
            canvas = [*canvas[:start], *entry["ids_out"][row], *canvas[start + block :]]
            canvases.append(canvas)
    return canvases


def _changes(canvases: list[list[int]]) -> list[list[int]]:
    """Leave out canvases that equal the one before."""
    return [canvas for index, canvas in enumerate(canvases) if not index or canvas != canvases[index - 1]]
