"""Every error that timm-ghn raises on its own account; each is also the builtin that a caller would expect."""

from __future__ import annotations


class TimmGhnError(Exception):
    """Base of all errors of this package."""


class GraphError(TimmGhnError, ValueError):
    """A graph is malformed, or a model has nothing that a GHN can predict."""


class CaptureError(TimmGhnError, RuntimeError):
    """The forward pass of a model could not be recorded on the meta device."""


class CheckpointError(TimmGhnError, ValueError):
    """A GHN checkpoint is truncated, damaged, unsafe, or of another format."""


class ExportError(TimmGhnError, OSError):
    """A model cannot be written in timm's form, or the folder cannot be written."""


class TensorFileError(TimmGhnError, ValueError):
    """A safetensors file is truncated or damaged, or its header promises what the file does not have."""


class UnknownGhnError(TimmGhnError, ValueError):
    """A GHN was asked for by a name that is neither registered nor a file."""


class DownloadError(TimmGhnError, OSError):
    """A GHN could not be downloaded, or what arrived is not what was published."""


class HubUnreachableError(DownloadError):
    """The Hub does not answer, fails, or must not be asked."""


class InitError(TimmGhnError, ValueError):
    """An initialization was asked for that does not exist or contradicts another argument."""


class CacheError(TimmGhnError, OSError):
    """A cache entry could not be written or is damaged."""


class ImageError(TimmGhnError, ValueError):
    """Images for training are missing or damaged, or nothing says what they show."""


class TrainingError(TimmGhnError, RuntimeError):
    """The training of a GHN cannot go on."""


class FineTuneError(TimmGhnError, RuntimeError):
    """A network cannot be fine-tuned as asked: settings, data, memory, or results on disk."""


class MissingDependencyError(TimmGhnError, ImportError):
    """An optional package is needed for what was asked."""


class PushError(TimmGhnError, OSError):
    """Something could not be pushed to the Hub, or should not be."""


class CommandError(TimmGhnError):
    """A command of `timm-ghn` cannot do what was asked."""
