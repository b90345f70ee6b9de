"""Command-line options of prefill and denoise apart, and the configuration that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfumato.engine.peer_config import PeerConfig
from sfumato.engine.pools import PoolSizes, parse_sizes
from sfumato.errors import ConfigError

_PANEL = "Prefill and denoise apart"

Disaggregate = Annotated[
    str | None,
    typer.Option(
        metavar="P:D",
        help="Start P prefill and D denoise engines and the front door on this machine.",
        rich_help_panel=_PANEL,
    ),
]
Role = Annotated[
    str,
    typer.Option(
        help="prefill: works for the denoise engines that connect, without a front door; denoise: a front "
        "door whose prompts are prefilled by --peers; both: everything here.",
        rich_help_panel=_PANEL,
    ),
]
Listen = Annotated[
    str | None,
    typer.Option(
        metavar="tcp://HOST:PORT",
        help="Where denoise engines reach this one; port 0 takes a free one.",
        rich_help_panel=_PANEL,
    ),
]
Peers = Annotated[
    list[str] | None,
    typer.Option(
        metavar="tcp://HOST:PORT",
        help="A prefill engine; repeatable, or separated by commas.",
        rich_help_panel=_PANEL,
    ),
]
PeerSecret = Annotated[
    str | None,
    typer.Option(
        envvar="SFUMATO_PEER_SECRET",
        help="What all engines of the pools know. Better in the environment or a file than here.",
        rich_help_panel=_PANEL,
    ),
]
PeerSecretFile = Annotated[
    Path | None, typer.Option(help="File whose first line is the secret.", rich_help_panel=_PANEL)
]
PeerTransport = Annotated[
    str,
    typer.Option(
        help="sockets: keys and values over TCP; nixl: written into the peer's memory (sfumato[nixl]).",
        rich_help_panel=_PANEL,
    ),
]
PeerTimeout = Annotated[
    float,
    typer.Option(help="Seconds of silence after which a peer is not waited for.", rich_help_panel=_PANEL),
]
PrefillTimeout = Annotated[
    float,
    typer.Option(
        help="Seconds without progress after which a prompt is prefilled elsewhere.", rich_help_panel=_PANEL
    ),
]


def peer_config(
    *,
    role: str,
    listen: str | None,
    peers: list[str] | None,
    secret: str | None,
    secret_file: Path | None,
    transport: str,
    silence_seconds: float,
    prefill_seconds: float,
) -> PeerConfig:
    """Return one engine's part; contradictions are refused when the engine's configuration is checked.

    Raises ConfigError for a secret that cannot be read.
    """
    if secret_file is not None:
        try:
            secret = secret_file.read_text(encoding="utf-8").splitlines()[0].strip()
        except (OSError, UnicodeDecodeError, IndexError) as error:
            raise ConfigError(f"--peer-secret-file {secret_file}: no secret in it ({error})") from error
    return PeerConfig(
        role=role,
        listen=listen,
        peers=tuple(part.strip() for text in peers or () for part in text.split(",") if part.strip()),
        secret=secret,
        transport=transport,
        silence_seconds=silence_seconds,
        prefill_seconds=prefill_seconds,
    )


def pool_sizes(disaggregate: str | None, peering: PeerConfig, num_models: int) -> PoolSizes | None:
    """Return the pools to start here. Raises ConfigError for options that do not go together."""
    if disaggregate is not None:
        if peering.role != "both" or not peering.is_alone:
            raise ConfigError(
                f"--disaggregate {disaggregate} starts both pools itself "
                "and does not go with --role, --listen or --peers"
            )
        if num_models != 1:
            raise ConfigError(f"--disaggregate {disaggregate} takes one MODEL, not {num_models}")
        return parse_sizes(disaggregate)
    if not peering.is_alone and num_models != 1:
        raise ConfigError(f"--role {peering.role} takes one MODEL, not {num_models}")
    return None
