"""Kernels over rows of logits; `models/kernels` says where they run."""
