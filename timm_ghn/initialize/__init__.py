"""From a model to its parameters: plan, prediction, scale, post-processing, and what is reported of it."""
