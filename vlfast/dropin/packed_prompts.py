"""The rows of assembled prompts that count: what all classes share once, the rest up to EOT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlfast.ops import PackedRuns


@dataclass(frozen=True, eq=False)
class Packing:
    """Which positions of prompts [C, L, d] stand in which of M rows: ``shared`` of the first class,
    once an image, then of every class those after them up to EOT.

    prefix: int64 [shared], of one image; runs: int64 [M_r], those of the classes, as indices into
    C * L. positions: int64 [M]. eot_rows: int64, one a class and image. n_ctx: context vectors in
    the prefix, at 1..n_ctx, or 0 where they stand elsewhere or are not known. context_rows: int64
    [images * n_ctx], those vectors.
    """

    images: int
    classes: int
    shared: int
    n_ctx: int
    packed: PackedRuns
    runs: Tensor
    positions: Tensor
    eot_rows: Tensor
    context_rows: Tensor

    @classmethod
    def of(
        cls,
        ends: Sequence[int],
        length: int,
        *,
        shared: int,
        n_ctx: int,
        images: int = 1,
        device: torch.device,
    ) -> Packing:
        """ends: the position of EOT of each class. length: L. shared: how many positions hold the
        same in all classes, at most those before the first EOT."""
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

        n_ctx = n_ctx if n_ctx < shared else 0
        context_rows = torch.arange(images)[:, None] * shared + 1 + torch.arange(n_ctx)

        def on_device(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return cls(
            images=images,
            classes=len(ends),
            shared=shared,
            n_ctx=n_ctx,
            packed=PackedRuns.of([shared] * images, sizes.repeat(images), device),
            runs=on_device(indices),
            positions=on_device(positions),
            eot_rows=on_device(eot_rows),
            context_rows=on_device(context_rows.flatten()),
        )
