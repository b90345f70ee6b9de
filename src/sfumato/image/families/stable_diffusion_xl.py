"""Stable Diffusion XL: two text encoders, and sizes and crops as further conditions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from sfumato.core.spec import ImageSpec
from sfumato.image.families.protocol import Encode
from sfumato.image.families.stable_diffusion import StableDiffusion
from sfumato.image.state import COND, UNCOND, Inputs


class StableDiffusionXL(StableDiffusion):
    """The SDXL base model."""

    name = "stable-diffusion-xl"
    default_guidance = 5.0
    sets_begin_index = True
    fields: ClassVar[frozenset[str]] = StableDiffusion.fields | {
        "original_size",
        "crops_coords_top_left",
        "target_size",
    }

    @property
    def can_skip(self) -> bool:
        """Its pipeline takes hidden states of another layer, which every encoder has."""
        return True

    def encode_text(self, text: str, spec: ImageSpec) -> Inputs:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            [text],
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            clip_skip=spec.clip_skip,
        )
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def unconditional(self, spec: ImageSpec, encode: Encode, cond: Inputs) -> Inputs:
        """No negative prompt is a text of zeros, where the pipeline says so."""
        if spec.negative_prompts is None and self.pipeline.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(value) for name, value in cond.items()}
        return super().unconditional(spec, encode, cond)

    def conditioning(self, spec: ImageSpec, encode: Encode) -> dict[str, Inputs]:
        """Sizes are conditions of both branches."""
        found = super().conditioning(spec, encode)
        size = (spec.height, spec.width)
        numbers = (spec.original_size or size) + spec.crops_coords_top_left + (spec.target_size or size)
        ids = torch.tensor([numbers] * spec.num_images, dtype=self.dtype, device=self.device)
        for branch in (COND, UNCOND):
            if branch in found:
                found[branch] = {**found[branch], "time_ids": ids}
        return found

    def added(self, inputs: Inputs) -> dict[str, Any]:
        return {"text_embeds": inputs["text_embeds"], "time_ids": inputs["time_ids"]}
