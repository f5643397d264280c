"""A CLIP with prompts as a classifier over class names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vlfast.clip.feature_cache import FeatureCache
from vlfast.clip.models import ClipModel
from vlfast.clip.text_tower import TextOutput
from vlfast.clip.words import check_vocabulary
from vlfast.prompts.base import Prompts

OTHER_NAMES_KEPT = 8  # sets of class names whose features are remembered
IMAGES_AT_ONCE = 32  # where every image has class features of its own


class PromptedClassifier:
    """Class names, prompts and a frozen CLIP. ``template`` holds one ``{}`` for the class name."""

    def __init__(
        self, clip: ClipModel, prompts: Prompts, classnames: Sequence[str], template: str
    ) -> None:
        if isinstance(classnames, str):
            raise TypeError(f"classnames: expected a sequence of names, got {classnames!r}")
        self.clip = clip
        self.prompts = prompts
        self.classnames = tuple(classnames)
        self.template = template
        if prompts.encodes_names:
            check_vocabulary(clip, self.classnames, "classnames")
        self.tokens = prompts.tokenize(clip, self.classnames, template)
        self._features = FeatureCache()
        self._with_other_names: dict[tuple[str, ...], PromptedClassifier] = {}

    def for_classes(self, classnames: Sequence[str]) -> PromptedClassifier:
        """The same prompts with other class names. ValueError for prompts bound to their own."""
        if self.prompts.class_bound and tuple(classnames) != self.classnames:
            raise ValueError(
                f"classnames: {self.prompts.kind} prompts know only the {len(self.classnames)} "
                f"classes they were learned for, got {', '.join(map(repr, classnames[:3]))}, ..."
            )
        names = tuple(classnames)
        if names == self.classnames:
            return self
        if names not in self._with_other_names:
            if len(self._with_other_names) == OTHER_NAMES_KEPT:
                del self._with_other_names[next(iter(self._with_other_names))]
            other = PromptedClassifier(self.clip, self.prompts, classnames, self.template)
            self._with_other_names[names] = other
        return self._with_other_names[names]

    def encode_images(self, pixels: Tensor | None, frozen: Tensor | None = None) -> Tensor:
        """Normalised features [B, D], fp32, differentiable to prompts in the image tower.

        pixels: preprocessed images [B, 3, S, S]. frozen: what the frozen image tower makes of them,
        where that is known; pixels may then be None unless the image tower has prompts.
        """
        features = self.prompts.encode_images(self.clip, pixels, frozen)
        return functional.normalize(features.float(), dim=-1)

    def encode_text(self, images: Tensor | None = None, index: Tensor | None = None) -> TextOutput:
        """Class features and context states, differentiable to the prompts.

        images: normalised features [B, D], which prompts of single images depend on. index: int64
        [K], encode only these classes.
        """
        return self.prompts.encode(self.clip, self.tokens, index, images)

    def class_features(self) -> Tensor:
        """Class features for evaluation, [C, D] without autograd: computed again only where the
        prompts or the model have changed. Not for prompts of single images."""
        if not self.prompts.learns_text:
            return self.encode_text().features
        modules = [*self.prompts.modules(), *self.clip.text_tower.text.modules()]
        learned = self.prompts.state_dict().values()
        return self._features.get(modules, lambda: self.encode_text().features, learned)

    @property
    def width(self) -> int:
        """D, the size of the features."""
        return self.prompts.width or self.clip.width

    def logits(self, images: Tensor, class_features: Tensor) -> Tensor:
        """Logit scale times cosine, fp32 [B, C], from normalised image features [B, D] and class
        features [C, D] or [B, C, D]."""
        return self.scaled_cosines(images, functional.normalize(class_features.float(), dim=-1))

    def scaled_cosines(self, images: Tensor, classes: Tensor) -> Tensor:
        """``logits`` of class features that are normalised. In fp32 under autocast too: half
        precision has steps of 0.06 at such scales."""
        with torch.autocast(images.device.type, enabled=False):
            classes = classes.float()
            scaled = self.clip.logit_scale.float() * images.float()
            if classes.ndim == 2:
                return scaled @ classes.T
            return torch.einsum("bd,bcd->bc", scaled, classes)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Logits [N, C] of normalised image features [N, D]."""
        if not self.prompts.per_image:
            return self.logits(images, self.class_features())
        return torch.cat(
            [
                self.logits(part, self.encode_text(part).features)
                for part in images.split(IMAGES_AT_ONCE)
            ]
        )
