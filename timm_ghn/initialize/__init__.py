"""From a model to its parameters: plan, prediction, scale, post-processing, what is reported of it, and its files."""
