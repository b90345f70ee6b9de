"""Shared test settings: one thread, so that small models are not slowed down by handing work around."""

from __future__ import annotations

import os

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton reads this when it is imported; its kernels then run on tensors of the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    # Triton 3.9 warns where this is not said, and warnings are errors here.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on the GPU where there is one: `-m gpu` chooses it there."""
    if torch.cuda.is_available():
        for item in items:
            if "tests/kernels/" in str(item.path) or item.path.name == "test_graphs.py":
                item.add_marker(pytest.mark.gpu)
