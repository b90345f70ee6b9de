"""Which attention an engine computes: our own kernels, a library that is installed, or torch's."""

from __future__ import annotations

import torch

from sfumato.config import ATTENTION_LIBRARIES, EngineConfig
from sfumato.errors import ConfigError
from sfumato.models.attending import Attention, Pool, adapter_of, is_installed
from sfumato.models.kernels import why_not
from sfumato.models.language_model import LanguageModel


def check_attention(config: EngineConfig, device: str) -> None:
    """Raise ConfigError where what is asked for is not here, before weights are read."""
    name = config.attention_backend
    is_on_gpu = device.startswith("cuda")
    if name not in ("auto", "torch") and not is_on_gpu:
        raise ConfigError(f"--attention-backend {name} needs a GPU, and the device is {device}")
    if name in ATTENTION_LIBRARIES and not is_installed(name):
        raise ConfigError(f"--attention-backend {name}: {name} is not installed")
    if name == "torch" and config.graphs == "on" and is_on_gpu:
        raise ConfigError(
            "--attention-backend torch does not go with --graphs on: its calls differ from batch to batch"
        )


def attention_for(
    config: EngineConfig, model: LanguageModel, dtype: torch.dtype, page_size: int
) -> Attention:
    """Return an engine's attention over pages that hold keys of a dtype.

    "auto" is our own: nobody has compared the others here. Raises ConfigError where what is asked for cannot
    be used.
    """
    name = config.attention_backend
    if name in ("auto", "torch"):
        return Attention(has_kernels=name == "auto")
    device = model.device
    reason = why_not(device)
    if reason is not None:
        # A library needs them too: they write keys, and compute what it cannot express.
        raise ConfigError(f"--attention-backend {name}: {device} runs no Triton kernel: {reason}")
    if name == "triton":
        return Attention()
    capability = torch.cuda.get_device_capability(device)
    pool = Pool(device, capability, dtype, tuple(model.kv_shapes), page_size)
    try:
        return Attention(adapter=adapter_of(name, pool))
    except ConfigError as error:
        raise ConfigError(f"--attention-backend {name} cannot be used: {error}") from error
