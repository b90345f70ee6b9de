"""Which adapter serves which of diffusers' pipelines; a new family is one file and one line."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sfumato.errors import CheckpointError
from sfumato.image.families.protocol import Family

_FAMILIES = {
    "StableDiffusionPipeline": "stable_diffusion:StableDiffusion",
    "StableDiffusionImg2ImgPipeline": "stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl:StableDiffusionXL",
    "StableDiffusionXLImg2ImgPipeline": "stable_diffusion_xl:StableDiffusionXL",
    "StableDiffusion3Pipeline": "stable_diffusion_3:StableDiffusion3",
    "StableDiffusion3Img2ImgPipeline": "stable_diffusion_3:StableDiffusion3",
    "FluxPipeline": "flux:Flux",
    "FluxImg2ImgPipeline": "flux:Flux",
    "QwenImagePipeline": "qwen_image:QwenImage",
    "ZImagePipeline": "z_image:ZImage",
    "DiTPipeline": "dit:DiT",
    "WanPipeline": "wan:Wan",
}
# In the names of video pipelines that denoise one frame after another, each at its own noise level.
_CAUSAL_VIDEO = ("DiffusionForcing", "Causal", "CausVid", "SelfForcing")


def check_pipeline(class_name: str, name: str) -> None:
    """Raise CheckpointError, with what is supported, for a pipeline class without an adapter."""
    if class_name in _FAMILIES:
        return
    if any(part in class_name for part in _CAUSAL_VIDEO):
        raise CheckpointError(f"{name}: {class_name} denoises video causally, which is not supported")
    raise CheckpointError(f"{name}: {class_name} is not supported; supported are {', '.join(_FAMILIES)}")


def make_family(pipeline: Any, name: str) -> Family:
    """Return the adapter of a loaded pipeline. Raises CheckpointError."""
    class_name = type(pipeline).__name__
    check_pipeline(class_name, name)
    module, _, attribute = _FAMILIES[class_name].partition(":")
    family: type[Family] = getattr(import_module(f"sfumato.image.families.{module}"), attribute)
    return family(pipeline)
