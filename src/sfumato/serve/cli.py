"""The command `sfumato`: runs a subcommand, and turns every user error into one line."""

from __future__ import annotations

import sys
from typing import Any

import typer

from sfumato.errors import SfumatoError

# typer carries a click of its own in some versions and takes the installed one in others.
_CommandLineError: Any = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)

# What shells report for a program that Ctrl-C ended.
_INTERRUPTED = 130
_WRONG_COMMAND_LINE = 2


def main() -> None:
    """Run a subcommand; exit status 1 for an error of ours, 2 for a wrong command line."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a subcommand and return its exit status."""
    try:
        # Imported here, because it takes a while and Ctrl-C may come meanwhile.
        from sfumato.serve.commands.program import build_program

        return build_program()(args=arguments or ["--help"], standalone_mode=False) or 0
    except typer.Exit as leaving:
        return leaving.exit_code
    except _CommandLineError as error:
        return _fail(f"{error.format_message().rstrip('.')}; see --help", _WRONG_COMMAND_LINE)
    except SfumatoError as error:
        return _fail(str(error), 1)
    except (typer.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has seen enough; nothing may be flushed into the pipe at exit.
        sys.stdout = None
        return 0


def _fail(message: str, status: int) -> int:
    print(f"sfumato: error: {' '.join(message.split())}", file=sys.stderr)
    return status
