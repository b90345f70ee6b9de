"""Ranks that hold one model together: how they meet, what they say to each other, how they end."""
