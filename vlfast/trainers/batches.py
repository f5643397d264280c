"""What a training step reads: pixels, labels, and features that are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from vlfast.clip.models import ClipModel
from vlfast.data.views import Views
from vlfast.errors import VlfastError
from vlfast.trainers.config import Config, DataConfig
from vlfast.trainers.feature_store import About, FeatureStore, about_model
from vlfast.trainers.images import loader_workers
from vlfast.trainers.teacher import ModelTeacher, StoredTeacher

# Stores by the part of a batch that they serve, "frozen" or "teacher".
Stores = Mapping[str, FeatureStore]


def open_stores(
    config: Config,
    clip: ClipModel,
    teacher: ModelTeacher | StoredTeacher | None,
    data: About,
) -> dict[str, FeatureStore]:
    """The stores that this config names, whole and made from the same things, by the part of a
    batch that they serve. data: ``about_data`` of this run.

    Raises VlfastError, with the reason, for a folder that does not serve this run.
    """
    stores = {}
    least = config.data.views or 1
    if config.data.features is not None:
        store = FeatureStore(config.data.features)
        store.check(least, data=data, model=about_model(clip))
        stores["frozen"] = store
        if isinstance(teacher, ModelTeacher) and store.teacher is not None:
            own = teacher.about()
            store.check(teacher={key: own[key] for key in ("name", "weights")})
            stores["teacher"] = store
    if isinstance(teacher, StoredTeacher):
        teacher.store.check(least, data=data)
        same = config.data.features is not None and stores["frozen"].path == teacher.store.path
        stores["teacher"] = stores["frozen"] if same else teacher.store
    for store in stores.values():
        store.open_views(config.data.views or store.views)
    return stores


def check_views(data: DataConfig) -> None:
    """Raise VlfastError for a number of views that makes no sense."""
    if data.views is not None and data.views < 1:
        raise VlfastError(f"data.views: expected at least 1, got {data.views}")
    if data.views is not None and not data.augment:
        raise VlfastError(
            f"data.views: without data.augment every epoch sees the test views, got {data.views}"
        )


class TrainingViews(TorchDataset):
    """One view of every image of a split; a batch of it is a Batch's fields by name.

    views: which images, and in which view. stores: their stored features. pixels: whether anything
    needs the images themselves.
    """

    def __init__(self, views: Views, stores: Stores, *, pixels: bool) -> None:
        self.views = views
        self.stores = dict(stores)
        self.pixels = pixels
        self._rows = {part: store.rows_of(views.split) for part, store in stores.items()}

    def __len__(self) -> int:
        return len(self.views)

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        chosen = np.asarray(positions)
        batch = {"labels": torch.from_numpy(self.views.split.labels[chosen])}
        if self.pixels:
            images = self.views.__getitems__(positions)
            batch["pixels"] = torch.stack([image for image, _ in images])
        number = self.views.epoch or 1  # test views are stored as the first
        for part, store in self.stores.items():
            batch[part] = store.read(part, number, self._rows[part][chosen])
        return batch


def training_loader(
    views: TrainingViews,
    sampler: Sampler[int],
    batch_size: int,
    workers: int | None,
    device: torch.device,
) -> DataLoader:
    """Batches in the sampler's order; the last one is dropped where it is not full. Fewer images
    than a batch are one."""
    return DataLoader(
        views,
        batch_size=min(batch_size, len(views)),
        sampler=sampler,
        drop_last=True,
        num_workers=loader_workers(views.views.split, workers) if views.pixels else 0,
        pin_memory=device.type == "cuda",
        collate_fn=_as_it_is,
    )


def _as_it_is(batch: Any) -> Any:
    return batch
