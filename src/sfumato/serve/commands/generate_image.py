"""`sfumato generate-image`: one prompt, one or more pictures or a video, no server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sfumato.core.messages import Picture
from sfumato.core.traits import ImageTraits
from sfumato.errors import ConfigError, EngineError, RequestError
from sfumato.serve.commands import options

if TYPE_CHECKING:
    # These load torch or take a while, and --help needs neither.
    from sfumato.engine.image_engine import ImageEngine
    from sfumato.engine.image_params import ImageParams

_PICTURE = "Picture"
_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
_VIDEO = ".mp4"

Strength = Annotated[
    float | None,
    typer.Option(
        help="How much of --image is changed, 0 to 1.", rich_help_panel=_PICTURE, show_default="0.8"
    ),
]


def generate_image(
    prompt: Annotated[
        str | None, typer.Argument(help="What to draw; nothing for models of classes.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write: .png, .jpg, .webp, or .mp4 for a video. Default: sfumato-SEED.png.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Embedded name, folder or hub id of a pipeline. Default: the first embedded one.",
            rich_help_panel="Model",
        ),
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    threads: options.Threads = None,
    deterministic_rows: options.DeterministicRows = None,
    size: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT in pixels. Default: the model's.", rich_help_panel=_PICTURE),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoise steps. Default: the model's.", rich_help_panel=_PICTURE)
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="How closely the prompt is followed. Default: the model's.", rich_help_panel=_PICTURE
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What not to draw.", rich_help_panel=_PICTURE)
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="A timestep scheduler of diffusers. Default: the model's.", rich_help_panel=_PICTURE
        ),
    ] = None,
    scheduler_options: Annotated[
        str | None, typer.Option(metavar="JSON", help="Its options.", rich_help_panel=_PICTURE)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="The same seed draws the same picture. Default: drawn.", rich_help_panel=_PICTURE
        ),
    ] = None,
    n: Annotated[
        int,
        typer.Option(
            "-n", min=1, max=16, help="Pictures, each with a seed one higher.", rich_help_panel=_PICTURE
        ),
    ] = 1,
    image: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A picture to start from.", rich_help_panel=_PICTURE),
    ] = None,
    strength: Strength = None,
    class_label: Annotated[
        list[int] | None,
        typer.Option(
            help="For models of classes, instead of a prompt; repeatable.", rich_help_panel=_PICTURE
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="Frames of a video. Default: the model's.", rich_help_panel=_PICTURE),
    ] = None,
    repeat: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Draw what this picture of Sfumato's shows again; other options change it.",
            rich_help_panel=_PICTURE,
        ),
    ] = None,
) -> None:
    """Draw a picture, with a bar while it denoises; a terminal that can shows it.

    The file carries model, prompt, seed, steps, scheduler and guidance; --repeat reads them.
    """
    from sfumato.serve.settings_file import parse_parameters

    asked: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "size": size,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "scheduler": scheduler,
        "seed": seed,
        "strength": strength,
        "class_labels": class_label,
        "num_frames": frames,
        "n": n if n > 1 else None,
    }
    scheduler_given = parse_parameters("--scheduler-options", scheduler_options)
    if scheduler_given is not None:
        asked["scheduler"] = {"name": scheduler or "", "options": scheduler_given}
    body = (_told(repeat) if repeat is not None else {}) | {
        name: value for name, value in asked.items() if value is not None
    }
    engine = _load(body.pop("model", None), dtype, device, threads, deterministic_rows)
    params = _params(body, engine.traits, image)
    first = output or Path(f"sfumato-{params.seed}{_VIDEO if engine.traits.is_video else '.png'}")
    check_output(first, is_video=engine.traits.is_video)
    _write(engine, params, first)


def _told(path: Path) -> dict[str, Any]:
    """Return the request that a picture carries. Raises RequestError."""
    from sfumato.serve.pictures import read_request

    try:
        told = read_request(path.read_bytes())
    except OSError as error:
        raise RequestError(f"--repeat {path}: not a picture", field="repeat") from error
    if told is None:
        raise RequestError(f"--repeat {path}: this picture carries no request", field="repeat")
    return told


def _load(
    model: str | None, dtype: str | None, device: str | None, threads: int | None, rows: int | None
) -> ImageEngine:
    """Load a pipeline, the first embedded one where none is named."""
    from sfumato.config import EngineConfig
    from sfumato.engine.build_image import hide_progress_bars
    from sfumato.engine.image_engine import ImageEngine
    from sfumato.models.folder import embedded_pipelines

    if model is None:
        embedded = embedded_pipelines()
        if not embedded:
            raise ConfigError("no pipeline is embedded here; name one with --model")
        model = embedded[0]
    hide_progress_bars()
    errors = Console(stderr=True)
    with errors.status(f"loading {model}"):
        return ImageEngine.load(
            EngineConfig(
                model=model,
                dtype=dtype or "auto",
                device=device or "auto",
                num_threads=threads,
                deterministic_rows=rows,
            )
        )


def _params(body: dict[str, Any], traits: ImageTraits, image: Path | None) -> ImageParams:
    """Return the engine's parameters, checked as the API checks them. Raises RequestError."""
    from sfumato.serve.image_schema import GenerateRequest, VideoRequest
    from sfumato.serve.pictures import decode_upload

    try:
        request = (VideoRequest if traits.is_video else GenerateRequest).model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else "request"
        raise RequestError(f"{field}: {first['msg']}", field=field) from error
    params = request.params(traits)
    if image is None:
        return params
    size = None if params.width is None or params.height is None else (params.width, params.height)
    return params.replaced(image=decode_upload(image.read_bytes(), size=size, unit=traits.size_unit))


def check_output(path: Path, *, is_video: bool) -> None:
    """Raise ConfigError for a file that this kind of model cannot fill, before anything is drawn."""
    accepted = (_VIDEO,) if is_video else tuple(_FORMATS)
    if path.suffix.lower() not in accepted:
        raise ConfigError(f"--output {path}: the name must end in {', '.join(accepted)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--output {path}: no such folder")


def _write(engine: ImageEngine, params: ImageParams, first: Path) -> None:
    """Draw, write the files, show the pictures and say where they are."""
    from sfumato.engine.image_params import make_image_spec
    from sfumato.serve.commands.inline_picture import show_picture
    from sfumato.serve.image_schema import FRAMES_PER_SECOND
    from sfumato.serve.movies import encode_video, load_av
    from sfumato.serve.pictures import encode_picture, load_pillow
    from sfumato.serve.provenance import request_of

    traits, console = engine.traits, Console()
    load_pillow()
    if traits.is_video:
        load_av()
    spec = make_image_spec(params, traits)
    for picture in _drawn(engine, params):
        request = request_of(engine.name, params, spec, picture.index, scheduler=traits.scheduler)
        if traits.is_video:
            content = encode_video(picture, frames_per_second=FRAMES_PER_SECOND, request=request)
        else:
            kind = _FORMATS[first.suffix.lower()]
            content = encode_picture(picture, output_format=kind, request=request)
        number = "" if spec.num_images == 1 else f"-{picture.index + 1}"
        path = first.with_name(f"{first.stem}{number}{first.suffix}")
        path.write_bytes(content)
        show_picture(console, picture, os.environ)
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)


def _drawn(engine: ImageEngine, params: ImageParams) -> list[Picture]:
    """Return the pictures of one request, in order, with a bar while it denoises. Raises EngineError."""
    pictures: list[Picture] = []
    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        bar = progress.add_task("encoding", total=None)
        for output in engine.stream(params):
            if output.error is not None:
                raise EngineError(output.error)
            pictures += output.pictures
            if output.step is not None:
                done, total = output.step.done, output.step.total
                what = "decoding" if done == total else "denoising"
                progress.update(bar, description=what, completed=done, total=total)
    return sorted(pictures, key=lambda picture: picture.index)
