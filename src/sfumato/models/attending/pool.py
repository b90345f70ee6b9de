"""What an adapter must be able to read, and what is said where it cannot: ConfigErrors without the option."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from sfumato.errors import ConfigError

# What all of these libraries take.
_DTYPES = (torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class Pool:
    """Pages of one engine. shapes: (K, D) of each layer; capability: the GPU's."""

    device: torch.device
    capability: tuple[int, int]
    dtype: torch.dtype
    shapes: tuple[tuple[int, int], ...]
    page_size: int

    def check(self) -> None:
        """Raise ConfigError where the numbers or the GPU are none that any library takes."""
        if self.dtype not in _DTYPES:
            name = str(self.dtype).removeprefix("torch.")
            raise ConfigError(f"it takes bfloat16 and float16, and the model's numbers are {name}")
        if self.capability < _LEAST_CAPABILITY:
            least, found = (".".join(map(str, pair)) for pair in (_LEAST_CAPABILITY, self.capability))
            raise ConfigError(f"it needs compute capability {least}, and the GPU has {found}")


def imported(name: str) -> Any:
    """Return a foreign module. Raises ConfigError where it is not installed, or does not load."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name or name} is not installed") from error
    except Exception as error:
        # A library of another CUDA or torch may fail in any way.
        first = str(error).strip().splitlines()
        raise ConfigError(f"{name} does not load: {first[0] if first else type(error).__name__}") from error
