"""Post-processing: noise, then orthogonalization, of the later layers of a network (arXiv 2207.10049).

`layers` says which weights are concerned, `noise` is Eq. 1, `orthogonal` is Eq. 2, and `run` applies both.
"""

from timm_ghn.orthogonalization.layers import (
    WeightLayer,
    classifier_prefixes,
    kept_parameters,
    resolve_start_layer,
    weight_layers,
)
from timm_ghn.orthogonalization.run import (
    PostProcess,
    orthogonalize_,
    postprocess_many,
    postprocess_tensor,
    selected_layers,
)

__all__ = [
    "PostProcess",
    "WeightLayer",
    "classifier_prefixes",
    "kept_parameters",
    "orthogonalize_",
    "postprocess_many",
    "postprocess_tensor",
    "resolve_start_layer",
    "selected_layers",
    "weight_layers",
]
