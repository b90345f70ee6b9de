"""Images: families, stages, and the laws of their engine."""
