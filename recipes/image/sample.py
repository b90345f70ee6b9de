"""Own drawing with the model in training form: Euler steps under classifier-free guidance."""

from itertools import pairwise

import torch
from torch import Tensor

from recipes.image.model import DEFAULT_NUM_ZEROS, NUM_CHANNELS, Painter
from recipes.image.render import SIDE
from recipes.image.tokenizer import PromptTokens

DEFAULT_STEPS = 12
DEFAULT_GUIDANCE = 3.0
# Moves the steps towards high noise, where the layout is decided; also the exported scheduler's.
SHIFT = 3.0
NUM_TRAIN_TIMESTEPS = 1000


def noise_levels(num_steps: int, shift: float = SHIFT) -> Tensor:
    """Return f32[num_steps + 1] from 1 to 0, as FlowMatchEulerDiscreteScheduler spaces them.

    The scheduler shifts its smallest level too, before it spaces the steps from 1 to that level.
    """

    def shifted(levels: Tensor) -> Tensor:
        return shift * levels / (1 + (shift - 1) * levels)

    smallest = float(shifted(torch.tensor(1 / NUM_TRAIN_TIMESTEPS)))
    return torch.cat((shifted(torch.linspace(1, smallest, num_steps)), torch.zeros(1)))


@torch.no_grad()
def sample(
    painter: Painter,
    prompts: list[str],
    *,
    seed: int,
    num_steps: int = DEFAULT_STEPS,
    guidance: float = DEFAULT_GUIDANCE,
    shift: float = SHIFT,
) -> Tensor:
    """Draw one picture for each prompt; returns f32[B, 3, S, S] in [0, 1]."""
    tokens = PromptTokens()
    token_ids = torch.tensor([tokens.encode(prompt) for prompt in ("", *prompts)])
    states, pooled = painter.encode(token_ids)
    B = len(prompts)
    states = torch.cat((states[:1].expand(B, -1, -1), states[1:]))
    pooled = torch.cat((pooled[:1].expand(B, -1), pooled[1:]))
    num_zeros = torch.full((2 * B,), float(DEFAULT_NUM_ZEROS))
    latents = torch.randn(B, NUM_CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    levels = noise_levels(num_steps, shift)
    for level, following in pairwise(levels):
        velocity = painter(torch.cat((latents, latents)), level.expand(2 * B), states, pooled, num_zeros)
        without, conditioned = velocity.chunk(2)
        latents = latents + (following - level) * (without + guidance * (conditioned - without))
    return (latents / 2 + 0.5).clamp(0, 1)
