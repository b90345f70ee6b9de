"""Draws the imports and fails on an arrow that runs back; counts event loops."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "sfumato"

# deploy -> serve -> evaluation -> engine -> {text, image, parallel} -> {models, cache} -> core: imports go to
# lower floors only.
FLOORS = {
    "deploy": 6,
    "serve": 5,
    "evaluation": 4,
    "engine": 3,
    "text": 2,
    "image": 2,
    "parallel": 2,
    "models": 1,
    "cache": 1,
    "core": 0,
}

# Files that stand beside the rooms: the configuration names limits and checkpoints, errors name nothing.
TOP_LEVEL = {"config", "errors", "__init__"}

# Rooms that never touch a tensor, and single files that do not either.
TENSOR_FREE = (
    "core/",
    "cache/",
    "engine/scheduler.py",
    "engine/limits.py",
    "engine/loop.py",
    "engine/peers.py",
    "engine/fetching.py",
    "engine/filling.py",
    "engine/frontend.py",
)


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Yield each source file's path below the package, and its syntax tree."""
    for path in sorted(SOURCE.rglob("*.py")):
        yield str(path.relative_to(SOURCE)), ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield the dotted names that a file imports anywhere, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, "relative imports hide arrows"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(dotted: str) -> str | None:
    """Return the room of a dotted name of ours, None for foreign and top-level modules."""
    parts = dotted.split(".")
    if parts[0] != "sfumato" or len(parts) < 2 or parts[1] in TOP_LEVEL:
        return None
    return parts[1] if parts[1] in FLOORS else None


def test_every_file_has_a_room() -> None:
    rooms = {path.split("/")[0] for path, _ in modules() if "/" in path}
    assert rooms <= FLOORS.keys()


def test_no_import_runs_back() -> None:
    wrong = []
    for path, tree in modules():
        room = path.split("/")[0]
        if room not in FLOORS:
            continue
        for name in imports(tree):
            target = room_of(name)
            if target is not None and target != room and FLOORS[target] >= FLOORS[room]:
                wrong.append(f"{path} imports {name}")
    assert not wrong


def test_private_names_stay_in_their_file() -> None:
    wrong = [
        f"{path} imports {name}"
        for path, tree in modules()
        for name in imports(tree)
        if name.startswith("sfumato.") and name.rsplit(".", 1)[-1].startswith("_") and not name.endswith("__")
    ]
    assert not wrong


def test_the_scheduler_and_core_touch_no_tensor() -> None:
    wrong = [
        f"{path} imports {name}"
        for path, tree in modules()
        if path.startswith(TENSOR_FREE)
        for name in imports(tree)
        if name.split(".")[0] in {"torch", "transformers", "safetensors"}
    ]
    assert not wrong


def event_loops(tree: ast.Module) -> int:
    """Count `while` and endless `for` loops whose body takes a turn, or plans and launches."""
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.While):
            called = {
                call.func.attr
                for call in ast.walk(node)
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
            }
            count += bool(called & {"turn", "launch", "plan"})
    return count


def test_there_is_one_event_loop() -> None:
    found = {path: event_loops(tree) for path, tree in modules()}
    assert {path: count for path, count in found.items() if count} == {"engine/loop.py": 1}


def test_the_count_of_event_loops_can_fail() -> None:
    assert event_loops(ast.parse("while True:\n    runner.launch(scheduler.plan(live), live)")) == 1
    assert event_loops(ast.parse("while queue:\n    queue.pop()")) == 0


@pytest.mark.parametrize("path", [path for path, _ in modules()])
def test_files_stay_short(path: str) -> None:
    assert len((SOURCE / path).read_text(encoding="utf-8").splitlines()) <= 400


def test_public_names_exist() -> None:
    import sfumato

    assert set(sfumato.__all__) == {*sfumato._HOMES, "__version__"}
    for name in sfumato.__all__:
        assert getattr(sfumato, name) is not None


def test_import_does_not_load_torch() -> None:
    import subprocess
    import sys

    code = "import sys, sfumato; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
