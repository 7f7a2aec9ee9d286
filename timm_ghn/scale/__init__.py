"""The scale of predicted parameters."""
