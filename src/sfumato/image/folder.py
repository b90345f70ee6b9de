"""A pipeline folder in diffusers form: its class is checked before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sfumato.errors import CheckpointError, ConfigError
from sfumato.image.families.protocol import Family
from sfumato.image.families.registry import check_pipeline, make_family
from sfumato.models.folder import locate

_NEEDS = "{}: image models need diffusers: pip install 'sfumato[image]'"
INDEX = "model_index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Components that judge pictures: what may be shown is the operator's business, not the engine's.
_DEFAULTS = {
    "default_steps",
    "default_guidance_scale",
    "default_true_cfg_scale",
    "default_height",
    "default_width",
    "default_num_frames",
    "max_sequence_length",
}
_LEFT_OUT = ("safety_checker",)


def find_pipeline(model: str) -> Path | None:
    """Return the folder of an embedded, local or hub model that is a pipeline of components; else None.

    Of a hub id only the index is fetched here, and the components that it names when they are loaded.
    Raises CheckpointError for a hub pipeline that is neither cached nor reachable.
    """
    if Path(model).expanduser().exists() or model.count("/") != 1:
        path = locate(model)
        return path if (path / INDEX).exists() else None
    # Imported here, because what lies on this machine does without.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        hf_hub_download(model, INDEX)
    except (EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        # A language model, or nothing that can be reached: the text side says which.
        return None
    return _download(model)


def _download(model: str) -> Path:
    """Fetch a hub pipeline's components in safetensors form; no pickle, no code."""
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ConfigError(_NEEDS.format(model)) from error
    try:
        return Path(DiffusionPipeline.download(model, use_safetensors=True))
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"model {model!r}: not in the local cache and not reachable: {first[0]}"
        ) from error


def read_index(path: Path) -> dict[str, Any]:
    """Return the pipeline's index. Raises CheckpointError."""
    try:
        content = json.loads((path / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / INDEX}: not readable as JSON: {error}") from error
    if not isinstance(content, dict) or "_class_name" not in content:
        raise CheckpointError(f"{path / INDEX}: _class_name is missing")
    return content


def load_family(path: Path, *, name: str, dtype: str, device: str) -> Family:
    """Load a pipeline's components and return their adapter.

    dtype: "auto" is float32 on a CPU, else bfloat16. Raises CheckpointError, and ConfigError where diffusers
    is not installed.
    """
    index = read_index(path)
    check_pipeline(index["_class_name"], name)
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError(_NEEDS.format(name)) from error
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"--dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    wanted = DTYPES["float32" if device == "cpu" else "bfloat16"] if dtype == "auto" else DTYPES[dtype]
    left_out = {part: None for part in _LEFT_OUT if part in index}
    try:
        with _without_advice():
            pipeline_class = getattr(diffusers, index["_class_name"])
            pipeline = pipeline_class.from_pretrained(
                str(path), dtype=wanted, local_files_only=True, use_safetensors=True, **left_out
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{name}: {first[0]}") from error
    pipeline.to(device)
    vae = getattr(pipeline, "vae", None)
    if vae is not None and wanted is torch.float16 and vae.config.get("force_upcast"):
        # It overflows in half precision, and is never changed while it serves.
        vae.to(torch.float32)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    family = make_family(pipeline, name)
    with torch.no_grad():
        family.warm_up()
    return family


@contextmanager
def _without_advice() -> Iterator[None]:
    """Keep both libraries from telling an operator what is nothing to act on; errors are raised anyway."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)


def read_defaults(path: Path) -> dict[str, Any]:
    """Return the traits that a folder's sfumato.json replaces: default steps, guidance and size.

    Raises CheckpointError naming a field that means nothing.
    """
    file = path / "sfumato.json"
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
    unknown = sorted(set(content) - _DEFAULTS)
    if unknown:
        raise CheckpointError(f"{file}: {unknown[0]} is not one of {', '.join(sorted(_DEFAULTS))}")
    return dict(content)
