"""A picture in the terminal: by a protocol where there is one, else by coloured half blocks."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from sfumato.core.messages import Picture
from sfumato.serve.pictures import encode_picture, load_pillow

# kitty takes a picture in parts of at most so many characters.
_PART = 4096
# Smaller pictures are shown larger, pixel by pixel.
_SMALL = 256
# Rows of a terminal that are left for what is written around a picture.
_ROWS_AROUND = 4
_HALF = "▀"


def protocol_of(environment: Mapping[str, str]) -> str | None:
    """Return which protocol a terminal says that it knows: "kitty", "iterm2" or None."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if "TMUX" in environment or term.startswith(("screen", "tmux")):
        # What stands between does not pass pictures on.
        return None
    if "KITTY_WINDOW_ID" in environment or term == "xterm-kitty" or program == "ghostty":
        return "kitty"
    return "iterm2" if program in ("iTerm.app", "WezTerm") else None


def show_picture(console: Console, picture: Picture, environment: Mapping[str, str]) -> None:
    """Show a picture, or a video's first frame, where a terminal can; do nothing elsewhere."""
    if not console.is_terminal:
        return
    image = load_pillow().open(io.BytesIO(encode_picture(picture)))
    protocol = protocol_of(environment)
    if protocol is not None:
        factor = max(1, _SMALL // min(image.size))
        image = image.resize((image.width * factor, image.height * factor), load_pillow().Resampling.NEAREST)
        file = io.BytesIO()
        image.save(file, "png")
        console.file.write(escaped(protocol, file.getvalue()) + "\n")
        console.file.flush()
    elif console.color_system == "truecolor":
        console.print(half_blocks(image, console.width, console.height - _ROWS_AROUND))


def escaped(protocol: str, png: bytes) -> str:
    """Return the escape sequences that show a PNG."""
    content = base64.b64encode(png).decode()
    if protocol == "iterm2":
        return f"\x1b]1337;File=inline=1;size={len(png)}:{content}\x07"
    parts = [content[start : start + _PART] for start in range(0, len(content), _PART)]
    return "".join(
        f"\x1b_G{'a=T,f=100,' if number == 0 else ''}m={int(number + 1 < len(parts))};{part}\x1b\\"
        for number, part in enumerate(parts)
    )


def half_blocks(image: Any, columns: int, rows: int) -> Text:
    """Return a picture as text, two pixels a character, no larger than it is or than the room for it."""
    scale = min(1.0, columns / image.width, 2 * max(1, rows) / image.height)
    width, height = max(1, int(image.width * scale)), max(2, int(image.height * scale) // 2 * 2)
    pixels = image.resize((width, height)).load()
    text = Text(no_wrap=True)
    for y in range(0, height, 2):
        for x in range(width):
            above, below = (Color.from_rgb(*pixels[x, y + half]) for half in (0, 1))
            text.append(_HALF, Style(color=above, bgcolor=below))
        if y + 2 < height:
            text.append("\n")
    return text
