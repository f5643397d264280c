"""A hard prompt: the dataset's template, nothing learned (zero-shot CLIP, arXiv 2103.00020)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlfast.clip.models import ClipModel
from vlfast.clip.text_tower import TextOutput
from vlfast.clip.tokens import PromptTokens
from vlfast.prompts.base import Prompts


class HardPrompt(Prompts):
    """The class names in the dataset's template."""

    kind = "hard"

    def tokenize(self, clip: ClipModel, classnames: tuple[str, ...], template: str) -> PromptTokens:
        return clip.text_tower.tokenize(classnames, template.format("{name}"))

    @torch.no_grad()
    def encode(
        self,
        clip: ClipModel,
        tokens: PromptTokens,
        index: Tensor | None = None,
        images: Tensor | None = None,
    ) -> TextOutput:
        return clip.text_tower(None, tokens, index=index)
