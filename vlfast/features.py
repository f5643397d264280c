"""Store what frozen models make of the training images, so that training computes it no more."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import Tensor
from torch.utils.data import DataLoader

from vlfast.clip.models import ClipModel
from vlfast.data.dataset import Dataset, no_training_images
from vlfast.data.views import Views, worker_errors
from vlfast.errors import VlfastError
from vlfast.parts import check_config, load_parts, load_teacher
from vlfast.run import resolve_given
from vlfast.trainers.config import Config
from vlfast.trainers.device import make_accelerator, resolve_device
from vlfast.trainers.feature_store import DTYPES, FeatureWriter, about_data, about_model
from vlfast.trainers.images import loader_workers, view_config

IMAGES_AT_ONCE = 100

StoredDtype = Literal["fp32", "fp16"]


def store_features(
    path: str | Path,
    recipe: str = "coop",
    *,
    model: str | Mapping[str, Any] | ClipModel | None = None,
    data: str | Mapping[str, Any] | Dataset | None = None,
    dtype: StoredDtype = "fp32",
    show_progress: bool = True,
    **overrides: Any,
) -> Path:
    """Write the image features of ``views`` views of every training image to the folder ``path``;
    with a teacher also its image features, and its class features of all of the dataset's classes.

    The options are those of ``vlfast.fit``; the model, the data (``views=N`` among them, which may
    be left out only with ``augment=False``), the teacher, the precision and the seed decide. Base
    and new classes are stored together, so one folder serves both. Train from it with
    ``data.features=path``, or with ``teacher.features=path`` where only the teacher's are wanted.

    What an earlier call left in the folder is kept after its checksum is compared, so that one that
    was stopped goes on. dtype: what is kept on disk. Returns the folder. Raises VlfastError for a
    folder that holds something else.
    """
    config, clip, dataset = resolve_given(recipe, model, data, overrides)
    return write_features(
        config, path, clip=clip, dataset=dataset, dtype=dtype, show_progress=show_progress
    )


def write_features(
    config: Config,
    path: str | Path,
    *,
    clip: ClipModel | None = None,
    dataset: Dataset | None = None,
    dtype: StoredDtype = "fp32",
    show_progress: bool = True,
) -> Path:
    """``store_features`` for a full Config; the command line ends here, too."""
    config = copy.deepcopy(config)
    check_config(config)
    _check(config, dtype)
    device = resolve_device(config.model.device) if clip is None else clip.device
    accelerator = make_accelerator(device, config.model.precision)
    if accelerator.num_processes > 1:
        raise VlfastError(
            "features: expected one process, got several; start it without a launcher"
        )
    clip, dataset = load_parts(config, accelerator.device, clip, dataset)
    template = config.data.template or dataset.template
    drawn = dataset
    if config.data.shots:
        drawn = drawn.few_shot(config.data.shots, config.seed)
    if not len(drawn.train):
        raise VlfastError(no_training_images(dataset))
    teacher = load_teacher(config, clip, dataset.classnames, template)
    about = {
        "data": about_data(config, dataset, drawn.fingerprint(), clip),
        "model": about_model(clip),
        "teacher": None if teacher is None else {**teacher.about(), "run": config.teacher.run},
        "classnames": list(dataset.classnames),
        "dtype": dtype,
    }
    writer = FeatureWriter(path, about)
    views = Views(drawn.train, view_config(clip), seed=config.seed)
    wanted = config.data.views or 1
    missing = writer.missing(wanted)

    def encode(pixels: Tensor) -> dict[str, Tensor]:
        with torch.no_grad(), accelerator.autocast():
            parts = {"frozen": clip.encode_images(pixels, normalize=False)}
            if teacher is not None:
                parts["teacher"] = teacher.encode_images(pixels)
        return parts

    with Progress(
        console=Console(stderr=True), transient=True, disable=not show_progress
    ) as progress:
        task = progress.add_task("", total=len(missing) * len(views))
        writer.write_images(drawn.train)
        if teacher is not None:
            writer.write_classes(lambda: teacher.class_features(dataset.classnames))
        for number in missing:
            progress.update(task, description=f"view {number} of {wanted}")
            if config.data.augment:
                views.epoch = number
            chunks = _pixels(views, config.data.workers, clip.device, progress, task)
            writer.write_view(number, map(encode, chunks), len(views))
    return writer.path


def _check(config: Config, dtype: str) -> None:
    if dtype not in DTYPES:
        raise VlfastError(f"dtype: expected {' or '.join(DTYPES)}, got {dtype!r}")
    if config.data.features is not None or config.teacher.features is not None:
        raise VlfastError(
            "features: expected models to compute them with, got data.features or teacher.features"
        )
    if config.data.views is None and config.data.augment:
        raise VlfastError("data.views: how many views of every image? Say so with --views N")


def _pixels(
    views: Views, workers: int | None, device: torch.device, progress: Progress, task: TaskID
) -> Iterator[Tensor]:
    loader = DataLoader(
        views,
        batch_size=IMAGES_AT_ONCE,
        num_workers=loader_workers(views.split, workers),
        pin_memory=device.type == "cuda",
    )
    with worker_errors():
        for images, _ in loader:
            yield images.to(device, non_blocking=True)
            progress.advance(task, len(images))
