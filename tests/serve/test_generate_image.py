"""`sfumato generate-image` in this process: files, what they carry, terminals."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from sfumato.core.messages import Picture
from sfumato.serve.cli import run
from sfumato.serve.commands.inline_picture import escaped, half_blocks, protocol_of, show_picture
from sfumato.serve.pictures import read_request
from tests.serve.running import PIPELINES, SD3, WAN

MODEL = ("--model", str(PIPELINES[SD3]), "--threads", "1", "--dtype", "float32")
PROMPT = "a red circle"


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def test_pictures_are_written_and_can_be_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "circle.png"
    asked = ("--steps", "2", "--seed", "5", "--scheduler", "FlowMatchHeunDiscreteScheduler", "-n", "2")
    assert run(["generate-image", PROMPT, *MODEL, *asked, "--size", "32x16", "-o", str(path)]) == 0
    files = [tmp_path / "circle-1.png", tmp_path / "circle-2.png"]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    told = read_request(files[1].read_bytes())
    assert told is not None
    assert (told["prompt"], told["seed"], told["size"]) == (PROMPT, 6, "32x16")
    assert told["scheduler"]["name"] == "FlowMatchHeunDiscreteScheduler"
    again = tmp_path / "again.webp"
    assert run(["generate-image", "--repeat", str(files[1]), *MODEL, "-o", str(again)]) == 0
    assert run(["generate-image", "--repeat", str(files[1]), *MODEL, "-o", str(path)]) == 0
    assert pixels(path) == pixels(files[1])
    assert (read_request(again.read_bytes()) or {})["seed"] == 6
    edited = tmp_path / "edited.jpg"
    assert (
        run(["generate-image", PROMPT, *MODEL, "--image", str(path), "--steps", "4", "-o", str(edited)]) == 0
    )
    with Image.open(edited) as image:
        assert image.size == (32, 16)


def test_a_video_is_written(tmp_path: Path) -> None:
    path = tmp_path / "circle.mp4"
    asked = ("--frames", "5", "--steps", "1", "--size", "16x16", "-o", str(path))
    assert run(["generate-image", PROMPT, "--model", str(PIPELINES[WAN]), "--threads", "1", *asked]) == 0
    assert path.read_bytes()[4:8] == b"ftyp"


@pytest.mark.parametrize(
    ("arguments", "reason", "status"),
    [
        ((), "prompt", 1),
        ((PROMPT, "--size", "33x32"), "multiples of 4", 1),
        ((PROMPT, "--size", "big"), "WIDTHxHEIGHT", 1),
        ((PROMPT, "--steps", "0"), "steps", 2),
        ((PROMPT, "--scheduler", "guess"), "guess", 1),
        ((PROMPT, "--scheduler-options", "{"), "--scheduler-options", 1),
        ((PROMPT, "--scheduler-options", '{"shift": 2}'), "scheduler", 1),
        ((PROMPT, "-o", "x.gif"), "--output", 1),
        ((PROMPT, "-o", "no/such/folder/x.png"), "folder", 1),
        ((PROMPT, "--strength", "0.5"), "strength", 1),
        ((PROMPT, "--class-label", "3"), "class_labels", 1),
        ((PROMPT, "--repeat", __file__), "--repeat", 1),
        ((PROMPT, "--image", __file__), "image", 1),
    ],
)
def test_every_user_error_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], reason: str, status: int
) -> None:
    assert run(["generate-image", *MODEL, *arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sfumato: error: ")
    assert err.count("\n") == 1
    assert reason in err


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM_PROGRAM": "iTerm.app", "TMUX": "/tmp/x"}, None),
        ({"TERM": "xterm-256color"}, None),
        ({}, None),
    ],
)
def test_terminals_are_told_by_their_environment(environment: dict[str, str], protocol: str | None) -> None:
    assert protocol_of(environment) == protocol


def noise(width: int, height: int) -> Picture:
    content = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8).tobytes()
    return Picture(
        index=0, step=1, is_preview=False, num_frames=1, height=height, width=width, pixels=content
    )


def shown(environment: dict[str, str], *, is_terminal: bool, colours: str | None = "truecolor") -> str:
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=is_terminal, color_system=colours, width=40, height=20, _environ={}
    )
    show_picture(console, noise(64, 16), environment)
    return file.getvalue()


def test_a_picture_is_shown_where_a_terminal_can() -> None:
    assert shown({}, is_terminal=False) == ""
    assert shown({}, is_terminal=True, colours="256") == ""
    blocks = shown({}, is_terminal=True)
    assert blocks.count("▀") == 40 * 5
    assert "\x1b[38;2;" in blocks
    inline = shown({"TERM_PROGRAM": "iTerm.app"}, is_terminal=True)
    assert inline.startswith("\x1b]1337;File=inline=1;size=")
    png = base64.b64decode(inline.split(":", 1)[1].split("\x07")[0])
    assert Image.open(io.BytesIO(png)).size == (1024, 256)


def test_kitty_takes_parts() -> None:
    content = bytes(range(256)) * 40
    parts = escaped("kitty", content).split("\x1b\\")[:-1]
    heads, bodies = zip(*(part.removeprefix("\x1b_G").split(";") for part in parts), strict=True)
    assert heads == ("a=T,f=100,m=1", "m=1", "m=1", "m=0")
    assert base64.b64decode("".join(bodies)) == content
    assert max(map(len, bodies)) <= 4096


def test_half_blocks_keep_the_colours() -> None:
    image = Image.new("RGB", (1, 2))
    image.putpixel((0, 0), (255, 0, 0))
    image.putpixel((0, 1), (0, 0, 255))
    text = half_blocks(image, 10, 10)
    assert text.plain == "▀"
    assert str(text.spans[0].style) == "#ff0000 on #0000ff"
