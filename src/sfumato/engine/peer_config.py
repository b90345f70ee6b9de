"""Which kinds of rows an engine runs, and where its peers are; resolved once at start."""

from __future__ import annotations

import msgspec

from sfumato.errors import ConfigError

ROLES = ("both", "prefill", "encode", "denoise", "decode")
# Roles that work for engines which ask.
HELPING = ("prefill", "encode", "decode")
TRANSPORTS = ("sockets", "nixl")


class PeerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Prefill and denoise apart; of images: encode, denoise and decode.

    role: "both" runs every row; "prefill", "encode" and "decode" theirs, for peers that ask; "denoise" asks
    peers.
    listen: tcp://HOST:PORT where peers reach this engine; port 0 takes a free one. peers: addresses of
    engines that work for this one. secret: what both sides know; anybody with another one is refused.
    is_told: peers are told while it runs, by whoever started it; none is known before.
    transport: how keys and values travel. silence_seconds: a peer that was not heard of for so long is not
    waited for. prefill_seconds: a hand-over without progress for so long is given up.
    """

    role: str = "both"
    listen: str | None = None
    peers: tuple[str, ...] = ()
    secret: str | None = None
    is_told: bool = False
    transport: str = "sockets"
    silence_seconds: float = 5.0
    prefill_seconds: float = 30.0

    @property
    def is_alone(self) -> bool:
        """Whether this engine has nothing to do with others."""
        return self.listen is None and not self.peers and not self.is_told

    def check(self) -> None:
        """Raise ConfigError naming the options."""
        if self.role not in ROLES:
            raise ConfigError(f"--role {self.role!r} is not one of {', '.join(ROLES)}")
        if self.transport not in TRANSPORTS:
            raise ConfigError(f"--peer-transport {self.transport!r} is not one of {', '.join(TRANSPORTS)}")
        if self.role in HELPING and self.listen is None:
            raise ConfigError(f"--role {self.role} needs --listen: nobody could ask this engine for anything")
        if self.role in HELPING and self.peers:
            raise ConfigError(f"--role {self.role} does not go with --peers {','.join(self.peers)}")
        if self.role == "denoise" and not self.peers and not self.is_told:
            raise ConfigError("--role denoise needs --peers: engines that work for this one")
        if self.role == "denoise" and self.listen is not None:
            raise ConfigError(f"--role denoise does not go with --listen {self.listen}")
        if self.role == "both" and self.peers:
            raise ConfigError(f"--peers {','.join(self.peers)} needs --role denoise")
        for name, addresses in (("--listen", (self.listen,) if self.listen else ()), ("--peers", self.peers)):
            for address in addresses:
                parse_address(name, address)
        if (self.listen is not None or self.peers) and not self.secret:
            raise ConfigError("engines that talk to each other need a shared secret (SFUMATO_PEER_SECRET)")
        for name, seconds in (
            ("peer-timeout", self.silence_seconds),
            ("prefill-timeout", self.prefill_seconds),
        ):
            if not seconds > 0:
                raise ConfigError(f"--{name} {seconds} must be above 0 seconds")


def parse_address(option: str, address: str) -> tuple[str, int]:
    """Return host and port of tcp://HOST:PORT. Raises ConfigError."""
    scheme, _, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{option} {address!r} is not an address like tcp://127.0.0.1:7001")
    return host.strip("[]"), int(port)
