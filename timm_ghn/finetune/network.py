"""A network with the weights that a run starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from timm_ghn.finetune.config import FineTuneConfig
from timm_ghn.initialize.in_memory import init_model
from timm_ghn.seeding import derived_seed, seeded


@dataclass(frozen=True, eq=False)
class Network:
    """A network before its first step.

    Attributes:
        module: The network, on the CPU.
        provenance: What its weights come from, JSON-compatible.
    """

    module: nn.Module
    provenance: Mapping[str, Any]


def build_network(config: FineTuneConfig, num_classes: int, seed: int, images: Tensor | None = None) -> Network:
    """Create a timm model, and give it the weights that the settings ask for. The global random state stays.

    Args:
        config: Settings.
        num_classes: Classes of the new classifier.
        seed: Seed of whatever is drawn.
        images: Normalized training images (B, 3, H, W) for initializations that look at data.

    Raises:
        FineTuneError: If the model cannot be created.
        InitError, CaptureError, GraphError: As `init_model`.
    """
    with seeded(derived_seed("fine-tuning network", seed)):
        model = config.create_model(num_classes)
    init = config.initialization(seed)
    if init is None:
        return Network(model, {"method": config.starts_from})
    size = (int(config.model_kwargs.get("in_chans", 3)), config.image_size, config.image_size)
    return Network(model, init_model(model, init, input_size=size, example_input=images).provenance)
