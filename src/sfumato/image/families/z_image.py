"""Z-Image: rows of any text length; guidance that ends early and is bounded in norm."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.core.spec import ImageSpec
from sfumato.image.families.protocol import Family, shift_of
from sfumato.image.schedule import plan
from sfumato.image.state import COND, UNCOND, ImageState, Inputs

_DEFAULT_PIXELS = 1024


class ZImage(Family):
    """Z-Image and Z-Image-Turbo."""

    name = "z-image"
    masks_text = True
    sets_begin_index = True
    packed_area = 4
    fields: ClassVar[frozenset[str]] = frozenset(
        {"negative_prompt", "guidance_scale", "cfg_truncation", "cfg_normalization", "max_sequence_length"}
    )

    @property
    def default_size(self) -> tuple[int, int]:
        return _DEFAULT_PIXELS, _DEFAULT_PIXELS

    @property
    def size_unit(self) -> int:
        return self.vae_scale * 2

    def is_guided(self, spec: ImageSpec) -> bool:
        """Scales count from 0 here: the conditional answer alone is scale 0."""
        return spec.guidance_scale > 0.0

    def encode_text(self, text: str, spec: ImageSpec) -> Inputs:
        embeds, _ = self.pipeline.encode_prompt(
            [text],
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=spec.max_sequence_length,
        )
        return {"cap_feats": embeds}

    def noise_shape(self, spec: ImageSpec) -> tuple[int, ...]:
        unit = self.vae_scale * 2
        return (self.denoiser.in_channels, 2 * (spec.height // unit), 2 * (spec.width // unit))

    def plan_schedule(self, scheduler: Any, spec: ImageSpec) -> None:
        """Sigmas fall evenly in float32; the shift counts where the schedule is dynamic."""
        _, height, width = self.noise_shape(spec)
        num_steps = spec.num_inference_steps
        sigmas = torch.linspace(1.0, 1 / num_steps, num_steps).tolist()
        plan(scheduler, spec, sigmas=sigmas, mu=shift_of(scheduler, (height // 2) * (width // 2)))

    def branches(self, state: ImageState) -> tuple[str, ...]:
        """Late steps, nearer to the image than cfg_truncation, are not guided."""
        is_late = float(self.times(state)[0]) > state.spec.cfg_truncation
        if UNCOND not in state.conditioning or (is_late and state.spec.cfg_truncation <= 1.0):
            return (COND,)
        return (COND, UNCOND)

    def times(self, state: ImageState) -> Tensor:
        return (1000 - super().times(state)) / 1000

    def forward(self, inputs: Inputs, expert: str) -> Tensor:
        samples = list(inputs["sample"].to(self.dtype).unsqueeze(2).unbind(0))
        answers = self.denoiser(samples, inputs["timestep"], inputs["cap_feats"], return_dict=False)[0]
        return torch.stack([answer.float() for answer in answers]).squeeze(2)

    def combine(self, state: ImageState, outputs: dict[str, Tensor]) -> Tensor:
        """Each image's norm may be at most cfg_normalization times the conditional one's; 0 is no bound."""
        cond = outputs[COND]
        if UNCOND not in outputs:
            return -cond
        guided = cond + state.spec.guidance_scale * (cond - outputs[UNCOND])
        bound = state.spec.cfg_normalization
        if bound <= 0.0:
            return -guided
        return -torch.stack(
            [_bounded(one, bound * torch.linalg.vector_norm(c)) for one, c in zip(guided, cond, strict=True)]
        )


def _bounded(tensor: Tensor, longest: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(tensor)
    return tensor * (longest / norm) if norm > longest else tensor
