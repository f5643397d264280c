"""What several processes do together: one batch, one gradient, one evaluation.

What is learned is small and the models are frozen, so every process holds all of it and gradients
are averaged in one message a step. PyTorch's DistributedDataParallel would do the same behind hooks
that a second gradient (gradient projection) or a parameter without one gets in the way of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from vlfast.data.dataset import Split
from vlfast.errors import VlfastError


def check_batch(batch_size: int, images: int, processes: int) -> None:
    """Raise VlfastError where ``processes`` can't have equal parts of a batch.

    images: of the training set, which are one batch if they are fewer than ``batch_size``.
    """
    batch = min(batch_size, images)
    if batch % processes:
        fewer = "" if batch == batch_size else f" (all the training images; asked: {batch_size})"
        raise VlfastError(
            f"recipe.batch_size: expected a multiple of the {processes} processes, which share "
            f"each batch, got {batch}{fewer}"
        )


def begin_alike(module: nn.Module, accelerator: Accelerator) -> None:
    """Give all processes the first one's parameters and buffers, and let batch norms take their
    statistics over the whole batch."""
    if accelerator.num_processes == 1:
        return
    for tensor in module.state_dict().values():
        broadcast(tensor)
    for part in module.modules():
        if type(part) is nn.BatchNorm1d:
            # The parameters and the place in the model stay as they are.
            part.__class__ = SharedBatchNorm


def average(tensors: Sequence[Tensor | None], accelerator: Accelerator) -> None:
    """Replace each tensor by its mean over the processes, in place, in one fp32 message.

    None is skipped; it must stand at the same places in all processes.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if accelerator.num_processes == 1 or not given:
        return
    flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in given])
    parts = accelerator.reduce(flat, "mean").split([tensor.numel() for tensor in given])
    with torch.no_grad():
        for tensor, part in zip(given, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def share_of(split: Split, accelerator: Accelerator | None) -> Split:
    """The images of a split that this process tests: ceil(N / processes) in a row, the last ones
    filled up from the front. The split has at least one image."""
    if accelerator is None or accelerator.num_processes == 1:
        return split
    each = -(-len(split) // accelerator.num_processes)
    start = accelerator.process_index * each
    return split.at([i % len(split) for i in range(start, start + each)])


def gather_shares(rows: Tensor, count: int, accelerator: Accelerator | None) -> Tensor:
    """[N / processes, ...] of each process's ``share_of`` as the [N, ...] of the whole split."""
    if accelerator is None or accelerator.num_processes == 1:
        return rows
    return accelerator.gather(rows.contiguous())[:count]


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.clone()
        torch.distributed.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return _SumOverProcesses.forward(ctx, upstream)


class SharedBatchNorm(nn.BatchNorm1d):
    """Batch norm of [B, D] whose statistics are those of the batch in all processes together."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        whole = x.to(torch.promote_types(x.dtype, torch.float32))
        count = len(x) * torch.distributed.get_world_size()
        mean = _SumOverProcesses.apply(whole.sum(dim=0)) / count
        centred = whole - mean
        variance = _SumOverProcesses.apply(centred.square().sum(dim=0)) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                kept = self.momentum
                if kept is None:
                    kept = 1.0 / float(self.num_batches_tracked)
                unbiased = variance * count / (count - 1)
                for running, found in ((self.running_mean, mean), (self.running_var, unbiased)):
                    running.lerp_(found.to(running.dtype), kept)
        normal = centred * (variance + self.eps).rsqrt()
        if self.affine:
            normal = normal * self.weight + self.bias
        return normal.to(x.dtype)
