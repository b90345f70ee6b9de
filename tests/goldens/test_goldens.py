"""The replay command itself: what it chooses, counts and refuses; the cases are replayed by `make test`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.goldens.__main__ import main, read_supported

DATA = Path(__file__).resolve().parent.parent / "data" / "goldens"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A golden folder elsewhere with one case."""
    target = tmp_path / "elsewhere"
    (target / "cases").mkdir(parents=True)
    shutil.copytree(DATA / "llada" / "checkpoints" / "llada-tiny-mha", target / "checkpoints" / "never-seen")
    case = json.loads((DATA / "llada" / "cases" / "fastdllm_threshold.json").read_text())
    case["checkpoint"] = "never-seen"
    (target / "cases" / "one.json").write_text(json.dumps(case))
    return target


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the last line that was printed."""
    return capsys.readouterr().out.strip().splitlines()[-1]


def test_a_folder_elsewhere_with_an_unknown_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder)]) == 0
    assert last_line(capsys) == "1 passed, 0 failed, 0 skipped"


@pytest.mark.parametrize("field", ["final_ids", "num_forwards", "canvas"])
def test_a_case_that_differs_fails(folder: Path, field: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "cases" / "one.json"
    case = json.loads(path.read_text())
    if field == "final_ids":
        case["final_ids"][0][-1] += 1
    elif field == "num_forwards":
        case["num_forwards"] += 1
    else:
        case["trace"][3]["canvas_after"][0][20] += 1
    path.write_text(json.dumps(case))
    assert main([str(folder)]) == 1
    assert last_line(capsys) == "0 passed, 1 failed, 0 skipped"


def test_an_unknown_kind_fails_unless_it_is_excluded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "cases" / "two.json").write_text(json.dumps({"kind": "telepathy", "checkpoint": "never-seen"}))
    assert main([str(folder)]) == 1
    assert last_line(capsys) == "1 passed, 1 failed, 0 skipped"
    assert main([str(folder), "--kinds", "fastdllm_generate"]) == 0
    assert main([str(folder), "--checkpoints", "other*"]) == 1


def test_together_leaves_out_what_needs_no_engine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--together", "3"]) == 0
    assert last_line(capsys) == "1 passed, 0 failed, 0 skipped"
    assert main([str(DATA / "algorithms"), "--together", "3"]) == 0
    assert last_line(capsys) == "0 passed, 0 failed, 0 skipped"
    assert main([str(DATA / "nothing"), "--together", "3"]) == 1


def test_a_broken_checkpoint_fails_its_case_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(folder / "cases" / "one.json", folder / "cases" / "two.json")
    case = json.loads((folder / "cases" / "one.json").read_text())
    case["checkpoint"] = "missing"
    (folder / "cases" / "one.json").write_text(json.dumps(case))
    assert main([str(folder)]) == 1
    assert last_line(capsys) == "1 passed, 1 failed, 0 skipped"


def test_the_supported_list_names_folders_that_are_here() -> None:
    for family, kinds, _ in read_supported():
        assert (DATA / family / "cases").is_dir()
        assert kinds
