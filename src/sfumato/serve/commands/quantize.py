"""`sfumato quantize`: a checkpoint with eight-bit weights, made once and loaded from then on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress


def quantize(
    model: Annotated[str, typer.Argument(help="Embedded name, folder or hub id of a language model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must be empty or new.")],
) -> int:
    """Write a language model with int8 weights: a scale per output, activations scaled per token.

    The folder has the form of compressed-tensors; `sfumato serve FOLDER` loads it as it is.
    """
    from sfumato.models.folder import read_folder
    from sfumato.models.save_int8 import save_int8

    console = Console()
    folder = read_folder(model)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(f"quantizing {folder.name}", total=None)

        def on_progress(done: int, total: int, num_bytes: int) -> None:
            progress.update(bar, completed=done, total=total)

        written = save_int8(folder, out, on_progress)
    before = sum(file.stat().st_size for file in folder.path.glob("*.safetensors"))
    console.print(
        f"{out}: {written / 2**20:.1f} MiB of weights, {before / 2**20:.1f} MiB before", highlight=False
    )
    return 0
