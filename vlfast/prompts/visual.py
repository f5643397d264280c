"""Prompts in the image tower alone: VPT."""

from __future__ import annotations

from torch import Tensor

from vlfast.clip.models import ClipModel
from vlfast.clip.text_tower import TextOutput
from vlfast.clip.tokens import PromptTokens
from vlfast.clip.words import check_vocabulary
from vlfast.prompts.base import Prompts
from vlfast.prompts.context import PADDED, check_count
from vlfast.prompts.depth import check_visual_depth, random_prompts


class VisualPrompts(Prompts):
    """Tokens beside the patches of every image: VPT (arXiv 2203.12119), section 3.2, deep, on CLIP
    as [MaPLe] trainers/vpt.py has it.

    The text is a fixed one, "a photo of a <class>." for every dataset, or the words of ``init``
    instead of those before the name.

    visual: fp32 [n_visual, width] for each of the first ``visual_depth`` blocks, from N(0, 0.02);
    by default 8 tokens in all of them.
    """

    kind = "visual"
    learns_images = True

    def __init__(
        self,
        clip: ClipModel,
        *,
        init: str | None = None,
        n_visual: int | None = None,
        visual_depth: int | None = None,
    ) -> None:
        super().__init__()
        n_visual = 8 if n_visual is None else n_visual
        check_count("n_visual", n_visual)
        tower = clip.vision_tower
        visual_depth = tower.depth if visual_depth is None else visual_depth
        check_visual_depth(clip, visual_depth)
        self.words = "a photo of a" if init is None else init.removeprefix(PADDED).strip()
        check_vocabulary(clip, [self.words], "init")
        self.visual = random_prompts(visual_depth, n_visual, tower.width)

    def tokenize(self, clip: ClipModel, classnames: tuple[str, ...], template: str) -> PromptTokens:
        return clip.text_tower.tokenize(classnames, f"{self.words} {{name}}.")

    def encode(
        self,
        clip: ClipModel,
        tokens: PromptTokens,
        index: Tensor | None = None,
        images: Tensor | None = None,
    ) -> TextOutput:
        return clip.text_tower(None, tokens, index=index)

    def encode_images(
        self, clip: ClipModel, pixels: Tensor | None, frozen: Tensor | None = None
    ) -> Tensor:
        return clip.vision_tower(pixels, list(self.visual))
