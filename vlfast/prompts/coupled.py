"""Deep prompts in both towers, the image tower's made from the text tower's: MaPLe."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from vlfast.clip.models import ClipModel
from vlfast.clip.text_tower import TextOutput
from vlfast.clip.tokens import PromptTokens
from vlfast.prompts.base import Prompts
from vlfast.prompts.context import initial_context, words_behind
from vlfast.prompts.depth import check_text_depth, check_visual_depth, random_prompts


class CoupledPrompts(Prompts):
    """Context in the first ``depth`` blocks of the text tower, and a projection of it in the same
    blocks of the image tower: MaPLe (arXiv 2210.03117), section 3.2.

    Words of ``init`` behind the first n_ctx stay frozen between context and name.

    context: fp32 [n_ctx, d]. deep: fp32 [n_ctx, d] for each of the blocks 1 to depth - 1, from
    N(0, 0.02). projections: Linear(d, width of the image tower) for each of the ``depth`` blocks,
    in PyTorch's default initialisation; those behind the first start as copies of one.
    """

    kind = "coupled"
    learns_images = True

    def __init__(
        self,
        clip: ClipModel,
        *,
        n_ctx: int | None = 2,
        init: str | None = "a photo of a",
        depth: int = 9,
    ) -> None:
        super().__init__()
        check_text_depth(clip, depth)
        check_visual_depth(clip, depth, "depth")
        self.context = nn.Parameter(initial_context(clip, n_ctx, init))
        n_ctx, d = self.context.shape
        self.frozen_words = words_behind(clip, n_ctx, init)
        self.deep = random_prompts(depth - 1, n_ctx, d)
        first, another = (nn.Linear(d, clip.vision_tower.width) for _ in range(2))
        copies = (copy.deepcopy(another) for _ in range(depth - 1))
        self.projections = nn.ModuleList([first, *copies])

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
        texts = [self.context, *self.deep]
        visual = [project(x) for project, x in zip(self.projections, texts, strict=True)]
        return clip.vision_tower(pixels, visual)

    def context_vectors(self, images: Tensor | None = None) -> Tensor:
        """[n, d], at the input: those of deeper blocks do not live in the token embedding's
        space."""
        return self.context
