"""Settings of the paper's runs (arXiv 2207.10049, section 4) that the package does not have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from stem import adjust_stem
from timm.models import load_state_dict
from torch import Tensor, nn

from timm_ghn.checked import setting
from timm_ghn.errors import FineTuneError
from timm_ghn.finetune import FineTuneConfig
from timm_ghn.orthogonalization import classifier_prefixes
from timm_ghn.settings import Init
from timm_ghn.storage.paths import file_sha256


@dataclass(frozen=True)
class PaperConfig(FineTuneConfig):
    """Settings of a run.

    Raises:
        FineTuneError, InitError: As `FineTuneConfig`.
    """

    init_file: str | None = setting(None, "a file of weights to start from instead of `init`")
    stem: Literal["auto", "adjusted", "original"] = setting(
        "auto", "whether the first layers are adjusted to small images (`adjust_stem`); 'auto' up to 64 pixels"
    )

    @property
    def starts_from(self) -> str:
        """Name of the start in tables."""
        return f"file:{self.init_file}" if self.init_file else self.init

    def create_model(self, num_classes: int) -> nn.Module:
        """The timm model, with the weights of timm or of the file, and with its stem.

        The stem is adjusted before weights are predicted, so that they are predicted for the network that is trained.

        Raises:
            FineTuneError: If the model cannot be created, or the file of weights or the stem does not fit.
        """
        model = super().create_model(num_classes)
        if self.init_file is not None:
            load_file(model, self.init_file)
        if self.stem == "adjusted" or (self.stem == "auto" and self.image_size <= 64):
            adjust_stem(model, (int(self.model_kwargs.get("in_chans", 3)), self.image_size, self.image_size))
        return model

    def initialization(self, seed: int) -> Init | None:
        """What gives the model other weights; None if it keeps those of timm or of the file."""
        return None if self.init_file else super().initialization(seed)

    def weights_digest(self) -> str:
        """Hash of the file or of the GHN that the weights come from; empty without one.

        Raises:
            FineTuneError: If the file cannot be read.
        """
        if self.init_file is None:
            return super().weights_digest()
        try:
            return file_sha256(self.init_file)
        except OSError as error:
            raise FineTuneError(f"--init-file {self.init_file} cannot be read: {error.strerror}") from error


def load_file(model: nn.Module, path: str) -> None:
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
