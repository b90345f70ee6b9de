"""Golden folders: where their cases and checkpoints lie, and what a case says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One case file of a golden folder."""

    folder: Path
    path: Path

    @cached_property
    def content(self) -> dict[str, Any]:
        """Return the parsed file."""
        parsed: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return parsed

    @property
    def name(self) -> str:
        """Return folder and case."""
        return f"{self.folder.name}/{self.path.stem}"

    @property
    def kind(self) -> str:
        """Return the kind, or "" where the file names none."""
        return str(self.content.get("kind", ""))

    @property
    def checkpoint(self) -> str:
        """Return the checkpoint's name, or "" for cases without a model."""
        return str(self.content.get("checkpoint", ""))

    @property
    def checkpoint_path(self) -> Path:
        """Return the checkpoint's folder."""
        return self.folder / "checkpoints" / self.checkpoint

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Return the case's tensors."""
        return load_file(self.path.with_suffix(".safetensors"))

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    def get(self, key: str, default: Any = None) -> Any:
        """Return a field or a default."""
        return self.content.get(key, default)


def find_cases(folder: Path) -> Iterator[Case]:
    """Yield the cases of a golden folder, or of all golden folders below it."""
    for cases in sorted(path for path in (folder / "cases", *folder.glob("*/cases")) if path.is_dir()):
        for path in sorted(cases.glob("*.json")):
            yield Case(folder=cases.parent, path=path)
