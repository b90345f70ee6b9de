"""Where log lines of a deployment go: into the files of Ray Serve's replicas, with its own lines."""

from __future__ import annotations

import logging

_OURS, _RAYS = "sfumato", "ray.serve"


def join_logs() -> None:
    """Let this process's lines take Ray Serve's handlers: its files, its form, its ids beside ours."""
    ours, rays = logging.getLogger(_OURS), logging.getLogger(_RAYS)
    ours.handlers = list(rays.handlers)
    ours.setLevel(rays.level)
    ours.propagate = False
