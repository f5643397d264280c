"""The rows of assembled prompts that count: what all classes share once, the rest up to EOT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlfast.ops import PackedRuns


@dataclass(frozen=True, eq=False)
class Packing:
    """Which positions of prompts [C, L, d] stand in which of M rows: ``shared`` of the first class,
    once an image, then of every class those after them up to EOT.

    runs: int64 [M_r], the classes' own rows, as indices into C * L. positions: int64 [M]. eot_rows:
    int64, one a class and image.
    """

    images: int
    classes: int
    shared: int
    packed: PackedRuns
    runs: Tensor
    positions: Tensor
    eot_rows: Tensor
    _places: Tensor
    _deep: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        ends: Sequence[int],
        length: int,
        *,
        shared: int,
        images: int = 1,
        device: torch.device,
    ) -> Packing:
        """ends: the position of EOT of each class. length: L. shared: how many positions hold the
        same in all classes, at most those before the first EOT; 0 is for a single image."""
        ends = torch.as_tensor(ends, dtype=torch.int64)
        place = torch.arange(length)
        in_run = (place >= shared) & (place <= ends[:, None])
        grid = place.expand(len(ends), -1)
        indices = (torch.arange(len(ends))[:, None] * length + place)[in_run]
        sizes = ends + 1 - shared
        last = sizes.cumsum(0) - 1
        image = torch.arange(images)[:, None] * len(indices)
        eot_rows = images * shared + (image + last).flatten()
        positions = torch.cat([place[:shared].repeat(images), grid[in_run].repeat(images)])

        def on_device(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return cls(
            images=images,
            classes=len(ends),
            shared=shared,
            packed=PackedRuns.of([shared] * images if shared else [], sizes.repeat(images), device),
            runs=on_device(indices),
            positions=on_device(positions),
            eot_rows=on_device(eot_rows),
            _places=positions,
        )

    def deep_rows(self, n: int) -> tuple[Tensor, Tensor]:
        """The rows at positions 1..n, and which of n vectors stands in each."""
        if n not in self._deep:
            rows = ((self._places >= 1) & (self._places <= n)).nonzero().flatten()
            device = self.positions.device
            self._deep[n] = (
                rows.to(device, non_blocking=True),
                (self._places[rows] - 1).to(device, non_blocking=True),
            )
        return self._deep[n]
