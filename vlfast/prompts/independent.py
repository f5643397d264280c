"""Deep prompts in both towers, learned apart: IVLP, which PromptSRC regularises."""

from __future__ import annotations

from torch import Tensor, nn

from vlfast.clip.models import ClipModel
from vlfast.prompts.context import check_count
from vlfast.prompts.deep import DeepContext
from vlfast.prompts.depth import check_visual_depth, random_prompts


class IndependentPrompts(DeepContext):
    """Context in the first ``depth`` blocks of the text tower and, if ``n_visual`` is given, tokens
    in the first ``visual_depth`` (by default ``depth``) blocks of the image tower: independent
    vision-language prompting ([MaPLe] trainers/independentVL.py), the host of PromptSRC
    (arXiv 2307.06948). Without tokens in the image tower it is deep language prompting.

    context, deep: see DeepContext. visual: fp32 [n_visual, width] for each block of the image
    tower, from N(0, 0.02).
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
        super().__init__(clip, n_ctx, init, depth)
        self.learns_images = bool(n_visual)
        self.visual = nn.ParameterList()
        if n_visual:
            check_count("n_visual", n_visual)
            visual_depth = depth if visual_depth is None else visual_depth
            check_visual_depth(clip, visual_depth)
            self.visual = random_prompts(visual_depth, n_visual, clip.vision_tower.width)

    def encode_images(
        self, clip: ClipModel, pixels: Tensor | None, frozen: Tensor | None = None
    ) -> Tensor:
        if not self.learns_images:
            return super().encode_images(clip, pixels, frozen)
        return clip.vision_tower(pixels, list(self.visual))
