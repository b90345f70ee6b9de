"""What an operator sets for a model: by options for all of them, by a YAML file for each."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import yaml

from sfumato.config import DEFAULT_RANK_TIMEOUT, EngineConfig
from sfumato.core.spec import ParameterValue
from sfumato.engine.limits import Limits
from sfumato.errors import ConfigError
from sfumato.serve.launch import Planned

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one model; None leaves a value to the command line, then to the engine's default."""

    name: str | None = None
    dtype: str | None = None
    device: str | None = None
    kv_memory: int | str | None = None
    page_size: int | None = None
    threads: int | None = None
    algorithm: str | None = None
    algorithm_parameters: dict[str, ParameterValue] | None = None
    block_length: int | None = None
    mask_token_id: int | None = None
    eot_token_id: int | None = None
    context_length: int | None = None
    policy: str | None = None
    order: str | None = None
    overlap: str | None = None
    graphs: str | None = None
    attention_backend: str | None = None
    quantization: str | None = None
    data_parallel: int | None = None
    data_parallel_attention: bool | None = None
    max_running_requests: int | None = None
    max_prefill_tokens: int | None = None
    denoise_every: int | None = None
    tensor_parallel: int | None = None
    rank_timeout: float | None = None
    max_step_rows: int | None = None
    max_latent_bytes: int | str | None = None
    deterministic_rows: int | None = None

    def over(self, general: ModelSettings) -> ModelSettings:
        """Return these settings with what they leave open taken from more general ones."""
        own = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        if self.algorithm is not None:
            # Another algorithm's parameters do not fit this one.
            own.setdefault("algorithm_parameters", {})
        return msgspec.structs.replace(general, **own)

    def planned(self, model: str) -> Planned:
        """Return the engine that they describe."""
        limits = {
            "policy": self.policy,
            "order": self.order,
            "max_running_requests": self.max_running_requests,
            "max_prefill_tokens": self.max_prefill_tokens,
            "denoise_every": self.denoise_every,
            "max_step_rows": self.max_step_rows,
            "max_latent_bytes": _bytes(self.max_latent_bytes, "--max-latent-bytes"),
        }
        config = EngineConfig(
            model=model,
            dtype=self.dtype or "auto",
            device=self.device or "auto",
            kv_memory=_bytes(self.kv_memory, "--kv-memory"),
            page_size=self.page_size,
            num_threads=self.threads,
            algorithm=self.algorithm,
            parameters=self.algorithm_parameters or {},
            mask_token_id=self.mask_token_id,
            eot_token_id=self.eot_token_id,
            block_length=self.block_length,
            context_length=self.context_length,
            overlap=self.overlap or "auto",
            graphs=self.graphs or "auto",
            attention_backend=self.attention_backend or "auto",
            quantization=self.quantization,
            deterministic_rows=self.deterministic_rows,
            num_replicas=1 if self.data_parallel is None else self.data_parallel,
            tensor_parallel=1 if self.tensor_parallel is None else self.tensor_parallel,
            rank_timeout=DEFAULT_RANK_TIMEOUT if self.rank_timeout is None else self.rank_timeout,
            limits=Limits(**{name: value for name, value in limits.items() if value is not None}),  # type: ignore[arg-type]
        )
        return Planned(config, self.name, shares_weights=bool(self.data_parallel_attention))


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file: settings under each model's embedded name, folder or hub id."""

    models: dict[str, ModelSettings | None]


def read_settings(path: Path) -> dict[str, ModelSettings]:
    """Read a settings file. Raises ConfigError naming the file and the field."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        parsed = msgspec.convert(_dashed(content), type=_File)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if not parsed.models:
        raise ConfigError(f"--config {path}: 'models' names no model")
    return {model: settings or ModelSettings() for model, settings in parsed.models.items()}


def _dashed(content: object) -> object:
    """Let settings be written as the options are, with dashes."""
    if not isinstance(content, dict) or not isinstance(content.get("models"), dict):
        return content
    models = {}
    for model, settings in content["models"].items():
        if isinstance(settings, dict):
            settings = {str(name).replace("-", "_"): value for name, value in settings.items()}
        models[str(model)] = settings
    return content | {"models": models}


def _bytes(value: int | str | None, option: str) -> int | None:
    return None if value is None else parse_bytes(value, option)


def parse_bytes(value: int | str, option: str) -> int:
    """Return a number of bytes from 1024, "512M", "1.5G". Raises ConfigError."""
    if isinstance(value, int):
        return value
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", value.strip(), re.IGNORECASE)
    if found is None:
        raise ConfigError(f"{option} {value!r} is not a size like 512M or 2G")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def parse_parameters(option: str, text: str | None) -> dict[str, ParameterValue] | None:
    """Return the object that an option holds as JSON. Raises ConfigError."""
    if text is None:
        return None
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text!r} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ConfigError(f'{option} {text!r} is not a JSON object like {{"threshold": 0.9}}')
    return parsed
