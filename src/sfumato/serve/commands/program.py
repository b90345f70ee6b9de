"""Which subcommands `sfumato` has."""

from __future__ import annotations

import importlib

import typer

from sfumato.serve.commands.bench import MANY, bench
from sfumato.serve.commands.chat import chat
from sfumato.serve.commands.evaluate import evaluate
from sfumato.serve.commands.generate import generate
from sfumato.serve.commands.generate_image import generate_image
from sfumato.serve.commands.models import models
from sfumato.serve.commands.quantize import quantize
from sfumato.serve.commands.serve import serve
from sfumato.serve.commands.spreading import spreading

# Commands of rooms above this one, which may import it and not be imported by it.
_ABOVE = {"deploy": "sfumato.deploy.command:deploy"}


def build_program() -> typer.Typer:
    """Join the subcommands."""
    program = typer.Typer(
        name="sfumato",
        help="Serve diffusion models: text and pictures that appear everywhere at once, step by step.",
        epilog="Start with: sfumato serve    then, elsewhere: sfumato models",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    program.command("serve")(serve)
    program.command("generate")(generate)
    program.command("generate-image")(generate_image)
    program.command("chat")(chat)
    program.command("models")(models)
    program.command("eval")(evaluate)
    program.command("bench", cls=spreading(*MANY))(bench)
    program.command("quantize")(quantize)
    for name, place in _ABOVE.items():
        module, function = place.split(":")
        program.command(name)(getattr(importlib.import_module(module), function))
    return program
