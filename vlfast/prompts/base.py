"""What every kind of prompts has in common."""

from __future__ import annotations

from torch import Tensor, nn

from vlfast.clip.models import ClipModel
from vlfast.clip.text_tower import TextOutput
from vlfast.clip.tokens import PromptTokens


class Prompts(nn.Module):
    """Where learnable tokens live, and how class features come of them.

    Subclasses set ``kind``, hold their learnable tensors as fp32 parameters, and implement
    ``encode``. They keep no reference to the CLIP. ``class_bound`` says that they know only the
    classes they were made for.
    """

    kind: str
    class_bound = False

    def tokenize(self, clip: ClipModel, classnames: tuple[str, ...], template: str) -> PromptTokens:
        """Lay out class names; ``template`` is the dataset's own, with ``{}`` for the name."""
        return clip.text_tower.tokenize(classnames, "{ctx} {name}.")

    def encode(
        self,
        clip: ClipModel,
        tokens: PromptTokens,
        index: Tensor | None = None,
    ) -> TextOutput:
        """Class features [C, D], differentiable to the learnable tensors; not normalised.

        index: int64 [K], encode only these classes.
        """
        raise NotImplementedError

    def context_vectors(self) -> Tensor | None:
        """The learned vectors that live in the token embedding's space: [n, d] or [C, n, d],
        or None if there are none. Objectives on words (perplexity) and the nearest-word display
        read them."""
        return None
