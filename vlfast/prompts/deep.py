"""Context in the first blocks of the text tower: what prompts in both towers have in common."""

from __future__ import annotations

from torch import Tensor, nn

from vlfast.clip.models import ClipModel
from vlfast.clip.text_tower import TextOutput
from vlfast.clip.tokens import PromptTokens
from vlfast.prompts.base import Prompts
from vlfast.prompts.context import initial_context, words_behind
from vlfast.prompts.depth import check_text_depth, random_prompts


class DeepContext(Prompts):
    """Context vectors at the input, and others that replace them in the blocks 1 to depth - 1.

    Words of ``init`` behind the first n_ctx stay frozen between context and name: of "a photo of a"
    with two vectors, "of a" ([MaPLe] trainers/maple.py).

    context: fp32 [n_ctx, d]. deep: fp32 [n_ctx, d] for each block but the first, from N(0, 0.02).
    """

    def __init__(self, clip: ClipModel, n_ctx: int | None, init: str | None, depth: int) -> None:
        super().__init__()
        check_text_depth(clip, depth)
        self.context = nn.Parameter(initial_context(clip, n_ctx, init))
        n_ctx, d = self.context.shape
        self.frozen_words = words_behind(clip, n_ctx, init)
        self.deep = random_prompts(depth - 1, n_ctx, d)

    def tokenize(self, clip: ClipModel, classnames: tuple[str, ...], template: str) -> PromptTokens:
        words = " ".join(["{ctx}", *self.frozen_words.split(), "{name}."])
        return clip.text_tower.tokenize(classnames, words)

    def encode(
        self,
        clip: ClipModel,
        tokens: PromptTokens,
        index: Tensor | None = None,
        images: Tensor | None = None,
    ) -> TextOutput:
        return clip.text_tower(self.context, tokens, deep=list(self.deep), index=index)

    def context_vectors(self, images: Tensor | None = None) -> Tensor:
        """[n, d], at the input: those of deeper blocks do not live in the token embedding's
        space."""
        return self.context
