"""Attention of packed runs of tokens to a shared prefix and, causally, to themselves."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import checks, reference
from .packed_runs import PackedRuns


def prefix_attention(qkv: Tensor, runs: PackedRuns, *, scale: float | None = None) -> Tensor:
    """Attention in which many short runs share the keys and values of a prefix.

    Row i of M packed rows attends to the rows of its prefix, all of them, and to those of its own
    run up to itself: softmax(scale * query . key) weighs the values, in each head by itself. That
    is causal attention over prefix and run joined, the prefix being computed once for all runs.

    Args:
        qkv: [M, 3, H, E] floating, the query, key and value of each row in H heads of width E, as
            a linear layer gives them: the prefixes' rows first, then those of the runs.
        runs: where prefixes and runs begin and end, on the device of qkv; see ``PackedRuns``.
        scale: of the scores, 1 / sqrt(E) by default.

    Returns:
        [M, H, E] in the dtype of qkv. Half precision is computed in fp32. The gradient comes back
        whole, [M, 3, H, E]; that of a prefix is summed in one order, so that it has the same bits
        on every run.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices disagree.
    """
    check_arguments(qkv, runs, scale)
    if scale is None:
        scale = qkv.shape[-1] ** -0.5
    return reference.prefix_attention(qkv, runs, float(scale))


def check_arguments(qkv: Any, runs: Any, scale: Any) -> None:
    """Raise unless the arguments are what :func:`prefix_attention` says."""
    checks.check_floating("qkv", qkv, ("M", "3", "H", "E"))
    if not isinstance(runs, PackedRuns):
        raise TypeError(f"runs: expected a PackedRuns, got {checks.describe(runs)}")
    if qkv.shape[1] != 3 or 0 in qkv.shape[2:]:
        raise ValueError(f"qkv: expected a shape [M, 3, H, E], got {checks.describe(qkv)}")
    rows = runs.rows.shape[1]
    if len(qkv) != rows:
        raise ValueError(f"qkv: expected the {rows} rows of runs, got {checks.describe(qkv)}")
    checks.check_same_device(qkv=qkv, runs=runs.offsets)
    if scale is not None:
        checks.check_positive("scale", scale)
