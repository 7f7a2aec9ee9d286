"""The state of an installation, and how much of a model of timm a GHN predicts."""
