"""A process of torchrun's: which rank it is and where the ranks meet."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from sfumato.config import EngineConfig
from sfumato.errors import ConfigError

_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_torchrun(environment: Mapping[str, str]) -> bool:
    """Whether an environment is that of one of several ranks."""
    return environment.get("WORLD_SIZE", "1") != "1" and all(name in environment for name in _NAMES)


def placed(config: EngineConfig, environment: Mapping[str, str]) -> EngineConfig:
    """Return the configuration of the rank that torchrun has made of this process.

    Raises ConfigError where it has started another number of ranks than the configuration asks for.
    """
    size = int(environment["WORLD_SIZE"])
    if config.tensor_parallel != size:
        raise ConfigError(
            f"torchrun started {size} ranks (WORLD_SIZE), and --tensor-parallel is {config.tensor_parallel}; "
            "say the same number twice"
        )
    return msgspec.structs.replace(
        config,
        rank=int(environment["RANK"]),
        rendezvous=f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}",
        is_rendezvous_open=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )
