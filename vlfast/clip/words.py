"""Vectors as words: the nearest token embeddings, and which words a model knows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from vlfast.clip.models import ClipModel

VECTORS_AT_ONCE = 256  # 50 MB of distances to CLIP's vocabulary


def nearest_words(
    clip: ClipModel, vectors: Tensor, count: int = 3
) -> list[list[tuple[str, float]]]:
    """For each vector [n, d], the ``count`` known words with the smallest Euclidean distance.

    Returns (word, distance) pairs, nearest first, as [CoOp] interpret_prompts.py reports them.
    """
    known = clip.known_tokens.nonzero().squeeze(1)
    words = clip.token_embedding.float().cpu()[known]
    found = []
    for part in vectors.detach().float().cpu().split(VECTORS_AT_ONCE):
        indices = torch.cdist(part, words).topk(min(count, len(known)), largest=False).indices
        # Of many at once, distances come from products, whose rounding hides small ones.
        distances = (part.unsqueeze(1) - words[indices]).norm(dim=-1)
        rows = zip(indices.tolist(), distances.tolist(), strict=True)
        found += [
            [
                (clip.tokenizer.decode([int(known[i])]).strip(), d)
                for i, d in zip(indices, distances, strict=True)
            ]
            for indices, distances in rows
        ]
    return found


def check_vocabulary(clip: ClipModel, texts: Sequence[str], what: str) -> list[str]:
    """Warn when ``texts`` (class names, a context's words) hold tokens the model never trained.

    Returns the texts concerned. ``what`` names them in the warning.
    """
    unknown = [text for text in texts if clip.unknown_words(text)]
    if unknown:
        shown = ", ".join(repr(text) for text in unknown[:5])
        warnings.warn(
            f"{what}: {clip.name} never trained the words of {shown}"
            f"{', ...' if len(unknown) > 5 else ''}, so what it says of them means nothing",
            stacklevel=2,
        )
    return unknown
