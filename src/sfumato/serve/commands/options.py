"""Command-line options that more than one subcommand has, each described once."""

from __future__ import annotations

from typing import Annotated

import typer

_MODEL = "Model"
_SAMPLING = "Sampling"
_DECODING = "Decoding"
_IMAGES = "Images"

Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16, float16, or auto: the checkpoint's; float32 on CPUs without bfloat16.",
        rich_help_panel=_MODEL,
        show_default="auto",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, cuda:1, or auto: CUDA where there is one.",
        rich_help_panel=_MODEL,
        show_default="auto",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads of the forward, shared out between the models.", rich_help_panel=_MODEL),
]
MaskTokenId = Annotated[
    int | None,
    typer.Option(
        help="The id that means 'not decided yet', where a checkpoint lacks it.", rich_help_panel=_MODEL
    ),
]
EotTokenId = Annotated[
    int | None,
    typer.Option(help="The id that ends a turn, where a checkpoint lacks it.", rich_help_panel=_MODEL),
]
ContextLength = Annotated[
    int | None,
    typer.Option(help="Tokens of prompt and answer; at most the model's own.", rich_help_panel=_MODEL),
]
Algorithm = Annotated[
    str | None,
    typer.Option(
        help="How positions are chosen in a step; `sfumato models` lists them. Default: the checkpoint's.",
        rich_help_panel=_DECODING,
    ),
]
AlgorithmParameters = Annotated[
    str | None,
    typer.Option(
        metavar="JSON", help="""Its parameters, as '{"threshold": 0.9}'.""", rich_help_panel=_DECODING
    ),
]
BlockLength = Annotated[
    int | None,
    typer.Option(
        help="Tokens that are denoised together; smaller is closer to left-to-right.",
        rich_help_panel=_DECODING,
    ),
]
OneModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Embedded name, folder or hub id. Default: the first embedded model.",
        rich_help_panel=_MODEL,
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option(help="Output tokens at most. Default: the model's.", rich_help_panel=_SAMPLING)
]
Temperature = Annotated[
    float, typer.Option(help="0 takes the best token; higher is more varied.", rich_help_panel=_SAMPLING)
]
TopP = Annotated[
    float, typer.Option(help="Sample from the smallest set with this probability.", rich_help_panel=_SAMPLING)
]
TopK = Annotated[
    int, typer.Option(help="Sample from the k best tokens; 0 is all.", rich_help_panel=_SAMPLING)
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed", help="The same seed gives the same text. Default: drawn.", rich_help_panel=_SAMPLING
    ),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option(
        "--stop", help="End the text in front of this string; repeatable.", rich_help_panel=_SAMPLING
    ),
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on behind the model's end token.", rich_help_panel=_SAMPLING)
]
Delay = Annotated[
    float,
    typer.Option(
        min=0,
        help="Seconds to rest after a denoise step in a terminal, so that eyes can follow.",
        rich_help_panel="Display",
    ),
]
MaxStepRows = Annotated[
    int | None,
    typer.Option(
        help="Rows of a forward over images: each branch of each image is one.",
        rich_help_panel=_IMAGES,
        show_default="32",
    ),
]
MaxLatentBytes = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Latents of a forward over images, as 512M or 2G.",
        rich_help_panel=_IMAGES,
        show_default="256M",
    ),
]
DeterministicRows = Annotated[
    int | None,
    typer.Option(
        help="Every forward over images has exactly so many rows, 1, 2 or a multiple of 4: the same picture "
        "to the last bit, whatever else is drawn.",
        rich_help_panel=_IMAGES,
        show_default="off",
    ),
]
