"""Own the training batches: pictures, prompts as token ids, noise levels."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.image.model import DEFAULT_NUM_ZEROS
from recipes.image.plan import ImagePlan
from recipes.image.render import draw_layout, render
from recipes.image.scenes import draw_training_scene
from recipes.image.tokenizer import PromptTokens
from recipes.image.wording import draw_prompt


@dataclass(frozen=True)
class Batch:
    """pictures (in [-1, 1]), noise: f32[B, 3, S, S]; token_ids: i64[B, T]; sigma, num_zeros: f32[B]."""

    pictures: Tensor
    token_ids: Tensor
    noise: Tensor
    sigma: Tensor
    num_zeros: Tensor


def draw_batch(plan: ImagePlan, step: int, tokens: PromptTokens) -> Batch:
    """Draw the batch of one training step; it depends on the seed and the step alone."""
    random_source = random.Random(f"image {plan.seed} {step}")
    scenes = [draw_training_scene(random_source) for _ in range(plan.batch_size)]
    pictures = render(scenes, [draw_layout(random_source, scene) for scene in scenes]) * 2 - 1
    prompts = [
        "" if random_source.random() < plan.empty_share else draw_prompt(random_source, scene)
        for scene in scenes
    ]
    generator = torch.Generator().manual_seed(random_source.getrandbits(60))
    spread = torch.randn(len(scenes), generator=generator) * plan.noise_spread
    return Batch(
        pictures=pictures,
        token_ids=torch.tensor([tokens.encode(prompt) for prompt in prompts]),
        noise=torch.randn(pictures.shape, generator=generator),
        sigma=torch.sigmoid(plan.noise_mean + spread),
        num_zeros=torch.tensor([_draw_num_zeros(random_source) for _ in scenes]),
    )


def _draw_num_zeros(random_source: random.Random) -> float:
    """Draw how many zeros stand for the absent encoder, so that the model works with any number of them."""
    lot = random_source.random()
    if lot < 0.1:
        return 0.0
    return float(DEFAULT_NUM_ZEROS) if lot < 0.4 else DEFAULT_NUM_ZEROS ** random_source.random()
