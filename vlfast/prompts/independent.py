"""Deep prompts in both towers, learned apart: IVLP, which PromptSRC regularises."""

from __future__ import annotations

from torch import Tensor, nn

from vlfast.clip.models import ClipModel
from vlfast.clip.text_tower import TextOutput
from vlfast.clip.tokens import PromptTokens
from vlfast.prompts.base import Prompts
from vlfast.prompts.context import check_count, initial_context, words_behind
from vlfast.prompts.depth import check_text_depth, check_visual_depth, random_prompts


class IndependentPrompts(Prompts):
    """Context in the first ``depth`` blocks of the text tower and, if ``n_visual`` is given, tokens
    in the first ``visual_depth`` (by default ``depth``) blocks of the image tower: independent
    vision-language prompting ([MaPLe] trainers/independentVL.py), the host of PromptSRC
    (arXiv 2307.06948). Without tokens in the image tower it is deep language prompting.

    Words of ``init`` behind the first n_ctx stay frozen between context and name.

    context: fp32 [n_ctx, d]. deep: fp32 [n_ctx, d] for each of the blocks 1 to depth - 1, and
    visual: fp32 [n_visual, width] for each block, both from N(0, 0.02).
    """

    kind = "independent"

    def __init__(
        self,
        clip: ClipModel,
        *,
        n_ctx: int | None = 2,
        init: str | None = "a photo of a",
        depth: int = 12,
        n_visual: int | None = 2,
        visual_depth: int | None = None,
    ) -> None:
        super().__init__()
        check_text_depth(clip, depth)
        visual_depth = depth if visual_depth is None else visual_depth
        if n_visual:
            check_count("n_visual", n_visual)
            check_visual_depth(clip, visual_depth)
        self.learns_images = bool(n_visual)
        self.context = nn.Parameter(initial_context(clip, n_ctx, init))
        n_ctx, d = self.context.shape
        self.frozen_words = words_behind(clip, n_ctx, init)
        self.deep = random_prompts(depth - 1, n_ctx, d)
        self.visual = (
            random_prompts(visual_depth, n_visual, clip.vision_tower.width)
            if n_visual
            else nn.ParameterList()
        )

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

    def encode_images(
        self, clip: ClipModel, pixels: Tensor | None, frozen: Tensor | None = None
    ) -> Tensor:
        if not self.learns_images:
            return super().encode_images(clip, pixels, frozen)
        return clip.vision_tower(pixels, list(self.visual))

    def context_vectors(self, images: Tensor | None = None) -> Tensor:
        """[n, d], at the input: those of deeper blocks do not live in the token embedding's
        space."""
        return self.context
