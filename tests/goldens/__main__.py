"""Replay golden folders: `python -m tests.goldens FOLDER... [--kinds LIST] [--checkpoints GLOB]`.

With --together SEED all cases of a checkpoint share one engine, submitted at random times; what runs no
engine (logits, step functions) is left out. Prints a line per case and a last line
`N passed, N failed, N skipped`; exit status 1 on any failure. What --kinds and --checkpoints exclude is
neither run nor counted; an unknown kind counts as failed. With --tensor-parallel N engine cases run on N
processes, the others as without. --deterministic ROWS replays images in forwards of so many rows, and
compares their bits with those of each case alone. With --disaggregate prompts are prefilled by a second
engine; cases of bidirectional models are refused with the reason and not counted.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from sfumato.errors import SfumatoError
from tests.goldens import (
    diffusion_gemma,
    disaggregated,
    dream,
    images,
    llada,
    llada2,
    logits,
    logits_cached,
    sdar,
    steps,
)
from tests.goldens.cases import Case, find_cases
from tests.goldens.replay import Mismatch, Mode, Planned, end_ranks, joint_checkpoint, load_for, run

# Cases that go through a model or an algorithm directly.
REPLAYS: dict[str, Callable[[Case], None]] = {
    "logits_full": logits.replay_full,
    "logits_padded": logits.replay_padded,
    "logits": logits.replay_logits,
    "logits_prefix_kv": logits_cached.replay_prefix,
    "logits_dual_kv": logits_cached.replay_dual,
    "logits_kv_append": logits_cached.replay_append,
    "official_log_likelihood": llada.replay_log_likelihood,
    "selection": steps.replay_selection,
    "sglang_step_low_confidence": steps.replay_mask_steps,
    "sglang_step_joint_threshold": steps.replay_mask_steps,
    "sglang_step_joint_threshold_indel": steps.replay_mask_steps,
    "sglang_step_gemma4_renoise": steps.replay_gemma_renoise,
    "diffusers_block_refinement_step": steps.replay_mask_steps,
    "diffusers_block_refinement_uniform_step": steps.replay_renoising_steps,
    "diffusers_entropy_bound_step": steps.replay_renoising_steps,
    "diffusers_discrete_ddim_step": steps.replay_renoising_steps,
    "dinfer_ThresholdParallelDecoder": steps.replay_mask_steps,
    "dinfer_HierarchyDecoder": steps.replay_mask_steps,
    "dinfer_CreditThresholdParallelDecoder": steps.replay_mask_steps,
}


def plan_multi_block(case: Case) -> Planned:
    """Plan d3LLM's multi-block decoding; both families call it so."""
    plan = dream.plan_multi_block if "nfe" in case.content and "input_ids" in case.content else None
    return (plan or llada.plan_d3llm_multi_block)(case)


# Cases that are requests to an engine.
PLANS: dict[str, Callable[[Case], Planned]] = {
    "official_generate": llada.plan_official,
    "official_generate_left_padded": llada.plan_official,
    "fastdllm_generate": llada.plan_fast_dllm,
    "fastdllm_prefix_cache": llada.plan_fast_dllm,
    "fastdllm_dual_cache": llada.plan_fast_dllm,
    "dinfer_generate": llada.plan_fast_dllm,
    "dinfer_prefix_cache": llada.plan_fast_dllm,
    "dinfer_dual_cache": llada.plan_fast_dllm,
    "d3llm_generate": llada.plan_d3llm_generate,
    "d3llm_multi_block": plan_multi_block,
    "d3llm_multi_block_kv_cache": llada.plan_d3llm_multi_block,
    "generate_sdar_greedy": sdar.plan_generate,
    "generate_sdar_sample": sdar.plan_generate,
    "generate_sglang_low_confidence": sdar.plan_sglang_low_confidence,
    "generate_sglang_joint_threshold": llada2.plan_sglang_joint_threshold,
    "generate_dinfer_threshold": llada2.plan_dinfer_threshold,
    "generate_diffusers_block_refinement": llada2.plan_block_refinement,
    "diffusion_generate": dream.plan_diffusion_generate,
    "diffusion_generate_padded": dream.plan_diffusion_generate,
    "fastdllm_block": dream.plan_fast_dllm,
    "fastdllm_block_entropy": dream.plan_fast_dllm,
    "d3llm_single_block": dream.plan_single_block,
    "d3llm_multi_block_kv": dream.plan_multi_block,
    "generate_transformers": diffusion_gemma.plan_transformers,
    "generate_diffusers": diffusion_gemma.plan_diffusers,
}

# Begins what is said of a case that a mode cannot run, for a reason that is its own.
REFUSED = "refused: "

SUPPORTED = Path(__file__).with_name("supported.txt")


def main(arguments: list[str] | None = None) -> int:
    """Replay what the command line chooses; return the exit status."""
    options = _parser().parse_args(arguments)
    selections = list(_selections(options))
    if not selections:
        print("no folder given")
        return 2
    with disaggregated.starting(options.disaggregate) as (start, summary):
        mode = Mode(
            overlap=options.overlap,
            graphs="on" if options.graphs else "auto",
            device=options.device,
            num_replicas=options.data_parallel,
            tensor_parallel=options.tensor_parallel,
            start=start,
        )
        try:
            return _replay_all(selections, options, mode, summary)
        finally:
            end_ranks()


def _replay_all(
    selections: list[tuple[Path, set[str], str]],
    options: argparse.Namespace,
    mode: Mode,
    summary: Callable[[], list[str]],
) -> int:
    passed = failed = 0
    for folder, kinds, checkpoints in selections:
        if images.is_image_folder(folder):
            if refusal := images.refusal(options):
                print(f"REFUSED {folder}: {refusal}", flush=True)
                continue
            for name, problem in images.replay_folder(folder, checkpoints, options):
                passed, failed = passed + (problem is None), failed + (problem is not None)
                print(f"PASS {name}" if problem is None else f"FAIL {name}: {problem}", flush=True)
            continue
        cases = [case for case in find_cases(folder) if _is_chosen(case, kinds, checkpoints)]
        if not cases:
            print(f"FAIL {folder}: no case was chosen")
            failed += 1
        if options.together is not None or options.disaggregate is not None:
            cases = [case for case in cases if case.kind not in REPLAYS]
        problems = (
            replay_each(cases, mode)
            if options.together is None
            else replay_together(cases, options.together, mode)
        )
        for case, problem in problems:
            if problem is not None and problem.startswith(REFUSED):
                print(f"REFUSED {case.name}: {problem.removeprefix(REFUSED)}", flush=True)
                continue
            passed, failed = passed + (problem is None), failed + (problem is not None)
            print(f"PASS {case.name}" if problem is None else f"FAIL {case.name}: {problem}", flush=True)
    for line in summary():
        print(line)
    print(f"{passed} passed, {failed} failed, 0 skipped")
    return 1 if failed else 0


def replay_each(cases: list[Case], mode: Mode) -> Iterator[tuple[Case, str | None]]:
    """Replay each case alone; yield what differs, or None."""
    for case in cases:
        yield case, _problem(lambda case=case: _replay(case, mode))  # type: ignore[misc]


def _replay(case: Case, mode: Mode) -> None:
    if case.kind in REPLAYS:
        REPLAYS[case.kind](case)
    elif case.kind in PLANS:
        planned = PLANS[case.kind](case)
        planned.verify(
            run(load_for(planned.checkpoint, mode.tensor_parallel, mode.device), planned.asked, mode=mode)
        )
    else:
        raise Mismatch(f"unknown kind {case.kind!r}")


def replay_together(cases: list[Case], seed: int, mode: Mode) -> Iterator[tuple[Case, str | None]]:
    """Submit all cases of a checkpoint to one engine at random times; yield what differs, or None."""
    by_checkpoint: dict[Path, list[tuple[Case, Planned]]] = {}
    for case in cases:
        if case.kind not in PLANS:
            yield case, f"unknown kind {case.kind!r}"
            continue
        planned = PLANS[case.kind](case)
        by_checkpoint.setdefault(planned.checkpoint.path, []).append((case, planned))
    for members in by_checkpoint.values():
        loaded = load_for(
            joint_checkpoint([planned.checkpoint for _, planned in members]),
            mode.tensor_parallel,
            mode.device,
        )
        asked = [asked for _, planned in members for asked in planned.asked]
        try:
            recordings = iter(run(loaded, asked, seed, mode))
        except disaggregated.Refused as error:
            yield from ((case, f"{REFUSED}{error}") for case, _ in members)
            continue
        for case, planned in members:
            own = [next(recordings) for _ in planned.asked]
            yield case, _problem(lambda planned=planned, own=own: planned.verify(own))  # type: ignore[misc]


def _problem(act: Callable[[], None]) -> str | None:
    """Run something; return what went wrong, or None."""
    try:
        act()
    except disaggregated.Refused as error:
        return f"{REFUSED}{error}"
    except (AssertionError, SfumatoError) as error:
        return f"{type(error).__name__}: {error}"
    except Exception:  # one broken case must not hide the results of the others
        return f"raised\n{traceback.format_exc()}"
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.goldens", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="golden folders, or folders of them")
    parser.add_argument("--kinds", action="append", default=[], help="only these kinds, separated by commas")
    parser.add_argument(
        "--checkpoints", default="*", help="only cases whose checkpoint matches one of these patterns"
    )
    parser.add_argument(
        "--together", type=int, metavar="SEED", help="all cases of a checkpoint in one engine at random times"
    )
    parser.add_argument(
        "--overlap",
        nargs="?",
        choices=("on", "device"),
        const="on",
        default="off",
        help="plan a step while the one before runs; device: begin it before that one's outcome is read",
    )
    parser.add_argument(
        "--graphs",
        action="store_true",
        help="fill forwards over pages up to a few shapes; on a CPU these run again in place of a graph",
    )
    parser.add_argument("--device", default="cpu", help="of engine cases")
    parser.add_argument(
        "--data-parallel", type=int, default=1, metavar="N", help="spread the requests over N engines"
    )
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="run engine cases on a model that N processes hold together",
    )
    parser.add_argument(
        "--disaggregate",
        nargs="?",
        const="in-process",
        choices=disaggregated.TRANSPORTS,
        help="prefill in a second engine: in this process, or in one of its own over sockets or NIXL",
    )
    parser.add_argument(
        "--deterministic", type=int, metavar="ROWS", help="images: forwards of exactly so many rows"
    )
    parser.add_argument(
        "--supported", action="store_true", help="replay what supported.txt lists, below each given folder"
    )
    return parser


def _selections(options: argparse.Namespace) -> Iterator[tuple[Path, set[str], str]]:
    kinds = {kind for part in options.kinds for kind in part.replace(",", " ").split()}
    for folder in options.folders:
        if options.supported:
            for family, listed, checkpoints in read_supported():
                if (folder / family).is_dir():
                    yield folder / family, listed, checkpoints
        else:
            below = [cases.parent for cases in sorted(folder.glob("*/cases"))]
            yield from ((one, kinds, options.checkpoints) for one in below or [folder])


def read_supported() -> Iterator[tuple[str, set[str], str]]:
    """Yield family, kinds and checkpoint pattern of each line of supported.txt."""
    for line in SUPPORTED.read_text(encoding="utf-8").splitlines():
        fields = line.split("#")[0].split()
        if fields:
            family, kinds, checkpoints = fields
            yield family, set(kinds.split(",")), checkpoints


def _is_chosen(case: Case, kinds: set[str], checkpoints: str) -> bool:
    return (not kinds or case.kind in kinds) and any(
        fnmatch(case.checkpoint, pattern) for pattern in checkpoints.split(",")
    )


if __name__ == "__main__":
    sys.exit(main())
