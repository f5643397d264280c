"""Where the codebases keep text prompts of deeper blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def deep_prompts(
    blocks: Sequence[nn.Module], rest: Sequence[Any], half: bool
) -> list[Tensor | None]:
    """For each block the vectors [n, d] that replace the context at its input, or None.

    rest: what the text encoder was called with beside prompts and tokens. [MaPLe] and [PromptSRC]
    clip/model.py: MaPLe hands a list to the encoder, whose entry i goes to block i + 1; IVLP and
    PromptSRC keep a parameter in the block. half: they go through fp16 there, whatever the model's
    precision.
    """
    listed = list(rest[0]) if rest else []
    vectors: list[Tensor | None] = []
    for layer, block in enumerate(blocks):
        found = None
        if hasattr(block, "compound_prompt_nctx"):
            if 1 <= layer <= len(listed):
                found = listed[layer - 1]
        elif getattr(block, "add_prompt", False) and getattr(block, "text_layer", False):
            found = block.VPT_shallow
        vectors.append(_through_half(found) if half and found is not None else found)
    return vectors


def _through_half(vectors: Tensor) -> Tensor:
    """Rounded to fp16, the gradient in full: there each class's part of it is rounded, which can't
    be imitated where they are summed."""
    return vectors + (vectors.half().to(vectors.dtype) - vectors).detach()
