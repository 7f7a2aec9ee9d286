"""What works for a model of timm, how well, and how long it takes: one model, or all of them in parallel."""
