"""Whether attention masks are causal: only then may classes share a prefix."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

_KEPT = 64
# Adding it leaves nothing of a weight, in any precision.
_OUT_OF_SIGHT = -1e4


class MaskReader:
    """Reads each mask once, and again when it was replaced or written to."""

    def __init__(self) -> None:
        self._read: dict[int, tuple[weakref.ref[Tensor], int, bool]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def why_not_causal(self, encoder: nn.Module, length: int) -> str | None:
        """Masks are kept by the blocks, as openai/CLIP has it, or by the encoder, as open_clip."""
        holders = [("", encoder), *_named_blocks(encoder)]
        known = missing = False
        for name, holder in holders:
            if not hasattr(holder, "attn_mask"):
                continue
            known = True
            mask = holder.attn_mask
            if mask is None:
                missing = missing or name != ""
            elif not isinstance(mask, Tensor) or not self._is_causal(mask, length):
                return f"{name or 'its'} attn_mask is not causal"
        if known and missing and getattr(encoder, "attn_mask", None) is None:
            return "a block has no attn_mask, and sees later tokens"
        return None

    def _is_causal(self, mask: Tensor, length: int) -> bool:
        version = 0 if mask.is_inference() else mask._version
        found = self._read.get(id(mask))
        if found is None or found[0]() is not mask or found[1] != version:
            if len(self._read) >= _KEPT:
                self._read.clear()
            found = self._read[id(mask)] = (weakref.ref(mask), version, _causal(mask, length))
        return found[2]


@torch.no_grad()
def _causal(mask: Tensor, length: int) -> bool:
    if mask.ndim != 2 or mask.shape[0] != mask.shape[1] or len(mask) < length:
        return False
    mask = mask.cpu()
    later = torch.ones(mask.shape, dtype=torch.bool).triu(1)
    if mask.dtype == torch.bool:
        return bool((mask == later).all())
    return bool((mask[later] <= _OUT_OF_SIGHT).all() and (mask[~later] == 0).all())


def _named_blocks(encoder: nn.Module) -> list[tuple[str, nn.Module]]:
    blocks = encoder.transformer.resblocks
    return [(f"transformer.resblocks[{i}]", block) for i, block in enumerate(blocks)]
