"""Prompt learning for CLIP-style vision-language models, fast."""

import importlib
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (first, so that the kernels run on the thread pool it has loaded)

from vlfast.ops import gated_mixture_loss, plpp_loss, plpp_terms, symmetric_kl_loss
from vlfast.version import __version__

if TYPE_CHECKING:
    from vlfast import dropin
    from vlfast.checkpoints.exporting import export_checkpoint
    from vlfast.checkpoints.importing import import_checkpoint
    from vlfast.clip.models import ClipModel, load_clip, wrap_clip
    from vlfast.clip.text_tower import TextTower
    from vlfast.data.catalog import load_dataset
    from vlfast.data.dataset import Dataset, Split
    from vlfast.dropin import accelerate, restore
    from vlfast.errors import VlfastError
    from vlfast.features import store_features
    from vlfast.protocols.sweep import run_protocol
    from vlfast.report.report import write_report
    from vlfast.run import Prediction, Run, fit, load, resume

__all__ = [
    "ClipModel",
    "Dataset",
    "Prediction",
    "Run",
    "Split",
    "TextTower",
    "VisionTower",
    "VlfastError",
    "__version__",
    "accelerate",
    "dropin",
    "export_checkpoint",
    "fit",
    "gated_mixture_loss",
    "import_checkpoint",
    "load",
    "load_clip",
    "load_dataset",
    "plpp_loss",
    "plpp_terms",
    "restore",
    "resume",
    "run_protocol",
    "store_features",
    "symmetric_kl_loss",
    "wrap_clip",
    "write_report",
]

# The losses need torch alone. What needs open_clip or torchvision is imported when first asked for.
_LAZY = {
    "ClipModel": "vlfast.clip.models",
    "load_clip": "vlfast.clip.models",
    "wrap_clip": "vlfast.clip.models",
    "TextTower": "vlfast.clip.text_tower",
    "VisionTower": "vlfast.clip.vision_tower",
    "load_dataset": "vlfast.data.catalog",
    "Dataset": "vlfast.data.dataset",
    "Split": "vlfast.data.dataset",
    "accelerate": "vlfast.dropin",
    "dropin": "vlfast.dropin",
    "restore": "vlfast.dropin",
    "VlfastError": "vlfast.errors",
    "export_checkpoint": "vlfast.checkpoints.exporting",
    "import_checkpoint": "vlfast.checkpoints.importing",
    "Prediction": "vlfast.run",
    "Run": "vlfast.run",
    "fit": "vlfast.run",
    "load": "vlfast.run",
    "resume": "vlfast.run",
    "run_protocol": "vlfast.protocols.sweep",
    "store_features": "vlfast.features",
    "write_report": "vlfast.report.report",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'vlfast' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    value = module if module.__name__ == f"vlfast.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
