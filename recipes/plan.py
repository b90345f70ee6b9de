"""Own every choice that differs between the two tiny models, and the training schedule they share."""

from dataclasses import dataclass
from pathlib import Path

CACHE = Path(".cache/recipes")
LOGS = Path("recipes/logs")
IMAGES = Path("docs/images")
TOKENIZER = CACHE / "tokenizer.json"


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

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def zoo_folder(self) -> Path:
        return Path("src/sfumato/zoo") / self.model_name

    @property
    def state_path(self) -> Path:
        return CACHE / f"{self.name}.pt"

    @property
    def snapshot_path(self) -> Path:
        return CACHE / f"{self.name}-snapshot.pt"


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
    "llada": Plan(
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
    ),
}
