"""Model classes with the names of real checkpoints, and how their weights are read."""
