"""An engine in this process, with a progress bar while its model loads."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress

from sfumato.config import EngineConfig
from sfumato.engine.build import Loaded, load
from sfumato.engine.engine import Engine
from sfumato.models.folder import embedded_models


def load_engine(model: str | None, *, dtype: str | None, device: str | None, threads: int | None) -> Engine:
    """Load a model, the first embedded one where none is named. Raises ConfigError or CheckpointError."""
    return Engine.from_loaded(load_model(model, dtype=dtype, device=device, threads=threads))


def load_model(model: str | None, *, dtype: str | None, device: str | None, threads: int | None) -> Loaded:
    """Load a model without an engine yet. Raises ConfigError or CheckpointError."""
    name = embedded_models()[0] if model is None else model
    config = EngineConfig(model=name, dtype=dtype or "auto", device=device or "auto", num_threads=threads)
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        bar = progress.add_task(f"loading {name}", total=None)

        def on_progress(done: int, total: int, num_bytes: int) -> None:
            progress.update(bar, completed=done, total=total)

        return load(config, on_progress)
