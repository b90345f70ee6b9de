"""Stable Diffusion 3 and 3.5: a joint transformer over two CLIPs and T5, along a flow."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from sfumato.core.spec import ImageSpec
from sfumato.image.families.protocol import Family, shift_of
from sfumato.image.schedule import plan
from sfumato.image.state import Inputs


class StableDiffusion3(Family):
    """SD3's transformer; T5 may be missing, its tokens are then zeros."""

    name = "stable-diffusion-3"
    default_steps = 28
    default_guidance = 7.0
    max_sequence_length = 256
    takes_images = True
    fields: ClassVar[frozenset[str]] = frozenset(
        {"negative_prompt", "guidance_scale", "clip_skip", "max_sequence_length", "strength"}
    )

    @property
    def default_size(self) -> tuple[int, int]:
        size = self.denoiser.config.sample_size * self.vae_scale
        return size, size

    @property
    def size_unit(self) -> int:
        return self.vae_scale * int(self.denoiser.config.patch_size)

    def encode_text(self, text: str, spec: ImageSpec) -> Inputs:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            [text],
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            clip_skip=spec.clip_skip,
            max_sequence_length=spec.max_sequence_length,
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def noise_shape(self, spec: ImageSpec) -> tuple[int, ...]:
        channels = self.denoiser.config.in_channels
        return (channels, spec.height // self.vae_scale, spec.width // self.vae_scale)

    def plan_schedule(self, scheduler: Any, spec: ImageSpec) -> None:
        """Where the schedule shifts with the resolution, the number of tokens says how far."""
        mu = None
        if scheduler.config.get("use_dynamic_shifting"):
            _, height, width = self.noise_shape(spec)
            patch = self.denoiser.config.patch_size
            mu = shift_of(scheduler, (height // patch) * (width // patch), max_shift=1.16)
        plan(scheduler, spec, mu=mu)

    def forward(self, inputs: Inputs, expert: str) -> Tensor:
        answer: Tensor = self.denoiser(
            hidden_states=inputs["sample"].to(self.dtype),
            timestep=inputs["timestep"],
            encoder_hidden_states=inputs["encoder_hidden_states"],
            pooled_projections=inputs["pooled_projections"],
            return_dict=False,
        )[0]
        return answer.float()
