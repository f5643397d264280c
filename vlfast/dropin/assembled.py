"""Prompts as their parts: what a prompt learner would concatenate for every class, and CoCoOp's for
every class and image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from vlfast.dropin.packed_prompts import Packing
from vlfast.dropin.stand_in import StandIn


@dataclass(frozen=True, eq=False)
class Parts:
    """Prompts [B, K, L, d] of B contexts and K of C classes: SOS, context, the rest of a class.

    context: [B, n, d], or [C, n, d] where each class has its own and B is 1. prefix: [C, 1, d].
    suffix: [C, L - 1 - n, d]. index: int64 [K], or None for all classes. common: how many positions
    after the context hold the same in all classes; None where not even SOS does.
    """

    context: Tensor
    prefix: Tensor
    suffix: Tensor
    index: Tensor | None = None
    common: int | None = None
    class_specific: bool = False

    @property
    def images(self) -> int:
        return 1 if self.class_specific else len(self.context)

    @property
    def n_ctx(self) -> int:
        return self.context.shape[1]

    @property
    def shape(self) -> torch.Size:
        """Of one image's prompts: (K, L, d)."""
        classes = len(self.prefix if self.index is None else self.index)
        return torch.Size((classes, 1 + self.n_ctx + self.suffix.shape[1], self.suffix.shape[2]))

    @property
    def dtype(self) -> torch.dtype:
        parts = (self.context, self.prefix, self.suffix)
        return reduce(torch.promote_types, (part.dtype for part in parts))

    def select(self, index: Tensor) -> Parts:
        """Of these classes alone, int64 numbers of those that there are now."""
        device = self.prefix.device
        index = index.to(device, non_blocking=True)
        return replace(self, index=index if self.index is None else self.index[index])

    def of_image(self, image: int) -> Parts:
        return self if self.class_specific else replace(self, context=self.context[image, None])

    def prompts(self, image: int = 0) -> Tensor:
        """[K, L, d], built."""
        prefix, suffix, context = self.prefix, self.suffix, self.context
        if self.index is not None:
            prefix, suffix = prefix[self.index], suffix[self.index]
            context = context[self.index] if self.class_specific else context
        if not self.class_specific:
            context = context[image].expand(len(prefix), -1, -1)
        return torch.cat([prefix, context, suffix], dim=1)

    def shared(self, most: int) -> int:
        """How many positions, at most ``most``, hold the same in all classes, SOS and context among
        them; 0 where these do not."""
        if self.class_specific or self.common is None or most < 1 + self.n_ctx:
            return 0
        return min(most, 1 + self.n_ctx + self.common)

    def rows(self, packing: Packing) -> Tensor:
        """The packed rows [M, d] of all images, without building the prompts. What is shared covers
        the context."""
        n, length = self.n_ctx, self.shape[1]
        first = 0 if self.index is None else self.index[:1]
        start = self.prefix[first].reshape(1, 1, -1).expand(len(self.context), -1, -1)
        behind = self.suffix[first].reshape(1, length - 1 - n, -1)[:, : packing.shared - 1 - n]
        behind = behind.expand(len(self.context), -1, -1)
        classes, places = packing.runs // length, packing.runs % length - 1 - n
        if self.index is not None:
            classes = self.index[classes]
        runs = self.suffix.flatten(0, 1).index_select(0, classes * (length - 1 - n) + places)
        shared = torch.cat([start, self.context, behind], dim=1).flatten(0, 1)
        return torch.cat([shared, runs.repeat(packing.images, 1)])


class LearnedPrompts(StandIn):
    """Stands for the prompts [K, L, d] of a learner with one context, or one a class."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.shape = parts.shape
        self.dtype = parts.dtype
        self.device = parts.prefix.device

    def build(self) -> Tensor:
        return self.parts.prompts()

    def __getitem__(self, key: Any) -> Any:
        index = class_numbers(key, len(self))
        return self.tensor()[key] if index is None else self.select(index)

    def select(self, index: Tensor) -> LearnedPrompts:
        return LearnedPrompts(self.parts.select(index))


class BatchPrompts(StandIn):
    """Stands for the prompts [B, K, L, d] that a conditional prompt learner returns, without
    building them: a loop over it gets one image's at a time, and the text encoder makes those of
    many images when it is asked for the first."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.shape = torch.Size((parts.images, *parts.shape))
        self.dtype = parts.dtype
        self.device = parts.prefix.device
        self._features: dict[Any, tuple[Tensor, ...]] = {}

    def build(self) -> Tensor:
        return torch.stack([self.parts.prompts(i) for i in range(len(self))])

    def __iter__(self) -> Iterator[ImagePrompts]:
        return (ImagePrompts(self, image) for image in range(len(self)))

    def __getitem__(self, key: Any) -> Any:
        if type(key) is int:
            return ImagePrompts(self, range(len(self))[key])
        return self.tensor()[key]

    def features(self, image: int, step: int, key: Any, make: Callable[[Parts], Tensor]) -> Tensor:
        """Those of one image, [K, D]. ``make`` gives [B', K, D] of at most ``step`` images at a
        time, once as long as ``key`` stays as it is."""
        start = image - image % step
        if (key, start) not in self._features:
            part = replace(self.parts, context=self.parts.context[start : start + step])
            self._features[key, start] = make(part).unbind(0)
        return self._features[key, start][image - start]


class ImagePrompts(StandIn):
    """One image's of BatchPrompts, [K, L, d]."""

    def __init__(self, batch: BatchPrompts, image: int) -> None:
        self.batch = batch
        self.image = image
        self.shape = batch.shape[1:]
        self.dtype = batch.dtype
        self.device = batch.device

    def build(self) -> Tensor:
        return self.batch.parts.prompts(self.image)

    def select(self, index: Tensor) -> ImagePrompts:
        parts = self.batch.parts.of_image(self.image).select(index)
        return ImagePrompts(BatchPrompts(parts), 0)


def class_numbers(key: Any, classes: int) -> Tensor | None:
    """The classes that ``key`` picks, as int64 [K], or None where it is no list of numbers."""
    if key is None or isinstance(key, (int, slice, tuple, str)):
        return None
    try:
        index = torch.as_tensor(key)
    except (TypeError, ValueError, RuntimeError):
        return None
    if index.ndim != 1 or index.dtype not in (torch.int64, torch.int32, torch.int16):
        return None
    index = index.long()
    if index.device.type == "cpu":
        if len(index) and not -classes <= int(index.min()) <= int(index.max()) < classes:
            return None
        index = index % classes
    return index
