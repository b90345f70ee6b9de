"""The web page at `/`: watch models denoise."""
