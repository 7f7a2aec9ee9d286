"""The version of the numbers that this package computes."""

from __future__ import annotations

VERSION = 18
"""Version of the rules that turn a model and settings into weights.

Raise it by one in every change after which the same model, settings and GHN give other weights: another rule for the
scale, another draw, another reading of graphs, another order of sums that changes the last bits. Leave it alone where
the weights stay the same to the bit. The version is part of the provenance of a model, of the keys of the cache and of
the description of weights on the Hub, so that weights of another version are never taken for those of this one.
"""
