"""Own every choice that differs between the tiny models, and the training schedule they share."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(".cache/recipes")
LOGS = Path("recipes/logs")
IMAGES = Path("docs/images")
TOKENIZER = CACHE / "tokenizer.json"


@dataclass(frozen=True)
class Distillation:
    """What a student learns from its teacher: trajectories, and the states taken from them.

    steps_per_canvas: forwards in which the teacher decides a canvas. Window (positions) and noise (the
    largest masked share of it) grow linearly over the first `ramp_share` of the tokens. entropy_weight: of
    the entropy at positions that the student has right.
    """

    teacher: str
    num_prompts: int = 8192
    canvas_length: int = 32
    steps_per_canvas: int = 16
    first_window: int = 8
    last_window: int = 32
    first_noise: float = 0.3
    last_noise: float = 1.0
    ramp_share: float = 0.5
    entropy_weight: float = 0.1


@dataclass(frozen=True)
class Plan:
    """Shape, noise pattern and schedule of one model; lengths in tokens."""

    name: str
    model_name: str
    has_qk_norm: bool
    block_length: int
    is_block_causal: bool
    rms_eps: float
    rope_theta: float
    bucket_lengths: tuple[int, ...]
    vocab_size: int = 720
    width: int = 192
    num_layers: int = 6
    num_heads: int = 6
    ff_width: int = 512
    tokens_per_batch: int = 4096
    token_budget: int = 30_000_000
    learning_rate: float = 2e-3
    final_learning_rate: float = 5e-5
    warmup_steps: int = 200
    # The last part of the budget, in which the learning rate falls linearly.
    decay_share: float = 0.3
    weight_decay: float = 0.05
    ema_decay: float = 0.998
    tokens_per_evaluation: int = 3_000_000
    seconds_per_save: float = 180.0
    seed: int = 1
    # Another plan whose snapshot this one starts from, and the tokens after which a plan leaves its snapshot.
    starts_from: str | None = None
    snapshot_tokens: int | None = None
    # Set for a student, which starts from its teacher's exported weights.
    distillation: Distillation | None = None

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def zoo_folder(self) -> Path:
        return Path("src/sfumato/zoo") / self.model_name

    @property
    def tokenizer_path(self) -> Path:
        """Return tokenizer.json: a student's is its teacher's."""
        if self.distillation is None:
            return TOKENIZER
        return PLANS[self.distillation.teacher].zoo_folder / "tokenizer.json"

    @property
    def trajectory_folder(self) -> Path:
        return CACHE / f"{self.name}-trajectories"

    @property
    def state_path(self) -> Path:
        return CACHE / f"{self.name}.pt"

    @property
    def snapshot_path(self) -> Path:
        return CACHE / f"{self.name}-snapshot.pt"


LLADA = Plan(
    name="llada",
    model_name="sfumato-tiny-llada",
    has_qk_norm=False,
    block_length=32,
    is_block_causal=False,
    rms_eps=1e-5,
    rope_theta=10_000.0,
    bucket_lengths=(48, 64, 80, 96, 128, 192, 256),
    token_budget=29_000_000,
    learning_rate=1.5e-3,
    starts_from="sdar",
)

PLANS = {
    "sdar": Plan(
        name="sdar",
        model_name="sfumato-tiny-sdar",
        has_qk_norm=True,
        block_length=16,
        is_block_causal=True,
        rms_eps=1e-6,
        rope_theta=10_000.0,
        bucket_lengths=(64, 96, 128, 144, 160, 192, 256, 320),
        snapshot_tokens=9_000_000,
    ),
    "llada": LLADA,
    "llada-fast": dataclasses.replace(
        LLADA,
        name="llada-fast",
        model_name="sfumato-tiny-llada-fast",
        token_budget=4_000_000,
        learning_rate=4e-4,
        final_learning_rate=2e-5,
        warmup_steps=50,
        weight_decay=0.0,
        ema_decay=0.995,
        tokens_per_evaluation=1_000_000,
        starts_from=None,
        distillation=Distillation(teacher="llada"),
    ),
}
