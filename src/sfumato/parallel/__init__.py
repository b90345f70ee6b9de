"""Several processes that serve one model: how they meet, what they say to each other, how they end."""
