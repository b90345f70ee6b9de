"""The limits of one engine, resolved once at start."""

from __future__ import annotations

import msgspec

from sfumato.errors import ConfigError

POLICIES = ("separate", "mixed")
ORDERS = ("fair", "shortest")


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a step and an engine may hold.

    policy: "separate" runs prefill rows or denoise rows in one forward, "mixed" both.
    order: "fair" runs every request in every step while the budgets last, "shortest" those first that have
    least left to do, in steps no larger than throughput asks for.
    denoise_every: with prefill work always waiting, at least every so many steps denoises.
    max_prefill_tokens: prompt tokens per forward. max_step_tokens: denoise tokens per forward.
    max_logits_bytes: rows x open positions x vocabulary x 4 per forward.
    max_step_rows, max_latent_bytes: images' rows (each branch of each image is one) and their latents per
    forward. max_wait_seconds: a request that waited so long goes first and lets nobody pass.
    """

    policy: str = "separate"
    order: str = "fair"
    max_running_requests: int = 64
    max_prefill_tokens: int = 2048
    max_step_tokens: int = 16384
    max_logits_bytes: int = 1 << 30
    max_step_rows: int = 32
    max_latent_bytes: int = 256 << 20
    denoise_every: int = 4
    max_wait_seconds: float = 30.0

    def check(self) -> None:
        """Raise ConfigError naming the option."""
        if self.policy not in POLICIES:
            raise ConfigError(f"--policy {self.policy!r} is not one of {', '.join(POLICIES)}")
        if self.order not in ORDERS:
            raise ConfigError(f"--order {self.order!r} is not one of {', '.join(ORDERS)}")
        for name in (
            "max_running_requests",
            "max_prefill_tokens",
            "max_step_tokens",
            "max_logits_bytes",
            "max_step_rows",
            "max_latent_bytes",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if self.denoise_every < 1:
            raise ConfigError(f"--denoise-every {self.denoise_every} must be at least 1")
