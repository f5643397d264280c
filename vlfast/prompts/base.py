"""What every kind of prompts has in common."""

from __future__ import annotations

from torch import Tensor, nn

from vlfast.clip.models import ClipModel
from vlfast.clip.text_tower import TextOutput
from vlfast.clip.tokens import PromptTokens


class Prompts(nn.Module):
    """Where learnable tokens live, and how class and image features come of them.

    Subclasses set ``kind``, hold their learnable tensors as fp32 parameters, and implement
    ``encode``; those with prompts in the image tower ``encode_images`` too. They keep no reference
    to the CLIP. ``class_bound`` says that they know only the classes they were made for,
    ``per_image`` that the class features depend on the image, ``learns_images`` that the image
    features depend on what is learned, ``reads_pixels`` that those of the frozen image tower are
    not enough for them, ``encodes_names`` that the class features are encoded from the class names
    by the CLIP's own text tower. ``least_batch``: images that a training step needs. ``width``: of
    the features, where it is not the CLIP's.
    """

    kind: str
    class_bound = False
    per_image = False
    learns_images = False
    encodes_names = True
    least_batch = 1
    width: int | None = None

    @property
    def learns_text(self) -> bool:
        """Whether the class features depend on what is learned."""
        return self.context_vectors() is not None

    @property
    def reads_pixels(self) -> bool:
        return self.learns_images

    @property
    def num_context(self) -> int | None:
        """How many context vectors there are before a class name; None without a context."""
        vectors = self.context_vectors()
        return None if vectors is None else vectors.shape[-2]

    def tokenize(self, clip: ClipModel, classnames: tuple[str, ...], template: str) -> PromptTokens:
        """Lay out class names; ``template`` is the dataset's own, with ``{}`` for the name."""
        return clip.text_tower.tokenize(classnames, "{ctx} {name}.")

    def encode(
        self,
        clip: ClipModel,
        tokens: PromptTokens,
        index: Tensor | None = None,
        images: Tensor | None = None,
    ) -> TextOutput:
        """Class features [C, D], or [B, C, D] where ``per_image``, differentiable to the learnable
        tensors; not normalised.

        index: int64 [K], encode only these classes. images: normalised features [B, D]; needed
        where ``per_image``.
        """
        raise NotImplementedError

    def encode_images(
        self, clip: ClipModel, pixels: Tensor | None, frozen: Tensor | None = None
    ) -> Tensor:
        """Image features [B, D], not normalised.

        pixels: preprocessed images [B, 3, S, S]. frozen: the features of the frozen image tower,
        not normalised, where they are known.
        """
        return clip.encode_images(pixels, normalize=False) if frozen is None else frozen

    def context_vectors(self, images: Tensor | None = None) -> Tensor | None:
        """The learned vectors that live in the token embedding's space: [n, d], [C, n, d], or, with
        ``images`` (normalised features [B, D]) where ``per_image``, [B, n, d]; None if there are
        none. Objectives on words (perplexity) and the nearest-word display read them."""
        return None
