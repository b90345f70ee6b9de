"""Goldens through a prefill and a denoise engine: one case per kind here, all of them in the slow set."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.goldens.__main__ import PLANS, main
from tests.goldens.cases import Case, find_cases
from tests.goldens.disaggregated import starting
from tests.goldens.replay import Mode, load_for, run

DATA = Path(__file__).resolve().parent.parent / "data" / "goldens"
BLOCK_CAUSAL = ("sdar", "llada2", "diffusion_gemma")
BIDIRECTIONAL = ("llada", "dream")


def longest_of_each_kind() -> Iterator[Case]:
    """Yield one case per kind that is a request to an engine: the one with the longest prompt."""
    found: dict[tuple[str, str], tuple[int, Case]] = {}
    for family in BLOCK_CAUSAL:
        for case in find_cases(DATA / family):
            if case.kind in PLANS:
                length = max(len(asked.spec.prompt_ids) for asked in PLANS[case.kind](case).asked)
                found[family, case.kind] = max(
                    found.get((family, case.kind), (-1, case)), (length, case), key=_first
                )
    yield from (case for _, case in found.values())


def _first(pair: tuple[int, Case]) -> int:
    return pair[0]


@pytest.mark.parametrize("case", list(longest_of_each_kind()), ids=lambda case: case.name)
def test_a_case_of_each_kind(case: Case) -> None:
    planned = PLANS[case.kind](case)
    with starting("in-process") as (start, summary):
        planned.verify(run(load_for(planned.checkpoint), planned.asked, mode=Mode(start=start)))
        (line,) = summary()
    # The longest prompts have whole blocks, and all of these have travelled.
    assert re.fullmatch(r"[1-9]\d* hand-overs of [1-9]\d* tokens", line)


def test_a_bidirectional_case_is_refused_and_not_counted(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(DATA / "llada"), "--kinds", "official_generate_left_padded", "--disaggregate"]
    assert main(arguments) == 0
    *lines, _, last = capsys.readouterr().out.strip().splitlines()
    assert lines
    assert all(line.startswith("REFUSED") and "both directions" in line for line in lines)
    assert last == "0 passed, 0 failed, 0 skipped"


NIXL = pytest.param(
    "nixl",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("nixl") is None, reason="sfumato[nixl] is not installed"
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["in-process", "sockets", NIXL])
@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_all_cases(family: str, transport: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(DATA / family), "--disaggregate", transport]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert not any(line.startswith("REFUSED") for line in lines)
    assert re.fullmatch(r"[1-9]\d* passed, 0 failed, 0 skipped", lines[-1])


@pytest.mark.slow
@pytest.mark.parametrize("family", BIDIRECTIONAL)
def test_every_bidirectional_case_is_refused(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(DATA / family), "--disaggregate"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == "0 passed, 0 failed, 0 skipped"
