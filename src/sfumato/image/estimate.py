"""The picture that a denoise step says the request would end at, for previews: no sampler steps from it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sfumato.image.schedule import is_flow


def estimated(scheduler: Any, result: Any, sample: Tensor, noise_pred: Tensor, timestep: Tensor) -> Tensor:
    """Return the estimate f32[N, ...] of what is behind the noise of a sample.

    result: what the scheduler's step returned; most know the estimate. For the others it follows from the
    model's answer and the noise level: of a flow (arXiv:2209.03003), else of a schedule that keeps the
    variance (arXiv:2010.02502, eq. 9; v-prediction: arXiv:2202.00512, appendix D).
    """
    for name in ("pred_original_sample", "denoised"):
        known: Tensor | None = result.get(name)
        if known is not None:
            return known
    config = scheduler.config
    if is_flow(scheduler):
        sigma: Tensor = timestep.float() / config.num_train_timesteps
        return sample - sigma * noise_pred
    kept: Tensor = scheduler.alphas_cumprod[timestep.long()].to(sample)
    match config.prediction_type:
        case "epsilon":
            return (sample - (1 - kept).sqrt() * noise_pred) / kept.sqrt()
        case "v_prediction":
            return kept.sqrt() * sample - (1 - kept).sqrt() * noise_pred
        case _:
            return noise_pred
