"""Text requests: canvases, decoding algorithms, the statistics they need, and the runner of their steps."""
