"""A checkpoint folder in Hugging Face form: where it lies, its JSON files, the traits they declare.

Reads JSON only; weights are `weights.py`'s.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from sfumato.core.traits import ModelTraits
from sfumato.errors import CheckpointError, ConfigError
from sfumato.models.quantization import saved_quantization
from sfumato.models.registry import family_of

ZOO = Path(__file__).resolve().parent.parent / "zoo"

# Everything that is ever read from a hub repository: no pickle, no code.
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja")


@dataclass(frozen=True, slots=True)
class Overrides:
    """Values that an operator gives where a checkpoint lacks them or is wrong."""

    mask_token_id: int | None = None
    eot_token_id: int | None = None
    block_length: int | None = None
    context_length: int | None = None
    quantization: str | None = None


@dataclass(frozen=True, slots=True)
class Folder:
    """One checkpoint folder, its parsed configuration and the traits of its model.

    quantization: of the weights in memory; is_quantized: they are saved like that.
    """

    name: str
    path: Path
    config: dict[str, Any]
    generation: dict[str, Any]
    traits: ModelTraits
    quantization: str | None = None
    is_quantized: bool = False

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can be turned into tokens; without one, requests carry token ids."""
        return (self.path / "tokenizer.json").exists()


def embedded_models() -> list[str]:
    """Return the names of the language models inside the package, the default first."""
    names = sorted(path.parent.name for path in ZOO.glob("*/config.json"))
    return sorted(names, key=lambda name: (name != "sfumato-tiny-sdar", name))


def embedded_pipelines() -> list[str]:
    """Return the names of the image pipelines inside the package."""
    return sorted(path.parent.name for path in ZOO.glob("*/model_index.json"))


def default_models() -> list[str]:
    """Return the embedded models that are served where none is named: not the variants of another one."""
    served = {name: read_json(ZOO / name / "generation_config.json") or {} for name in embedded_models()}
    return [name for name, content in served.items() if not content.get("sfumato", {}).get("variant_of")]


def locate(model: str) -> Path:
    """Return the folder of an embedded name, a local path or a hub id (downloaded if it is not cached)."""
    if model in (*embedded_models(), *embedded_pipelines()):
        return ZOO / model
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        embedded = ", ".join([*embedded_models(), *embedded_pipelines()])
        raise CheckpointError(
            f"model {model!r}: no such folder, no embedded model ({embedded}) and no hub id (owner/name)"
        )
    return _download(model)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"model {model!r}: not in the local cache and not reachable: {first_line}"
        ) from error


def read_folder(model: str, overrides: Overrides | None = None) -> Folder:
    """Locate and parse a checkpoint; raises CheckpointError naming the file or the field."""
    path = locate(model)
    config = read_json(path / "config.json")
    if config is None:
        raise CheckpointError(f"{path}: config.json is missing")
    generation = read_json(path / "generation_config.json") or {}
    overrides = overrides or Overrides()
    saved = saved_quantization(config)
    return Folder(
        name=name_of(model),
        path=path,
        config=config,
        generation=generation,
        traits=resolve_traits(config, generation, added_tokens(path), overrides),
        quantization=saved or overrides.quantization,
        is_quantized=saved is not None,
    )


def name_of(model: str) -> str:
    """Return what a model is called to others: its embedded name, its hub id, or its folder's name."""
    is_embedded = model in (*embedded_models(), *embedded_pipelines())
    if is_embedded or ("/" in model and not Path(model).exists()):
        return model
    return locate(model).resolve().name


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON object, or None where the file does not exist."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content


def added_tokens(path: Path) -> dict[str, int]:
    """Return the special tokens that a folder's tokenizer files add, by their text."""
    found: dict[str, int] = {}
    for text, token_id in (read_json(path / "added_tokens.json") or {}).items():
        found[text] = int(token_id)
    settings = read_json(path / "tokenizer_config.json") or {}
    for token_id, entry in (settings.get("added_tokens_decoder") or {}).items():
        found[entry["content"]] = int(token_id)
    for entry in (read_json(path / "tokenizer.json") or {}).get("added_tokens") or []:
        found[entry["content"]] = int(entry["id"])
    return found


def resolve_traits(
    config: dict[str, Any], generation: dict[str, Any], tokens: dict[str, int], overrides: Overrides
) -> ModelTraits:
    """Combine config.json, generation_config.json, the tokenizer and an operator's overrides."""
    traits = _declared_traits(config, tokens, overrides)
    ends = dict.fromkeys(traits.eos_token_ids)
    more = generation.get("eos_token_id")
    ends |= dict.fromkeys(more if isinstance(more, list) else [] if more is None else [more])
    eot = overrides.eot_token_id if overrides.eot_token_id is not None else traits.eot_token_id
    if eot is not None:
        ends[eot] = None
    context = overrides.context_length or traits.context_length
    if overrides.context_length and overrides.context_length > traits.context_length:
        raise ConfigError(
            f"--context-length {overrides.context_length} is beyond the model's {traits.context_length}"
        )
    named = [("eos_token_id", end) for end in ends]
    if traits.has_mask_token:
        named.append(("mask_token_id", traits.mask_token_id))
    for field, token_id in named:
        if not 0 <= token_id < traits.vocab_size:
            raise CheckpointError(f"{field} {token_id} is outside the vocabulary of {traits.vocab_size}")
    published = _published_parameters(traits.default_algorithm, generation)
    served = generation.get("sfumato") or {"parameters": {**traits.default_parameters, **published}}
    return msgspec.structs.replace(
        traits,
        eos_token_ids=tuple(ends),
        eot_token_id=eot,
        context_length=context,
        default_max_tokens=generation.get("max_new_tokens"),
        default_algorithm=served.get("algorithm", traits.default_algorithm),
        default_parameters=served.get("parameters", traits.default_parameters),
    )


# Fields of a published generation_config.json that are parameters of the family's own algorithm.
_PUBLISHED = {
    "entropy_bound": (
        "max_denoising_steps",
        "t_min",
        "t_max",
        "stability_threshold",
        "confidence_threshold",
    )
}


def _published_parameters(algorithm: str, generation: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters that a checkpoint gives its family's algorithm; a null is the default."""
    names = _PUBLISHED.get(algorithm, ())
    found = {name: generation[name] for name in names if generation.get(name) is not None}
    bound = (generation.get("sampler_config") or {}).get("entropy_bound") if names else None
    return found if bound is None else found | {"entropy_bound": bound}


def _declared_traits(config: dict[str, Any], tokens: dict[str, int], overrides: Overrides) -> ModelTraits:
    """Return what the family declares of a config.json in which an operator's values stand in for its own."""
    family = family_of(config)
    if overrides.mask_token_id is not None:
        config = config | {"mask_token_id": overrides.mask_token_id}
    traits = family.traits_from_hf(config, tokens)
    if overrides.mask_token_id is not None and not traits.has_mask_token:
        raise ConfigError(f"--mask-token-id: {traits.architecture} has no mask token")
    length = overrides.block_length
    if length is None or length == traits.block_length:
        return traits
    if traits.fixed_block_length:
        raise ConfigError(f"--block-length {length}: this model's blocks have {traits.block_length} tokens")
    return family.traits_from_hf(config | {"block_size": length, "block_length": length}, tokens)
