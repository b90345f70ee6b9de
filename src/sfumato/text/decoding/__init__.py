"""Published decoding algorithms, one file each, as frozen values without mutable attributes."""
