"""Floating-point operations of the ops: with this module imported, PyTorch's FlopCounterMode counts
them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import prefix_attention  # noqa: F401  (defines the op)


def prefix_attention_flop(qkv: Tensor, rows: Tensor) -> int:
    """Of the forward: two products with each key that a row sees, a multiplication and an addition
    an element, in all heads.

    qkv: [M, 3, H, E]. rows: int32 [4, M], see ``PackedRuns``.
    """
    begin, _, prefix_begin, prefix_end = rows.long()
    own = torch.arange(rows.shape[1], device=rows.device) + 1 - begin
    seen = int((own + prefix_end - prefix_begin).sum())
    return 4 * seen * qkv.shape[2] * qkv.shape[3]


@register_flop_formula(torch.ops.vlfast.prefix_attention, get_raw=True)
def _forward(qkv: Tensor, offsets: Tensor, rows: Tensor, *_: Any, **__: Any) -> int:
    return prefix_attention_flop(qkv, rows)


@register_flop_formula(torch.ops.vlfast.prefix_attention_backward, get_raw=True)
def _backward(
    upstream: Tensor,
    qkv: Tensor,
    output: Tensor | None,
    log_normaliser: Tensor | None,
    offsets: Tensor,
    rows: Tensor,
    *_: Any,
    **__: Any,
) -> int:
    # Scores again, and the gradients of weights, values, queries and keys: five products for two.
    return prefix_attention_flop(qkv, rows) * 5 // 2
