"""What every objective has in common, and what it may read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor, nn

from vlfast.clip.models import ClipModel
from vlfast.clip.text_tower import TextOutput
from vlfast.errors import VlfastError
from vlfast.prompts import Prompts
from vlfast.prompts.classifier import PromptedClassifier


class Teacher(Protocol):
    """A frozen classifier that objectives learn from.

    logit_scale: its own factor on cosines, 0-d, any calibration included. width: D_t, the size of
    its features.
    """

    logit_scale: Tensor
    width: int

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Normalised features [B, D_t], fp32, without autograd, of images preprocessed for the
        student."""
        ...

    def class_features(self, classnames: Sequence[str], template: str | None = None) -> Tensor:
        """Normalised features [C, D_t], fp32, without autograd; computed once for the same names.

        template: instead of the teacher's own, where it has one.
        """
        ...


@dataclass(frozen=True)
class Task:
    """What is learned, known before the first step.

    classifier: over the class names that are learned from: the dataset's, or a dictionary's.
    dataset: its name, which chooses templates. labelled: whether the images' labels are of these
    class names, and objectives may use them.
    """

    classifier: PromptedClassifier
    dataset: str
    teacher: Teacher | None = None
    labelled: bool = True

    @property
    def clip(self) -> ClipModel:
        return self.classifier.clip

    @property
    def prompts(self) -> Prompts:
        return self.classifier.prompts


@dataclass
class Batch:
    """Some training images, and what frozen models make of them.

    labels: int64 [B]. pixels: preprocessed, [B, 3, S, S], or None where stored features stand for
    them. frozen: features of the frozen image tower, [B, D], not normalised; None where nobody
    needs them. teacher: normalised features of the teacher's image tower, [B, D_t], or None without
    a teacher. index: int64 [K] on the CPU, the classes that this step learns from where it does not
    learn from all of them (class-agnostic KDPL).
    """

    labels: Tensor
    pixels: Tensor | None = None
    frozen: Tensor | None = None
    teacher: Tensor | None = None
    index: Tensor | None = None


class Step:
    """One training step. What objectives read is computed when first read, once."""

    def __init__(self, task: Task, batch: Batch) -> None:
        self.task = task
        self.batch = batch

    @property
    def clip(self) -> ClipModel:
        return self.task.clip

    @property
    def prompts(self) -> Prompts:
        return self.task.prompts

    @property
    def labels(self) -> Tensor:
        """int64 [B]."""
        return self.batch.labels

    @cached_property
    def images(self) -> Tensor:
        """Normalised features [B, D]."""
        return self.task.classifier.encode_images(self.batch.pixels, self.batch.frozen)

    @cached_property
    def text(self) -> TextOutput:
        """Features of all classes, or those in ``batch.index``, before normalisation, and the
        context states."""
        images = self.images if self.prompts.per_image else None
        return self.task.classifier.encode_text(images, self.batch.index)

    @cached_property
    def logits(self) -> Tensor:
        """[B, C], logit scale applied, fp32."""
        return self.task.classifier.logits(self.images, self.text.features)

    @property
    def has_logits(self) -> bool:
        """Whether an objective has read ``logits``."""
        return "logits" in self.__dict__


class Objective(nn.Module):
    """A term of the loss. Subclasses set ``kind``, take their options as keyword arguments, and
    return named 0-d tensors, each of which is added to the loss times ``weight_of`` its name.

    ``needs_labels``, ``needs_teacher`` and ``needs_frozen`` (features of the frozen image tower,
    also where the prompts have replaced them) say what a batch must hold. Parameters that an
    objective registers in ``prepare`` are learned with the prompts.
    """

    kind: str
    needs_labels = False
    needs_teacher = False
    needs_frozen = False

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if not math.isfinite(weight):
            raise VlfastError(f"objectives: {self.kind} weight: expected a number, got {weight}")
        self.weight = weight

    def check(self, task: Task) -> None:
        """Raise ValueError or VlfastError, with the reason, where it makes no sense in this task.
        Before any work."""

    def prepare(self, task: Task) -> None:
        """Encode what stays the same in all steps; once, after ``check``."""

    def weight_of(self, term: str) -> float:
        """What the term of this name counts in the loss."""
        return self.weight

    def forward(self, step: Step) -> dict[str, Tensor]:
        raise NotImplementedError
