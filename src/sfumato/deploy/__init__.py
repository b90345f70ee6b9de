"""Sfumato on Ray: placement, membership, health and scaling are Ray's; here is what diffusion adds to it."""
