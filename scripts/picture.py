"""Draw the README's picture from a real answer: `python scripts/picture.py` writes it to docs/images."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from sfumato import Engine, SamplingParams
from sfumato.serve.commands.canvas import CanvasText

QUESTION = "Tom has 12 apples and buys 7 more. He gives away 4. How many are left?"
TARGET = Path(__file__).resolve().parent.parent / "docs" / "images" / "denoise.svg"


def main() -> None:
    """Print the canvas after each step, one line a step, and save it as a picture."""
    engine = Engine.load("sfumato-tiny-sdar", device="cpu")
    assert engine.tokenizer is not None
    console = Console(record=True, width=84, force_terminal=True, color_system="256")
    console.print(Text(f"> {QUESTION}", style="cyan"))
    canvas, step = CanvasText(engine.tokenizer), 0
    usage = None
    # Four tokens a step: slow enough to watch.
    params = SamplingParams(
        include_canvas=True,
        algorithm="sdar",
        algorithm_parameters={"remasking_strategy": "low_confidence_static", "denoising_steps": 4},
    )
    for _, delta in engine.stream([{"role": "user", "content": QUESTION}], params):
        canvas.push(delta)
        step, usage = step + 1, delta.usage
        console.print(Text.assemble((f"step {step:2d}  ", "dim"), canvas.render()))
    assert usage is not None
    console.print(
        Text(
            f"{usage.completion_tokens} tokens, {usage.nfe} forwards: "
            f"{usage.tokens_per_forward:.1f} tokens per forward",
            style="dim",
        )
    )
    console.save_svg(str(TARGET), title="sfumato generate")


if __name__ == "__main__":
    main()
