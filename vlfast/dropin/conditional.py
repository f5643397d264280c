"""CoCoOp's prompts of a batch of images, encoded together where the codebase loops over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class BatchPrompts:
    """Stands for the prompts [B, C, L, d] that a conditional prompt learner returns, without
    building them: a loop over it gets one image's at a time, and the text encoder makes all of them
    when it is asked for the first. For anything else it becomes the tensor.

    context: [B, n, d]. prefix: [C, 1, d]; suffix: [C, L - 1 - n, d].
    """

    def __init__(self, context: Tensor, prefix: Tensor, suffix: Tensor) -> None:
        self.context = context
        self.prefix = prefix
        self.suffix = suffix
        self._features: dict[Any, Tensor] = {}
        self._tensor: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        n = self.context.shape[1]
        length = self.prefix.shape[1] + n + self.suffix.shape[1]
        classes, width = len(self.prefix), self.context.shape[2]
        return torch.Size((len(self.context), classes, length, width))

    def __len__(self) -> int:
        return len(self.context)

    def __iter__(self) -> Iterator[ImagePrompts]:
        return (ImagePrompts(self, image) for image in range(len(self)))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int):
            return ImagePrompts(self, range(len(self))[key])
        return self.tensor()[key]

    def tensor(self) -> Tensor:
        """The prompts themselves."""
        if self._tensor is None:
            self._tensor = torch.stack([self.of_image(i) for i in range(len(self))])
        return self._tensor

    def of_image(self, image: int) -> Tensor:
        context = self.context[image].expand(len(self.prefix), -1, -1)
        return torch.cat([self.prefix, context, self.suffix], dim=1)

    def once(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` gave when first asked for ``key``."""
        if key not in self._features:
            self._features[key] = make()
        return self._features[key]

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function(*_tensors(args), **_tensors(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)


class ImagePrompts:
    """One image's of BatchPrompts, [C, L, d]."""

    def __init__(self, batch: BatchPrompts, image: int) -> None:
        self.batch = batch
        self.image = image

    @property
    def shape(self) -> torch.Size:
        return self.batch.shape[1:]

    def __len__(self) -> int:
        return self.shape[0]

    def tensor(self) -> Tensor:
        return self.batch.of_image(self.image)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function(*_tensors(args), **_tensors(kwargs or {}))

    def __add__(self, other: Any) -> Tensor:
        return self.tensor() + other

    def __getitem__(self, key: Any) -> Tensor:
        return self.tensor()[key]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)


def _tensors(value: Any) -> Any:
    if isinstance(value, (BatchPrompts, ImagePrompts)):
        return value.tensor()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_tensors, value))
    if isinstance(value, dict):
        return {k: _tensors(v) for k, v in value.items()}
    return value
