"""Stable Diffusion 1.x and 2.x: a UNet over CLIP's text, one forward with the unconditional rows first."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.core.spec import ImageSpec
from sfumato.errors import NotSupported
from sfumato.image.families.protocol import Family, per_row
from sfumato.image.state import COND, UNCOND, ImageState, Inputs


class StableDiffusion(Family):
    """The UNet pipelines of the first generations."""

    name = "stable-diffusion"
    denoiser_name = "unet"
    default_steps = 50
    default_guidance = 7.5
    max_sequence_length = 77
    takes_images = True
    fields: ClassVar[frozenset[str]] = frozenset(
        {"negative_prompt", "guidance_scale", "guidance_rescale", "eta", "clip_skip", "strength"}
    )

    @property
    def default_size(self) -> tuple[int, int]:
        size = self.denoiser.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale, width * self.vae_scale

    @property
    def size_unit(self) -> int:
        """The UNet halves its input as often as it has blocks but one."""
        return int(self.vae_scale * 2 ** (len(self.denoiser.config.block_out_channels) - 1))

    @property
    def is_distilled(self) -> bool:
        """Whether guidance is an input of the UNet, as in latent consistency models."""
        return self.denoiser.config.time_cond_proj_dim is not None

    def check(self, spec: ImageSpec) -> None:
        """The pipeline's clip_skip reads a field that newer text encoders do not have."""
        if spec.clip_skip is not None and not self.can_skip:
            raise NotSupported(
                "clip_skip: the installed diffusers cannot skip layers of the installed transformers' CLIP",
                field="clip_skip",
                value=spec.clip_skip,
            )

    @property
    def can_skip(self) -> bool:
        """Whether the pipeline can leave out the text encoder's last layers."""
        return hasattr(self.pipeline.text_encoder, "text_model")

    def is_guided(self, spec: ImageSpec) -> bool:
        return spec.guidance_scale > 1.0 and not self.is_distilled

    def encode_text(self, text: str, spec: ImageSpec) -> Inputs:
        embeds, _ = self.pipeline.encode_prompt([text], self.device, 1, False, clip_skip=spec.clip_skip)
        return {"encoder_hidden_states": embeds}

    def noise_shape(self, spec: ImageSpec) -> tuple[int, ...]:
        channels = self.denoiser.config.in_channels
        return (channels, spec.height // self.vae_scale, spec.width // self.vae_scale)

    def inputs(self, state: ImageState, branch: str) -> Inputs:
        """A distilled UNet is told the guidance scale."""
        found = super().inputs(state, branch)
        if self.is_distilled:
            scale = torch.full((state.num_images,), state.spec.guidance_scale - 1.0)
            dim = self.denoiser.config.time_cond_proj_dim
            found["timestep_cond"] = self.pipeline.get_guidance_scale_embedding(scale, embedding_dim=dim)
        return found

    def forward(self, inputs: Inputs, expert: str) -> Tensor:
        condition = inputs.get("timestep_cond")
        answer: Tensor = self.denoiser(
            inputs["sample"].to(self.dtype),
            inputs["timestep"],
            encoder_hidden_states=inputs["encoder_hidden_states"],
            timestep_cond=None if condition is None else condition.to(self.device, self.dtype),
            added_cond_kwargs=self.added(inputs),
            return_dict=False,
        )[0]
        return answer.float()

    def added(self, inputs: Inputs) -> dict[str, Any] | None:
        """Return the UNet's further conditions."""
        return None

    def combine(self, state: ImageState, outputs: dict[str, Tensor]) -> Tensor:
        """Rescale as arXiv:2305.08891, section 3.4, where it was asked for."""
        noise_pred = super().combine(state, outputs)
        share = state.spec.guidance_rescale
        if UNCOND not in outputs or share <= 0.0:
            return noise_pred
        dims = list(range(1, noise_pred.dim()))
        ratio = outputs[COND].std(dim=dims) / noise_pred.std(dim=dims)
        rescaled = noise_pred * per_row(ratio, noise_pred)
        return share * rescaled + (1 - share) * noise_pred
