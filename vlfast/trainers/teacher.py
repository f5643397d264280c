"""Frozen models to learn from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vlfast.clip.models import ClipModel
from vlfast.data.templates import check_template
from vlfast.errors import VlfastError
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.prompts.hard import HardPrompt
from vlfast.trainers.config import TeacherConfig
from vlfast.trainers.feature_store import About, FeatureStore, hash_of_weights


def check_teacher(options: TeacherConfig) -> None:
    """Raise VlfastError for options that contradict each other or make no sense."""
    given = [f"teacher.{n}" for n in ("name", "run", "features") if getattr(options, n) is not None]
    if len(given) > 1:
        raise VlfastError(
            f"teacher: expected one of name, run and features, got {', '.join(given)}"
        )
    if options.pretrained is not None and options.name is None:
        raise VlfastError(
            f"teacher.pretrained: expected with teacher.name, got {options.pretrained!r} alone"
        )
    if options.template is not None:
        check_template(options.template, "teacher.template")
    if not 0 < options.calibration < math.inf:
        raise VlfastError(f"teacher.calibration: expected above 0, got {options.calibration}")


class ModelTeacher:
    """A CLIP with its prompts: a hard template, or what another run has learned.

    student: whose preprocessing the images have; they are resized and normalised anew where the
    teacher's differs. calibration: a temperature that divides its logits. Prompts are frozen in
    place. Raises VlfastError for prompts without class features (conditional ones).
    """

    def __init__(
        self, classifier: PromptedClassifier, student: ClipModel, *, calibration: float = 1.0
    ) -> None:
        clip, prompts = classifier.clip, classifier.prompts
        if prompts.per_image:
            raise VlfastError(
                f"teacher: {prompts.kind} prompts give every image class features of its own, so "
                "there are none to learn from; choose a run with other prompts"
            )
        prompts.eval().requires_grad_(False)
        self.classifier = classifier
        self.calibration = calibration
        self.logit_scale = clip.logit_scale.float() / calibration
        self.width = classifier.width
        self._size = clip.image_size if clip.image_size != student.image_size else None
        self._affine: tuple[Tensor, Tensor] | None = None
        if (clip.mean, clip.std) != (student.mean, student.std):
            mean, std, own_mean, own_std = (
                torch.tensor(v, device=clip.device).reshape(3, 1, 1)
                for v in (student.mean, student.std, clip.mean, clip.std)
            )
            self._affine = (std / own_std, (mean - own_mean) / own_std)

    @property
    def template(self) -> str | None:
        """The text of its class features; None where the context is learned."""
        return self.classifier.template if self._is_hard else None

    @property
    def _is_hard(self) -> bool:
        return isinstance(self.classifier.prompts, HardPrompt)

    def about(self) -> About:
        """What tells it from other teachers."""
        clip = self.classifier.clip
        return {
            "name": clip.name,
            "pretrained": clip.pretrained,
            "weights": hash_of_weights(clip.model.visual, self.classifier.prompts),
            "template": self.template,
            "logit_scale": clip.logit_scale.item(),
        }

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
        if template not in (None, classifier.template) and self._is_hard:
            classifier = PromptedClassifier(
                classifier.clip, classifier.prompts, classnames, template
            )
        features = classifier.for_classes(classnames).class_features()
        return functional.normalize(features.float(), dim=-1)


class StoredTeacher:
    """A teacher of which only features are kept: of the training images, and of the classes.

    Raises VlfastError for a folder without a teacher's features, or damaged ones.
    """

    def __init__(
        self, store: FeatureStore, device: torch.device, *, calibration: float = 1.0
    ) -> None:
        self.store = store
        self.calibration = calibration
        names, features = store.class_features()
        self._features = features.to(device)
        self._row_of = {name: row for row, name in reversed(list(enumerate(names)))}
        self._names = names
        self.template: str | None = store.teacher["template"]
        self.width = features.shape[1]
        self.logit_scale = torch.tensor(store.teacher["logit_scale"], device=device) / calibration

    def encode_images(self, pixels: Tensor) -> Tensor:
        """There is no model: raises VlfastError."""
        raise VlfastError(
            f"{self.store.option}: {self.store.path} holds the teacher's features of training "
            "images, but no model to encode others with"
        )

    def class_features(self, classnames: Sequence[str], template: str | None = None) -> Tensor:
        """Normalised features [C, D_t], fp32, of classes that are stored. VlfastError for others,
        and for another template."""
        if template is not None and self.template not in (None, template):
            raise VlfastError(
                f"{self.store.option}: {self.store.path} holds class features of the text "
                f"{self.template!r}, got {template!r}"
            )
        if tuple(classnames) == self._names:
            return self._features
        missing = [name for name in classnames if name not in self._row_of]
        if missing:
            raise VlfastError(
                f"{self.store.option}: {self.store.path} holds features of {len(self._names)} "
                f"classes, not of {', '.join(map(repr, missing[:3]))}"
                f"{', ...' if len(missing) > 3 else ''}"
            )
        return self._features[[self._row_of[name] for name in classnames]]
