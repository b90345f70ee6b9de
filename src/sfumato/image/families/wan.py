"""Wan: short videos from text, one or two denoisers by noise level."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from sfumato.core.spec import ImageSpec
from sfumato.core.traits import ImageTraits
from sfumato.errors import CheckpointError, NotSupported, RequestError
from sfumato.image.families.protocol import Family
from sfumato.image.families.qwen_image import whitened
from sfumato.image.state import COND, UNCOND, ImageState, Inputs


class Wan(Family):
    """Wan 2.1 and 2.2, text to video. Causal video denoising is another pipeline and refused by name."""

    name = "wan"
    sets_begin_index = True
    is_video = True
    fields: ClassVar[frozenset[str]] = frozenset(
        {"negative_prompt", "guidance_scale", "guidance_scale_2", "max_sequence_length", "num_frames"}
    )

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        if pipeline.config.expand_timesteps:
            raise CheckpointError("Wan with a timestep per token (expand_timesteps) is not supported")

    @property
    def denoiser(self) -> Any:
        first = self.pipeline.transformer
        return self.pipeline.transformer_2 if first is None else first

    @property
    def default_size(self) -> tuple[int, int]:
        return 480, 832

    @property
    def vae_scale(self) -> int:
        return int(self.pipeline.vae_scale_factor_spatial)

    @property
    def size_unit(self) -> int:
        """The pipeline asks for 16 pixels, and its patches for two latents."""
        return max(16, self.vae_scale * int(self.denoiser.config.patch_size[1]))

    @property
    def frames_unit(self) -> int:
        """Return how many frames a latent frame stands for; the first one stands for one."""
        return int(self.pipeline.vae_scale_factor_temporal)

    def traits(self) -> ImageTraits:
        from msgspec.structs import replace

        return replace(super().traits(), default_num_frames=81, frames_unit=self.frames_unit)

    def check(self, spec: ImageSpec) -> None:
        """Frames come in whole latent frames."""
        unit = self.frames_unit
        if spec.num_frames % unit != 1 and spec.num_frames != 1:
            below = max(1, (spec.num_frames - 1) // unit * unit + 1)
            raise RequestError(
                f"num_frames {spec.num_frames} must be one more than a multiple of {unit}, "
                f"such as {below} or {below + unit}",
                field="num_frames",
                value=spec.num_frames,
                limit=unit,
            )
        if spec.guidance_scale_2 is not None and self.pipeline.config.boundary_ratio is None:
            raise NotSupported(
                "guidance_scale_2 needs a pipeline with two denoisers",
                field="guidance_scale_2",
                value=spec.guidance_scale_2,
            )

    def encode_text(self, text: str, spec: ImageSpec) -> Inputs:
        embeds, _ = self.pipeline.encode_prompt(
            [text],
            do_classifier_free_guidance=False,
            max_sequence_length=spec.max_sequence_length,
            device=self.device,
        )
        return {"encoder_hidden_states": embeds.to(self.dtype)}

    def noise_shape(self, spec: ImageSpec) -> tuple[int, ...]:
        frames = (spec.num_frames - 1) // self.frames_unit + 1
        return (
            self.denoiser.config.in_channels,
            frames,
            spec.height // self.vae_scale,
            spec.width // self.vae_scale,
        )

    def is_low(self, state: ImageState) -> bool:
        """Whether the next step is the low-noise denoiser's."""
        ratio = self.pipeline.config.boundary_ratio
        if ratio is None:
            return False
        return bool(state.timestep < ratio * state.timestep_scheduler.config.num_train_timesteps)

    def expert(self, state: ImageState) -> str:
        return "transformer_2" if self.is_low(state) else "transformer"

    def forward(self, inputs: Inputs, expert: str) -> Tensor:
        model = getattr(self.pipeline, expert)
        answer: Tensor = model(
            hidden_states=inputs["sample"].to(self.dtype),
            timestep=inputs["timestep"],
            encoder_hidden_states=inputs["encoder_hidden_states"],
            return_dict=False,
        )[0]
        return answer.float()

    def combine(self, state: ImageState, outputs: dict[str, Tensor]) -> Tensor:
        if UNCOND not in outputs:
            return outputs[COND]
        second = state.spec.guidance_scale_2
        scale = second if second is not None and self.is_low(state) else state.spec.guidance_scale
        return outputs[UNCOND] + scale * (outputs[COND] - outputs[UNCOND])

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        video = vae.decode(whitened(vae, latents).to(self.vae_dtype), return_dict=False)[0]
        shown: Tensor = (video.float() / 2 + 0.5).clamp(0, 1)
        return shown.permute(0, 2, 1, 3, 4)
