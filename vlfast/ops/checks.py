"""Argument checks that the public ops share: each error says what came and what was expected.

A wrong type or dtype raises TypeError; a wrong shape, device or value raises ValueError. The
values inside a tensor on a GPU are not read, which would stall it: VLFAST_CHECK=1 turns it on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .kernel_calls import dispatcher_sees

# Beyond these a number is zero or infinite in fp32.
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def checking_values() -> bool:
    """Whether values inside tensors may be read: VLFAST_CHECK is set, no graph is being traced."""
    if torch.compiler.is_compiling():
        return False
    return os.environ.get("VLFAST_CHECK", "0") not in ("", "0")


def values_readable(tensor: Tensor) -> bool:
    """Whether reading this tensor stalls no device (it is on the CPU), or is asked for anyway.

    What is being traced, or transformed by functorch, may have no values to read.
    """
    if dispatcher_sees(tensor) or torch._C._are_functorch_transforms_active() or tensor.is_meta:
        return False
    return tensor.is_cpu or checking_values()


def describe(value: Any) -> str:
    """What came, for an error message: dtype, shape and device of a tensor, else type and value."""
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f", {value.layout}"
        return f"{value.dtype} {list(value.shape)} on {value.device}{layout}"
    return f"{type(value).__name__} {value!r}"


def check_floating(name: str, value: Any, shape: Sequence[str]) -> None:
    """A floating tensor with one dimension for each name in ``shape``, as in ("M", "d")."""
    right_type = (
        isinstance(value, Tensor) and value.is_floating_point() and value.layout is torch.strided
    )
    if not right_type or value.dim() != len(shape):
        error = ValueError if right_type else TypeError
        raise error(
            f"{name}: expected a floating tensor [{', '.join(shape)}], got {describe(value)}"
        )


def check_dtype(name: str, value: Any, dtype: torch.dtype, shape: Sequence[str]) -> None:
    """A tensor of exactly this dtype (labels, indices and masks), shaped as in check_floating."""
    right_type = isinstance(value, Tensor) and value.dtype == dtype
    if not right_type or value.dim() != len(shape):
        error = ValueError if right_type else TypeError
        raise error(
            f"{name}: expected a tensor {dtype} [{', '.join(shape)}], got {describe(value)}"
        )


def check_same_size(size: str, first: tuple[str, Tensor, int], *others: tuple) -> None:
    """The same length in the given dimension of each (name, tensor, dimension)."""
    first_name, first_tensor, first_dimension = first
    expected = first_tensor.shape[first_dimension]
    for name, tensor, dimension in others:
        if tensor.shape[dimension] != expected:
            raise ValueError(
                f"{name}: expected {size} = {expected} in dimension {dimension}, as {first_name} "
                f"{list(first_tensor.shape)} has, got {describe(tensor)}"
            )


def check_same_device(**tensors: Any) -> None:
    """Every tensor on the device of the first one. None, and a plain float, are let through.

    A 0-d tensor on the CPU is let through as well: PyTorch combines it with any device.
    """
    first_name, first = next(iter(tensors.items()))
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.device == first.device:
            continue
        if value.dim() == 0 and value.device.type == "cpu":
            continue
        raise ValueError(
            f"{name}: expected device {first.device}, as {first_name} has, got {describe(value)}"
        )


def check_not_empty(name: str, tensor: Tensor) -> None:
    """At least one element."""
    if 0 in tensor.shape:
        raise ValueError(f"{name}: expected at least one element, got {describe(tensor)}")


def check_positive(name: str, value: Any) -> None:
    """A scale or a temperature: finite and > 0 in fp32, a number or a floating 0-d tensor.

    The value of a tensor is read only under VLFAST_CHECK=1.
    """
    _check_scalar(name, value, "a finite number > 0", SMALLEST)


def check_weight(name: str, value: Any) -> None:
    """The weight of a term: finite and >= 0, a number or a floating 0-d tensor.

    The value of a tensor is read only under VLFAST_CHECK=1.
    """
    _check_scalar(name, value, "a finite number >= 0", 0.0)


def _check_scalar(name: str, value: Any, expected: str, smallest: float) -> None:
    number = value
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(_scalar_message(name, expected, describe(value)))
        if value.dim() != 0:
            raise ValueError(_scalar_message(name, expected, describe(value)))
        if not checking_values() or not values_readable(value):
            return
        number = float(value.detach())
    elif type(value) not in (float, int) and (
        isinstance(value, bool) or not isinstance(value, Real)
    ):
        raise TypeError(_scalar_message(name, expected, describe(value)))
    if not smallest <= number <= LARGEST:
        raise ValueError(_scalar_message(name, expected, str(number)))


def _scalar_message(name: str, expected: str, came: str) -> str:
    return f"{name}: expected {expected}, or a floating 0-d tensor of one, got {came}"


def check_frozen(name: str, value: Any) -> None:
    """No gradient is asked of an argument to which the op gives none. Numbers are let through."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor without gradient (this op gives none to {name}), got "
            f"{describe(value)} that requires grad; pass {name}.detach()"
        )


def check_top_k(value: Any, limit: int, of: str, name: str = "top_k") -> None:
    """An integer from 1 to ``limit``, the number of candidates, which ``of`` describes."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer from 1 to {limit} ({of}), got {value!r}")
    if not 1 <= value <= limit:
        raise ValueError(f"{name}: expected an integer from 1 to {limit} ({of}), got {value}")


def check_flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}")


def check_in_range(name: str, tensor: Tensor, limit: int) -> None:
    """Labels or indices from 0 to ``limit`` - 1. On a GPU read only under VLFAST_CHECK=1."""
    if not values_readable(tensor) or tensor.numel() == 0:
        return
    lowest, highest = int(tensor.min()), int(tensor.max())
    if lowest < 0 or highest >= limit:
        raise ValueError(
            f"{name}: expected values from 0 to {limit - 1}, got {lowest} to {highest}"
        )


def check_reduction(value: Any, allowed: Sequence[str]) -> None:
    """One of the reductions that the op offers."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"reduction: expected one of {', '.join(allowed)}, got {value!r}")
