"""Shared test settings: one thread, so that small models are not slowed down by handing work around."""

from __future__ import annotations

import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton reads this when it is imported; its kernels then run on tensors of the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
