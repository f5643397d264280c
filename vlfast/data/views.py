"""Images to tensors: the test view, and random training views that a seed fixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import InterpolationMode, v2

from vlfast.data.dataset import RendersBatches, Split
from vlfast.errors import VlfastError


@dataclass(frozen=True)
class ViewConfig:
    """What a model expects: size in pixels, mean and std of the RGB normalisation."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"


def view_seed(seed: int, epoch: int, image: int) -> int:
    """The seed of the view of one image in one epoch: independent of order and of processes."""
    return int(np.random.SeedSequence([seed, epoch, image]).generate_state(1, np.uint64)[0] >> 1)


def view_number(epoch: int, views: int | None) -> int:
    """Which view of every image ``epoch`` (the first is 1) sees: ``views`` of them in turn, or a
    new one in each epoch."""
    return epoch if views is None else 1 + (epoch - 1) % views


def eval_transform(config: ViewConfig) -> v2.Compose:
    """Shorter side to size, centre crop, normalise: PIL RGB image to float [3, size, size]."""
    return v2.Compose([*_resize_and_crop(config), *_to_normalised(config)])


def train_transform(config: ViewConfig) -> v2.Compose:
    """CoOp's training view ([CoOp] configs/trainers): random resized crop of 8 to 100 % of the
    area, flip with probability 0.5, normalise. It draws from torch's global generator."""
    crop = v2.RandomResizedCrop(
        config.size, scale=(0.08, 1.0), interpolation=InterpolationMode(config.interpolation)
    )
    return v2.Compose([crop, v2.RandomHorizontalFlip(0.5), *_to_normalised(config)])


class Views(TorchDataset):
    """(image [3, S, S], label) of a split, one view an image.

    epoch None gives the test views; an epoch gives that epoch's random training views, the same
    whichever process asks. Assign ``epoch`` to move on (a ``set_epoch`` method would be called by
    accelerate with a count of its own).
    """

    def __init__(
        self, split: Split, config: ViewConfig, *, seed: int = 0, epoch: int | None = None
    ) -> None:
        self.split = split
        self.config = config
        self.seed = seed
        self.epoch = epoch
        self._normalise = v2.Compose(_to_normalised(config))
        self._test = eval_transform(config)
        self._train = self._test if split.source.renders_views else train_transform(config)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        label = int(self.split.labels[position])
        if self.epoch is None:
            return self._test(self.split.image(position)), label
        seed = self._view_seed(position)
        image = self.split.image(position, view=seed)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self._train(image), label

    def __getitems__(self, positions: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Several at once, as the DataLoader asks for a batch. A source that renders batches in
        the model's size gives them whole, which is some ten times faster."""
        source = self.split.source
        if not isinstance(source, RendersBatches) or source.image_size != self.config.size:
            return [self[position] for position in positions]
        views = [None if self.epoch is None else self._view_seed(p) for p in positions]
        images = source.load_batch([int(self.split.indices[p]) for p in positions], views)
        labels = self.split.labels[list(positions)].tolist()
        return list(zip(self._normalise(images), labels, strict=True))

    def _view_seed(self, position: int) -> int:
        return view_seed(self.seed, self.epoch, int(self.split.indices[position]))


@contextmanager
def worker_errors() -> Iterator[None]:
    """Around a DataLoader's loop: an error about an image in a worker process is raised as the
    worker raised it, without the worker's trace for a message."""
    try:
        yield
    except (VlfastError, FileNotFoundError) as error:
        message = str(error).strip()
        if "Original Traceback" not in message:
            raise
        raise type(error)(message.splitlines()[-1].partition(": ")[2]) from error


def image_batch(images: Sequence, config: ViewConfig) -> Tensor:
    """PIL images to a batch of test views [N, 3, S, S]."""
    transform = eval_transform(config)
    return torch.stack([transform(image.convert("RGB")) for image in images])


def _resize_and_crop(config: ViewConfig) -> list:
    return [
        v2.Resize(config.size, interpolation=InterpolationMode(config.interpolation)),
        v2.CenterCrop(config.size),
    ]


def _to_normalised(config: ViewConfig) -> list:
    return [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(config.mean), list(config.std)),
    ]
