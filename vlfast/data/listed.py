"""File names and labels of a split, held compactly: ImageNet has 1.3 million."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


class PackedNames(Sequence[str]):
    """An immutable sequence of strings in one block of UTF-8, a third of what a list of them
    takes; loader processes share it, and copy nothing when they read."""

    def __init__(self, names: Iterable[str]) -> None:
        block, ends = bytearray(), [0]
        for name in names:
            block += name.encode("utf-8", "surrogateescape")
            ends.append(len(block))
        self._block = bytes(block)
        self._ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"names: there are {len(self)}, got index {index}")
        index %= len(self)
        start, end = self._ends[index : index + 2].tolist()
        return self._block[start:end].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        for start, end in pairwise(self._ends.tolist()):
            yield self._block[start:end].decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Listed:
    """The images of a split in their order. names: relative to the dataset's folder, with "/".
    labels: int64 [N]."""

    names: Sequence[str]
    labels: np.ndarray

    @classmethod
    def of(cls, names: Iterable[str], labels: Sequence[int] | np.ndarray = ()) -> Listed:
        return cls(PackedNames(names), np.asarray(labels, dtype=np.int64))

    def one_per_class(self) -> list[str]:
        """The first image of every class."""
        _, first = np.unique(self.labels, return_index=True)
        return [self.names[i] for i in first.tolist()]
