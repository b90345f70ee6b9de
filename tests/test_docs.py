"""The examples of the README and the documents run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = [
    (path.name, code)
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for code in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    if "openai" not in code
]


@pytest.mark.parametrize(
    ("name", "code"), EXAMPLES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(EXAMPLES)]
)
def test_examples_run(name: str, code: str) -> None:
    exec(compile(code, name, "exec"), {})


def test_the_readme_names_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make serve" in readme
    assert "make test" in readme


def test_every_runtime_dependency_has_a_reason() -> None:
    architecture = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = project.split("dependencies = [", 1)[1].split("]", 1)[0]
    for requirement in re.findall(r'"([a-z0-9_-]+)', block):
        assert requirement in architecture, f"{requirement} is not explained in docs/architecture.md"


def test_every_algorithm_is_documented() -> None:
    from sfumato.text.decoding.registry import ALGORITHMS, describe

    text = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    for name in ALGORITHMS:
        assert f"`{name}`" in text
        for entry in describe(name):
            assert f"`{entry['name']}`" in text, f"{name}: {entry['name']} is not documented"
