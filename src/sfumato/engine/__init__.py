"""The event loop, the scheduler and the ways to start an engine."""
