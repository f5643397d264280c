"""What the ops share in reaching their kernels from PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# As csrc/include/vlfast/dtype.h has them.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

PLAIN = (Tensor, torch.nn.Parameter)


def dispatcher_sees(*tensors: Tensor | None) -> bool:
    """Whether an op on these tensors must be called by way of PyTorch's dispatcher.

    In plain eager code it may be called directly, which saves 10 us a step. A graph being traced, a
    dispatch mode and a tensor subclass must see the op, and what is lazily negated or zero must be
    written out for it.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    for x in tensors:
        if x is not None and (type(x) not in PLAIN or x.is_neg() or x._is_zerotensor()):
            return True
    return False


def is_batched(upstream: Tensor) -> bool:
    """Whether it stands for many upstreams, as autograd.grad(is_grads_batched=True) makes it."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(upstream) or functorch.is_batchedtensor(upstream)


def tensor_and_factor(scale: Tensor | float) -> tuple[Tensor | None, float]:
    """A scale as a tensor, or nothing, and a number: their product is the scale."""
    return (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))


def number_on_cpu(scale: Tensor | None, factor: float) -> float:
    """Their product, read."""
    return factor if scale is None else factor * scale.item()


def number_for_gpu(
    scale: Tensor | None, factor: float, dtype: torch.dtype
) -> tuple[Tensor | None, float]:
    """The same with a tensor that a kernel can read, on its GPU. One on the CPU is read here, since
    sending it would hold the GPU up."""
    if scale is None or scale.is_cpu:
        return None, number_on_cpu(scale, factor)
    return scale.to(dtype), factor


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """The address of each tensor's data, 0 of what is missing or empty."""
    return [0 if x is None or not x.numel() else x.data_ptr() for x in tensors]


def refuse_second_derivative(function: str) -> None:
    """Raise in a backward that is to be differentiated itself.

    once_differentiable would be silent here: the saved gradients carry no graph of their own.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{function}: create_graph=True needs the reference; compute the loss under "
            "vlfast.ops.backends.reference_only()"
        )
