"""Own the scores of a model: how many held-out prompts it draws right."""

from collections import Counter

from recipes.image.model import Painter
from recipes.image.sample import DEFAULT_GUIDANCE, DEFAULT_STEPS, SHIFT, sample
from recipes.image.scenes import draw_held_out_scenes
from recipes.image.scorer import fault
from recipes.image.wording import plain_prompt

GROUPS = {"one_object": 1, "two_objects": 2}
PROMPTS_PER_BATCH = 50


def score_groups(
    painter: Painter,
    num_prompts: int,
    seed: int,
    num_steps: int = DEFAULT_STEPS,
    guidance: float = DEFAULT_GUIDANCE,
    shift: float = SHIFT,
) -> dict[str, dict[str, int]]:
    """Draw held-out prompts of each group once; returns prompts, correct ones and counts of each fault."""
    scores = {}
    for group, num_things in GROUPS.items():
        scenes = draw_held_out_scenes(num_things, num_prompts, seed)
        faults: Counter[str] = Counter()
        for first in range(0, num_prompts, PROMPTS_PER_BATCH):
            part = scenes[first : first + PROMPTS_PER_BATCH]
            prompts = [plain_prompt(scene) for scene in part]
            pictures = sample(
                painter, prompts, seed=seed + first, num_steps=num_steps, guidance=guidance, shift=shift
            )
            names = (fault(picture, scene) for picture, scene in zip(pictures, part, strict=True))
            faults.update(name or "correct" for name in names)
        scores[group] = {"prompts": num_prompts, "correct": faults.pop("correct", 0), **faults}
    return scores
