"""Post-processing: noise, then orthogonalization, of the later layers of a network (arXiv 2207.10049).

`layers` says which weights are concerned, `noise` is Eq. 1, `orthogonal` is Eq. 2, and `run` applies both.
"""

from timm_ghn.orthogonalization.layers import (
    WeightLayer,
    classifier_prefixes,
    default_start_layer,
    is_pointwise,
    kept_parameters,
    resolve_start_layer,
    weight_layers,
)
from timm_ghn.orthogonalization.noise import correlation_std
from timm_ghn.orthogonalization.orthogonal import orthogonal_factor
from timm_ghn.orthogonalization.run import (
    PostProcess,
    orthogonalize_,
    postprocess_many,
    postprocess_tensor,
    selected_layers,
    single_threaded,
)

__all__ = [
    "PostProcess",
    "WeightLayer",
    "classifier_prefixes",
    "correlation_std",
    "default_start_layer",
    "is_pointwise",
    "kept_parameters",
    "orthogonal_factor",
    "orthogonalize_",
    "postprocess_many",
    "postprocess_tensor",
    "resolve_start_layer",
    "selected_layers",
    "single_threaded",
    "weight_layers",
]
