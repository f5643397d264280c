"""File names and labels of a split, held compactly: ImageNet has 1.3 million."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


class PackedNames(Sequence[str]):
    """An immutable sequence of strings in one block of UTF-8, a third of what a list of them
    takes; loader processes share it, and copy nothing when they read."""

    def __init__(self, names: Iterable[str]) -> None:
        block, ends = bytearray(), array("q", [0])
        for name in names:
            block += name.encode("utf-8", "surrogateescape")
            ends.append(len(block))
        self._block = bytes(block)
        self._ends = ends  # of each name, behind a 0

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"names: there are {len(self)}, so no number {index}")
        return self._block[self._ends[index] : self._ends[index + 1]].decode(
            "utf-8", "surrogateescape"
        )

    def __iter__(self) -> Iterator[str]:
        for start, end in pairwise(self._ends):
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
