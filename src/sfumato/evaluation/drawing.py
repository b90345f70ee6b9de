"""How pictures of figures look, and how they are written; matplotlib is the extra `eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "svg.hashsalt": "sfumato",
}


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def require_plot() -> None:
    """Raise ConfigError with what to install where matplotlib is missing."""
    if not can_plot():
        raise ConfigError("--plot needs matplotlib: pip install 'sfumato[eval]'")


def write_figure(make_figure: Callable[[], Figure], paths: Sequence[Path], where: str) -> None:
    """Draw once and write each file; where: names the option if one cannot be written. Raises ConfigError."""
    # Imported here, because matplotlib is not needed for anything else.
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = make_figure()
        try:
            for path in paths:
                # Without a date the same report gives the same file.
                figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            raise ConfigError(f"{where}: {error.strerror}") from error
