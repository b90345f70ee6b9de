"""Several processes that serve one model: how they reach each other. Knows no request and no scheduler."""
