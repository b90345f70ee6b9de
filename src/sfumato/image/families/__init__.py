"""One adapter per model family; everything that differs between them is there."""
