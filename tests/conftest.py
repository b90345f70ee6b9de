"""Shared test settings: one thread, so that small models are not slowed down by handing work around."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
