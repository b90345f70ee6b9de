"""Own every number of the image recipe: shape, noise, schedule, paths."""

from dataclasses import dataclass
from pathlib import Path

LOG = Path("recipes/logs/image.jsonl")
SCORES = Path("recipes/logs/image-scores.json")
IMAGES = Path("docs/images")


@dataclass(frozen=True)
class ImagePlan:
    """Shape and schedule of the image model; the schedule's clock is the process's own computing time."""

    model_name: str = "sfumato-tiny-image"
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    patch_size: int = 4
    text_width: int = 64
    text_layers: int = 2
    batch_size: int = 64
    image_budget: int = 1_300_000
    # Seconds of CPU time of all threads; whichever budget is used up first ends the training.
    cpu_seconds_budget: float = 11900.0
    # Of the blocks' matrices (Muon) and of everything else (AdamW).
    matrix_learning_rate: float = 2e-3
    learning_rate: float = 1.5e-3
    # What is left of both at the end of the fall.
    final_share: float = 0.01
    warmup_steps: int = 400
    # The last part of the budget, in which the learning rate falls.
    decay_share: float = 0.45
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    # Share of prompts replaced by the empty one, for classifier-free guidance.
    empty_share: float = 0.1
    # Noise levels are sigmoid(normal(mean, spread)): what is drawn where is decided at high noise.
    noise_mean: float = 0.7
    noise_spread: float = 1.3
    images_per_evaluation: int = 60_000
    seconds_per_save: float = 180.0
    seed: int = 1

    @property
    def zoo_folder(self) -> Path:
        return Path("src/sfumato/zoo") / self.model_name

    @property
    def state_path(self) -> Path:
        return Path(".cache/recipes/image-state.pt")


PLAN = ImagePlan()
