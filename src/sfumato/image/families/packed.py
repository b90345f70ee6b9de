"""Families whose latents are packed, two by two a token, and guided truly by a negative prompt on request."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sfumato.core.spec import ImageSpec
from sfumato.errors import RequestError
from sfumato.image.families.protocol import Family, falling_sigmas, shift_of
from sfumato.image.schedule import plan
from sfumato.image.state import ImageState

# As the pipelines, whatever a checkpoint says: 128 latents along an edge.
_DEFAULT_LATENTS = 128


class Packed(Family):
    """What Flux and Qwen-Image have in common: tokens, sigmas, shift, true guidance."""

    sets_begin_index = True
    packed_area = 4

    @property
    def default_size(self) -> tuple[int, int]:
        return _DEFAULT_LATENTS * self.vae_scale, _DEFAULT_LATENTS * self.vae_scale

    @property
    def size_unit(self) -> int:
        return self.vae_scale * 2

    @property
    def num_channels(self) -> int:
        """Return the channels of a latent; a token has four latents."""
        return int(self.denoiser.config.in_channels) // 4

    def is_guided(self, spec: ImageSpec) -> bool:
        """True guidance needs a negative prompt, as in the pipelines."""
        return spec.true_cfg_scale > 1.0 and spec.negative_prompts is not None

    def check(self, spec: ImageSpec) -> None:
        """A scale that was asked for, and would do nothing, is refused."""
        is_asked = spec.true_cfg_scale not in (1.0, self.default_true_cfg)
        if is_asked and spec.negative_prompts is None:
            raise RequestError(
                f"true_cfg_scale {spec.true_cfg_scale} needs a negative_prompt",
                field="true_cfg_scale",
                value=spec.true_cfg_scale,
            )

    def edges(self, spec: ImageSpec) -> tuple[int, int]:
        """Return the latents along both edges."""
        return 2 * (spec.height // self.size_unit), 2 * (spec.width // self.size_unit)

    def plan_schedule(self, scheduler: Any, spec: ImageSpec) -> None:
        """Sigmas fall evenly, shifted by the number of image tokens."""
        height, width = self.edges(spec)
        mu = shift_of(scheduler, (height // 2) * (width // 2))
        plan(scheduler, spec, sigmas=falling_sigmas(spec.num_inference_steps), mu=mu)

    def times(self, state: ImageState) -> Tensor:
        return super().times(state) / 1000


def packed(latents: Tensor) -> Tensor:
    """Return [N, C, H, W] as [N, H/2 W/2, 4C]."""
    num, channels, height, width = latents.shape
    cut = latents.reshape(num, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(num, (height // 2) * (width // 2), channels * 4)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return [N, H/2 W/2, 4C] as [N, C, H, W]."""
    num, _, channels = tokens.shape
    cut = tokens.reshape(num, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cut.reshape(num, channels // 4, height, width)
