"""Weights on disk: safetensors files, folders that plain timm loads, and the cache."""
