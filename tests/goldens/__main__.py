"""Replay golden folders: `python -m tests.goldens FOLDER... [--kinds LIST] [--checkpoints GLOB]`.

Prints a line per case and a last line `N passed, N failed, N skipped`; exit status 1 on any failure. What
--kinds and --checkpoints exclude is neither run nor counted; an unknown kind counts as failed.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from sfumato.errors import SfumatoError
from tests.goldens import llada, logits, sdar
from tests.goldens.cases import Case, find_cases

REPLAYS: dict[str, Callable[[Case], None]] = {
    "logits_full": logits.replay_full,
    "logits_padded": logits.replay_padded,
    "logits": logits.replay_block_causal,
    "official_generate": llada.replay_official,
    "official_generate_left_padded": llada.replay_official,
    "fastdllm_generate": llada.replay_fast_dllm,
    "dinfer_generate": llada.replay_fast_dllm,
    "generate_sdar_greedy": sdar.replay_generate,
    "generate_sdar_sample": sdar.replay_generate,
    "generate_sglang_low_confidence": sdar.replay_sglang_low_confidence,
}

SUPPORTED = Path(__file__).with_name("supported.txt")


def main(arguments: list[str] | None = None) -> int:
    """Replay what the command line chooses; return the exit status."""
    options = _parser().parse_args(arguments)
    selections = list(_selections(options))
    if not selections:
        print("no folder given")
        return 2
    passed = failed = 0
    for folder, kinds, checkpoints in selections:
        cases = [case for case in find_cases(folder) if _is_chosen(case, kinds, checkpoints)]
        if not cases:
            print(f"FAIL {folder}: no case was chosen")
            failed += 1
        for case in cases:
            problem = replay(case)
            passed, failed = passed + (problem is None), failed + (problem is not None)
            print(f"PASS {case.name}" if problem is None else f"FAIL {case.name}: {problem}", flush=True)
    print(f"{passed} passed, {failed} failed, 0 skipped")
    return 1 if failed else 0


def replay(case: Case) -> str | None:
    """Replay one case; return what differs, or None."""
    if case.kind not in REPLAYS:
        return f"unknown kind {case.kind!r}"
    try:
        REPLAYS[case.kind](case)
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
            yield folder, kinds, options.checkpoints


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
