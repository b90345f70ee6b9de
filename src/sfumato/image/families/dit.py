"""DiT: images of a class, no text; the timestep scheduler steps both branches, as the reference does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from msgspec.structs import replace as changed
from torch import Tensor

from sfumato.core.spec import ImageSpec
from sfumato.core.traits import ImageTraits
from sfumato.errors import RequestError
from sfumato.image.families.protocol import Encode, Family
from sfumato.image.state import COND, UNCOND, ImageState, Inputs


class DiT(Family):
    """Class-conditional DiT; the last class is the unconditional one."""

    name = "dit"
    default_guidance = 4.0
    max_sequence_length = 1
    fields: ClassVar[frozenset[str]] = frozenset({"class_labels", "guidance_scale"})

    @property
    def vae_scale(self) -> int:
        return int(2 ** (len(self.pipeline.vae.config.block_out_channels) - 1))

    @property
    def default_size(self) -> tuple[int, int]:
        size = self.denoiser.config.sample_size * self.vae_scale
        return size, size

    @property
    def size_unit(self) -> int:
        """Its position embeddings are those of one size."""
        return self.default_size[0]

    @property
    def num_classes(self) -> int:
        """Return how many classes there are without the unconditional one."""
        return int(self.denoiser.config.num_embeds_ada_norm)

    def traits(self) -> ImageTraits:
        return changed(super().traits(), num_classes=self.num_classes, has_text=False)

    def check(self, spec: ImageSpec) -> None:
        """Labels instead of prompts."""
        if any(spec.prompts):
            raise RequestError(
                "this model draws classes: give class_labels instead of a prompt",
                field="prompt",
                value=spec.prompts[0],
            )
        for label in spec.class_labels:
            if not 0 <= label < self.num_classes:
                raise RequestError(
                    f"class label {label} is not between 0 and {self.num_classes - 1}",
                    field="class_labels",
                    value=label,
                    limit=self.num_classes - 1,
                )

    def check_size(self, spec: ImageSpec) -> None:
        """There is one."""
        for field, pixels in (("height", spec.height), ("width", spec.width)):
            if pixels != self.size_unit:
                raise RequestError(
                    f"{field} {pixels}: this model draws {self.size_unit} pixels only",
                    field=field,
                    value=pixels,
                    limit=self.size_unit,
                )

    def warm_up(self) -> None:
        """There is no text."""

    def encode_text(self, text: str, spec: ImageSpec) -> Inputs:
        raise RequestError("this model takes no text", field="prompt", value=text)

    def conditioning(self, spec: ImageSpec, encode: Encode) -> dict[str, Inputs]:
        """The label of each image, and the unconditional one."""
        labels = torch.tensor(spec.class_labels, device=self.device)
        found: dict[str, Inputs] = {COND: {"class_labels": labels}}
        if self.is_guided(spec):
            found[UNCOND] = {"class_labels": torch.full_like(labels, self.num_classes)}
        return found

    def noise_shape(self, spec: ImageSpec) -> tuple[int, ...]:
        config = self.denoiser.config
        return (config.in_channels, config.sample_size, config.sample_size)

    def forward(self, inputs: Inputs, expert: str) -> Tensor:
        answer: Tensor = self.denoiser(
            inputs["sample"].to(self.dtype),
            timestep=inputs["timestep"].long(),
            class_labels=inputs["class_labels"],
        ).sample
        return answer.float()

    def num_stepped(self, state: ImageState) -> int:
        return state.num_images * len(self.branches(state))

    def combine(self, state: ImageState, outputs: dict[str, Tensor]) -> Tensor:
        """The noise alone is guided and stepped; a learned variance is left out."""
        channels = self.denoiser.config.in_channels
        return super().combine(state, {name: answer[:, :channels] for name, answer in outputs.items()})

    def step(self, state: ImageState, noise_pred: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Both branches are stepped, so that a scheduler that draws noise draws as often as the reference."""
        if UNCOND not in state.conditioning:
            return super().step(state, noise_pred, arguments)
        assert state.latents is not None
        both = torch.cat([state.latents, state.latents])
        latents, estimate = super().step(
            replace(state, latents=both), torch.cat([noise_pred, noise_pred]), arguments
        )
        return latents[: state.num_images], estimate[: state.num_images]
