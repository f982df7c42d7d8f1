"""Training runs: their config, the loop, what watches it."""
