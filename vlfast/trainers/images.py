"""Images on their way into a model: views of the right size, loader processes, features."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vlfast.clip.models import ClipModel
from vlfast.data.dataset import Split
from vlfast.data.views import ViewConfig, Views, worker_errors
from vlfast.prompts.classifier import PromptedClassifier

TEST_BATCH = 100  # Dassl's test batch


def view_config(clip: ClipModel) -> ViewConfig:
    """What this model expects of images."""
    return ViewConfig(clip.image_size, clip.mean, clip.std, clip.interpolation)


def loader_workers(split: Split, asked: int | None) -> int:
    """Processes that load images. Views that are rendered in memory need none; files get as many
    as there are cores, at most 8."""
    if asked is not None:
        return asked
    return 0 if split.source.renders_views else min(8, os.cpu_count() or 1)


@torch.no_grad()
def encode_split(
    classifier: PromptedClassifier, split: Split, *, workers: int | None = None
) -> tuple[Tensor, Tensor]:
    """Normalised features [N, D] of a split's test views and labels [N], on the model's device.
    The split has at least one image."""
    clip = classifier.clip
    loader = DataLoader(
        Views(split, view_config(clip)),
        batch_size=TEST_BATCH,
        num_workers=loader_workers(split, workers),
    )
    with worker_errors():
        features = [classifier.encode_images(images.to(clip.device)) for images, _ in loader]
    return torch.cat(features), torch.from_numpy(split.labels).to(clip.device)
