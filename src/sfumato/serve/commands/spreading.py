"""Options that take several values in a row, as `--rate 1 2 4`, which typer knows only one by one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from typer.core import TyperCommand


def spread(arguments: Sequence[str], options: Collection[str]) -> list[str]:
    """Name an option again before each further value of it; for commands without positional arguments."""
    found: list[str] = []
    option, has_value = None, False
    for argument in arguments:
        if argument.startswith("-"):
            option, has_value = (argument if argument in options else None), False
        elif option is not None:
            if has_value:
                found.append(option)
            has_value = True
        found.append(argument)
    return found


def spreading(*options: str) -> type[TyperCommand]:
    """Return a kind of command whose options of these names take several values in a row."""

    class Spreading(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            return super().parse_args(ctx, spread(args, options))

    return Spreading
