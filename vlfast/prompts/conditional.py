"""A context that depends on the image: CoCoOp."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from vlfast.clip.models import ClipModel
from vlfast.clip.text_tower import TextOutput
from vlfast.clip.tokens import PromptTokens
from vlfast.prompts.base import Prompts
from vlfast.prompts.context import initial_context


class ConditionalContext(Prompts):
    """One context for all classes, moved by every image: CoCoOp (arXiv 2203.05557), section 3.2.

    A small network makes a vector of the image's normalised feature, which is added to every
    context vector: v_m(x) = v_m + h(x). Every image so has class features of its own.

    context: fp32 [n_ctx, d]. meta_net: Linear(D, D // 16), ReLU, Linear(D // 16, d), in PyTorch's
    default initialisation, as in the authors' code.
    """

    kind = "conditional"
    per_image = True

    def __init__(
        self, clip: ClipModel, *, n_ctx: int | None = 4, init: str | None = "a photo of a"
    ) -> None:
        super().__init__()
        features, hidden = clip.width, max(1, clip.width // 16)
        self.context = nn.Parameter(initial_context(clip, n_ctx, init))
        layers = [
            ("linear1", nn.Linear(features, hidden)),
            ("relu", nn.ReLU()),
            ("linear2", nn.Linear(hidden, clip.text_tower.width)),
        ]
        self.meta_net = nn.Sequential(OrderedDict(layers))

    def encode(
        self,
        clip: ClipModel,
        tokens: PromptTokens,
        index: Tensor | None = None,
        images: Tensor | None = None,
    ) -> TextOutput:
        if images is None:
            raise ValueError(
                "images: conditional prompts depend on the image, expected features [B, D], got "
                "None"
            )
        return clip.text_tower(self.context_vectors(images), tokens, per="image", index=index)

    def context_vectors(self, images: Tensor | None = None) -> Tensor:
        """[B, n, d], or without images the vectors that they move, [n, d]."""
        if images is None:
            return self.context
        moved = self.meta_net(images.to(self.context.dtype))
        return self.context + moved.to(self.context.dtype).unsqueeze(1)
