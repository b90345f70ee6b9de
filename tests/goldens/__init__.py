"""Replays folders of golden cases through the engine's own loop."""
