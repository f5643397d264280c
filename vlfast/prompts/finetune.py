"""No prompts at all: every weight of the image tower learns."""

from __future__ import annotations

import copy

from torch import Tensor

from vlfast.clip.models import ClipModel
from vlfast.prompts.hard import HardPrompt


class FineTunedImages(HardPrompt):
    """A copy of the image tower, all of whose weights learn, against class features of the
    dataset's template: full fine-tuning, which PromptKD (arXiv 2403.02781) compares itself
    with.

    visual: the copy, in fp32 and always in eval mode, so that batch norm keeps the statistics that
    the model came with. It may be of any kind, a ResNet too.
    """

    kind = "finetune"
    learns_images = True

    def __init__(self, clip: ClipModel) -> None:
        super().__init__()
        self.visual = copy.deepcopy(clip.model.visual).float().requires_grad_(True).eval()

    def train(self, mode: bool = True) -> FineTunedImages:
        super().train(mode)
        self.visual.eval()
        return self

    def encode_images(
        self, clip: ClipModel, pixels: Tensor | None, frozen: Tensor | None = None
    ) -> Tensor:
        features = self.visual(pixels.float())
        return features[0] if isinstance(features, tuple) else features
