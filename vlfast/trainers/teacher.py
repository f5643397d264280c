"""Frozen models to learn from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vlfast.clip.models import ClipModel
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.prompts.hard import HardPrompt


class ModelTeacher:
    """A CLIP with its prompts: a hard template, or what another run has learned.

    student: whose preprocessing the images have; they are resized and normalised anew where the
    teacher's differs. calibration: a temperature that divides its logits.
    """

    def __init__(
        self, classifier: PromptedClassifier, student: ClipModel, *, calibration: float = 1.0
    ) -> None:
        clip = classifier.clip
        self.classifier = classifier
        self.calibration = calibration
        self.logit_scale = clip.logit_scale.float() / calibration
        self._size = clip.image_size if clip.image_size != student.image_size else None
        self._affine: tuple[Tensor, Tensor] | None = None
        if (clip.mean, clip.std) != (student.mean, student.std):
            mean, std, own_mean, own_std = (
                torch.tensor(v, device=clip.device).reshape(3, 1, 1)
                for v in (student.mean, student.std, clip.mean, clip.std)
            )
            self._affine = (std / own_std, (mean - own_mean) / own_std)

    @property
    def width(self) -> int:
        return self.class_features(self.classifier.classnames[:1]).shape[-1]

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Normalised features [B, D_t], fp32; see ``Teacher``."""
        if self._size is not None:
            pixels = functional.interpolate(
                pixels, size=(self._size, self._size), mode="bicubic", antialias=True
            )
        if self._affine is not None:
            pixels = pixels * self._affine[0] + self._affine[1]
        return self.classifier.encode_images(pixels)

    @torch.no_grad()
    def class_features(self, classnames: Sequence[str], template: str | None = None) -> Tensor:
        """Normalised features [C, D_t], fp32; see ``Teacher``."""
        classifier = self.classifier
        own = template in (None, classifier.template)
        if not own and isinstance(classifier.prompts, HardPrompt):
            classifier = PromptedClassifier(
                classifier.clip, classifier.prompts, classnames, template
            )
        features = classifier.for_classes(classnames).class_features()
        return functional.normalize(features.float(), dim=-1)
