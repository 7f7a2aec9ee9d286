"""A network with the weights that a run starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
from timm.models import load_state_dict
from torch import Tensor, nn

from timm_ghn.errors import FineTuneError
from timm_ghn.finetune.config import PRETRAINED, FineTuneConfig
from timm_ghn.finetune.stem import adjust_stem
from timm_ghn.ghn import content_hash, default_ghn, load_ghn
from timm_ghn.initialize.in_memory import init_model
from timm_ghn.orthogonalization import classifier_prefixes
from timm_ghn.seeding import derived_seed, seeded
from timm_ghn.settings import METHODS, Init, Source
from timm_ghn.storage.paths import file_sha256


@dataclass(frozen=True, eq=False)
class Network:
    """A network before its first step.

    Attributes:
        module: The network, on the CPU.
        stem: What was changed in its first layers.
        provenance: What its weights come from, JSON-compatible.
    """

    module: nn.Module
    stem: str
    provenance: Mapping[str, Any]


def build_network(config: FineTuneConfig, num_classes: int, seed: int, images: Tensor | None = None) -> Network:
    """Create a timm model, adjust its stem, and give it the weights that the settings ask for.

    The stem comes first, so that weights are predicted for the network that is trained. The global random state stays.

    Args:
        config: Settings.
        num_classes: Classes of the new classifier.
        seed: Seed of whatever is drawn.
        images: Normalized training images (B, 3, H, W) for initializations that look at data.

    Raises:
        FineTuneError: If the model cannot be created or the file of weights does not fit.
        InitError, CaptureError, GraphError: As `init_model`.
    """
    with seeded(derived_seed("fine-tuning network", seed)):
        model = _create(config, num_classes)
    if config.init_file is not None:
        _load_file(model, config.init_file)
    size = (int(config.model_kwargs.get("in_chans", 3)), config.image_size, config.image_size)
    stem = adjust_stem(model, size) if config.adjusts_stem else "original"
    provenance: Mapping[str, Any] = {"method": config.starts_from}
    if config.init != PRETRAINED and config.init_file is None and METHODS[config.init].source is not Source.TIMM:
        chosen = {"ghn": config.ghn, "noise": config.noise, "start_layer": config.start_layer}
        settings: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
        init = Init(config.init, seed=seed, rescale=config.rescale, cache=False, **settings)
        report = init_model(model, init, input_size=size, example_input=images)
        provenance = report.provenance
    return Network(model, stem, provenance)


def weights_digest(config: FineTuneConfig) -> str:
    """Hash of the GHN or of the file that the weights come from, which the settings name without its content.

    Raises:
        FineTuneError: If the file cannot be read.
        CheckpointError, UnknownGhnError, DownloadError: If the GHN cannot be loaded.
    """
    if config.init_file is not None:
        try:
            return file_sha256(config.init_file)
        except OSError as error:
            raise FineTuneError(f"--init-file {config.init_file} cannot be read: {error.strerror}") from error
    if config.init == PRETRAINED or METHODS[config.init].source is not Source.GHN:
        return ""
    return content_hash(load_ghn(config.ghn, shared=True) if config.ghn is not None else default_ghn(shared=True))


def _create(config: FineTuneConfig, num_classes: int) -> nn.Module:
    if not timm.is_model(config.model.partition(".")[0]) and ":" not in config.model:
        raise FineTuneError(f"timm has no model {config.model!r}")
    pretrained = config.init == PRETRAINED and config.init_file is None
    try:
        model: nn.Module = timm.create_model(
            config.model, pretrained=pretrained, num_classes=num_classes, **config.model_kwargs
        )
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        hint = "; --init-file takes downloaded weights" if pretrained else ""
        raise FineTuneError(f"{config.model} cannot be created: {' '.join(str(error).split())}{hint}") from error
    return model


def _load_file(model: nn.Module, path: str) -> None:
    """Load weights; a classifier of another number of classes stays new.

    Raises:
        FineTuneError: If the file cannot be read, or lacks a weight, or one has another shape.
    """
    try:
        state: Mapping[str, Tensor] = load_state_dict(path, use_ema=False, weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise FineTuneError(f"--init-file {path} cannot be read: {error}") from error
    own, head = model.state_dict(), classifier_prefixes(model)
    fitting = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    for name in own.keys() - fitting.keys():
        if not name.startswith(head):
            raise FineTuneError(f"--init-file {path} does not fit the model: {name} is missing or has another shape")
    model.load_state_dict(fitting, strict=False)
