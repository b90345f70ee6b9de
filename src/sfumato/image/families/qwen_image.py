"""Qwen-Image: a language model encodes text, lengths mix in one forward, guidance keeps norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.core.spec import ImageSpec
from sfumato.errors import RequestError
from sfumato.image.families.packed import Packed, packed, unpacked
from sfumato.image.families.protocol import pictures
from sfumato.image.state import COND, UNCOND, ImageState, Inputs


class QwenImage(Packed):
    """Qwen-Image; texts are padded to the longest of a forward and masked."""

    name = "qwen-image"
    masks_text = True
    default_guidance = 1.0
    default_true_cfg = 4.0
    fields: ClassVar[frozenset[str]] = frozenset({"negative_prompt", "true_cfg_scale", "max_sequence_length"})

    def check(self, spec: ImageSpec) -> None:
        """A guidance-distilled checkpoint would need another input."""
        super().check(spec)
        if self.denoiser.config.guidance_embeds:
            raise RequestError("this guidance-distilled checkpoint is not supported", field="model")

    def encode_text(self, text: str, spec: ImageSpec) -> Inputs:
        embeds, _ = self.pipeline.encode_prompt(
            [text], device=self.device, max_sequence_length=spec.max_sequence_length
        )
        return {"encoder_hidden_states": list(embeds)}

    def noise_shape(self, spec: ImageSpec) -> tuple[int, ...]:
        return (1, self.num_channels, *self.edges(spec))

    def pack(self, latents: Tensor) -> Tensor:
        return packed(latents[:, 0])

    def unpack(self, latents: Tensor, spec: ImageSpec) -> Tensor:
        return unpacked(latents, *self.edges(spec))[:, :, None]

    def inputs(self, state: ImageState, branch: str) -> Inputs:
        height, width = self.edges(state.spec)
        shapes = [[(1, height // 2, width // 2)]] * state.num_images
        return {**super().inputs(state, branch), "img_shapes": shapes}

    def forward(self, inputs: Inputs, expert: str) -> Tensor:
        text, mask = padded(inputs["encoder_hidden_states"])
        answer: Tensor = self.denoiser(
            hidden_states=inputs["sample"].to(self.dtype),
            timestep=inputs["timestep"].to(self.dtype),
            encoder_hidden_states_mask=mask,
            encoder_hidden_states=text,
            img_shapes=inputs["img_shapes"],
            return_dict=False,
        )[0]
        return answer.float()

    def combine(self, state: ImageState, outputs: dict[str, Tensor]) -> Tensor:
        """Each token's guided answer keeps the norm of the conditional one."""
        if UNCOND not in outputs:
            return outputs[COND]
        cond, uncond = outputs[COND], outputs[UNCOND]
        guided = uncond + state.spec.true_cfg_scale * (cond - uncond)
        norm = torch.norm(cond, dim=-1, keepdim=True)
        kept: Tensor = guided * (norm / torch.norm(guided, dim=-1, keepdim=True))
        return kept

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        return pictures(vae.decode(whitened(vae, latents).to(self.vae_dtype), return_dict=False)[0][:, :, 0])


def padded(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return [B, T, D] and the mask [B, T] of what is no padding; None where nothing is padded."""
    lengths = [len(text) for text in texts]
    longest = max(lengths)
    if min(lengths) == longest:
        return torch.stack(list(texts)), None
    mask = torch.tensor([[1] * length + [0] * (longest - length) for length in lengths])
    return torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True), mask.to(texts[0].device)


def whitened(vae: Any, latents: Tensor) -> Tensor:
    """Return latents with the mean and deviation that a video VAE was trained on, per channel."""
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents)
    # The reciprocal twice, as the reference rounds.
    inverse = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents)
    return latents / inverse + mean
