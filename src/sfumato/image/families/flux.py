"""Flux: packed latents, guidance as an input of a distilled model, true guidance on request."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sfumato.core.spec import ImageSpec
from sfumato.image.families.packed import Packed, packed, unpacked
from sfumato.image.families.protocol import Encode
from sfumato.image.state import COND, UNCOND, ImageState, Inputs


class Flux(Packed):
    """Flux.1, dev and schnell."""

    name = "flux"
    default_steps = 28
    default_guidance = 3.5
    takes_images = True
    fields: ClassVar[frozenset[str]] = frozenset(
        {"negative_prompt", "guidance_scale", "true_cfg_scale", "max_sequence_length", "strength"}
    )

    def encode_text(self, text: str, spec: ImageSpec) -> Inputs:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            [text], None, device=self.device, max_sequence_length=spec.max_sequence_length
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def conditioning(self, spec: ImageSpec, encode: Encode) -> dict[str, Inputs]:
        """The distilled guidance scale is a condition of every row."""
        found = super().conditioning(spec, encode)
        if not self.denoiser.config.guidance_embeds:
            return found
        scale = torch.full((spec.num_images,), spec.guidance_scale, device=self.device)
        return {branch: {**inputs, "guidance": scale} for branch, inputs in found.items()}

    def noise_shape(self, spec: ImageSpec) -> tuple[int, ...]:
        return (self.num_channels, *self.edges(spec))

    def pack(self, latents: Tensor) -> Tensor:
        return packed(latents)

    def unpack(self, latents: Tensor, spec: ImageSpec) -> Tensor:
        return unpacked(latents, *self.edges(spec))

    def inputs(self, state: ImageState, branch: str) -> Inputs:
        """Rows of one forward have one size, so that one of them tells where the tokens lie."""
        places = token_places(*self.edges(state.spec)).expand(state.num_images, -1, -1)
        return {**super().inputs(state, branch), "img_ids": places}

    def combine(self, state: ImageState, outputs: dict[str, Tensor]) -> Tensor:
        if UNCOND not in outputs:
            return outputs[COND]
        return outputs[UNCOND] + state.spec.true_cfg_scale * (outputs[COND] - outputs[UNCOND])

    def forward(self, inputs: Inputs, expert: str) -> Tensor:
        sample, text = inputs["sample"], inputs["encoder_hidden_states"]
        guidance = inputs.get("guidance")
        answer: Tensor = self.denoiser(
            hidden_states=sample.to(self.dtype),
            timestep=inputs["timestep"].to(self.dtype),
            guidance=guidance,
            pooled_projections=inputs["pooled_projections"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=self.device, dtype=self.dtype),
            img_ids=inputs["img_ids"][0].to(self.device, self.dtype),
            return_dict=False,
        )[0]
        return answer.float()


def token_places(height: int, width: int) -> Tensor:
    """Return f32[1, H/2 W/2, 3]: (0, row, column) of each image token."""
    places = torch.zeros(height // 2, width // 2, 3)
    places[..., 1] += torch.arange(height // 2)[:, None]
    places[..., 2] += torch.arange(width // 2)[None, :]
    return places.reshape(1, -1, 3)
