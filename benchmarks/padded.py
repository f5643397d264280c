"""The text tower as CoOp's codebases run it, on open_clip's modules: 77 tokens for every class."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.contest import OURS

Loss = Callable[[], Tensor | Iterator[Tensor]]

PADDED, CUT = "77 tokens", "cut"
MOST_ON_A_CPU = 600  # classes at 77 tokens: 1000 of them take over 20 GB
CLASSES_AT_ONCE = 100


def build_clip(config: Mapping[str, Any] | None, device: str) -> open_clip.CLIP:
    """A frozen CLIP of this config with random weights, ViT-B/32 by default."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**copy.deepcopy(config or open_clip.get_model_config("ViT-B-32")))
    return model.requires_grad_(False).eval().to(device)


def class_names(classes: int) -> list[str]:
    """Names of ImageNet's, from all over its list: some 4.2 tokens each, "." and EOT among them.

    The first hundred, fish and birds, have longer names than the rest.
    """
    return [IMAGENET_CLASSNAMES[i * len(IMAGENET_CLASSNAMES) // classes] for i in range(classes)]


def three_sides(ours: Loss, padded: Callable[[bool], Loss], whole: bool) -> dict[str, Loss]:
    """Ours, and what ``padded`` makes of whether to cut; the 77 tokens only where ``whole``."""
    sides = {OURS: ours, PADDED: padded(False), CUT: padded(True)}
    return sides if whole else {side: sides[side] for side in (OURS, CUT)}


class PaddedTower:
    """Class features as CoOp's prompt learner and text encoder compute them.

    cut: every sequence ends at the longest EOT, as one would save most of it in a line.
    """

    def __init__(
        self, model: open_clip.CLIP, names: Sequence[str], n_ctx: int, *, cut: bool = False
    ) -> None:
        tokenizer = SimpleTokenizer()
        sentences = [f"{'X ' * n_ctx}{name}." for name in names]
        ids = tokenizer(sentences, context_length=model.context_length)
        if cut:
            ids = ids[:, : int(ids.argmax(dim=-1).max()) + 1]
        self.model = model
        self.ids = ids.to(model.token_embedding.weight.device)
        embedded = model.token_embedding(self.ids)
        self.prefix, self.suffix = embedded[:, :1], embedded[:, 1 + n_ctx :]
        self.name_lengths = [len(tokenizer.encode(name)) for name in names]

    def __call__(
        self, context: Tensor, position: str = "end", classes: slice = slice(None)
    ) -> Tensor:
        """Features [C, D] of these classes; context is [n, d], or [C, n, d] one a class."""
        prefix, suffix, ids = self.prefix[classes], self.suffix[classes], self.ids[classes]
        context = context.expand(len(prefix), -1, -1) if context.ndim == 2 else context[classes]
        if position == "middle":
            lengths = self.name_lengths[classes]
            prompts = _around_names(prefix, context, suffix, lengths)
        else:
            prompts = torch.cat([prefix, context, suffix], dim=1)
        return self.encode(prompts, ids)

    def encode(self, prompts: Tensor, ids: Tensor) -> Tensor:
        model, length = self.model, prompts.shape[1]
        x = prompts + model.positional_embedding[:length]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
        return x[torch.arange(len(x)), ids.argmax(dim=-1)] @ model.text_projection

    def in_parts(self, context: Tensor, position: str = "end") -> Tensor:
        """The same in memory for a part of the classes: the backward computes each part again."""
        parts = [
            checkpoint(
                self, context, position, slice(start, start + CLASSES_AT_ONCE), use_reentrant=False
            )
            for start in range(0, len(self.ids), CLASSES_AT_ONCE)
        ]
        return torch.cat(parts)


def _around_names(
    prefix: Tensor, context: Tensor, suffix: Tensor, name_lengths: Sequence[int]
) -> Tensor:
    """Half of the context before each name and half behind it."""
    half = context.shape[1] // 2
    prompts = []
    for sos, vectors, rest, length in zip(prefix, context, suffix, name_lengths, strict=True):
        prompts.append(
            torch.cat([sos, vectors[:half], rest[:length], vectors[half:], rest[length:]])
        )
    return torch.stack(prompts)
