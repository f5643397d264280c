"""What every objective has in common, and what it may read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlfast.clip.models import ClipModel
from vlfast.clip.text_tower import TextOutput
from vlfast.errors import VlfastError
from vlfast.prompts import Prompts
from vlfast.prompts.classifier import PromptedClassifier

if TYPE_CHECKING:
    from vlfast.objectives.candidates import Candidates


class Teacher(Protocol):
    """A frozen classifier that objectives learn from.

    logit_scale: its own factor on cosines, 0-d, divided by the calibration. calibration: a
    temperature that divides its logits, whoever's scale they have. width: D_t, the size of its
    features.
    """

    logit_scale: Tensor
    calibration: float
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
    dataset: its name, which chooses templates; "" for a dictionary, which has the classifier's.
    labelled: whether the images' labels are of these class names, and objectives may use them.
    candidates: choose some of the names in each step; None where it learns from all.
    """

    classifier: PromptedClassifier
    dataset: str
    teacher: Teacher | None = None
    labelled: bool = True
    candidates: Candidates | None = None

    @property
    def from_dictionary(self) -> bool:
        return not self.dataset

    @property
    def clip(self) -> ClipModel:
        return self.classifier.clip

    @property
    def prompts(self) -> Prompts:
        return self.classifier.prompts


@dataclass
class ChosenClasses:
    """The classes that a step learns from, where it does not learn from all.

    on_device: int64 [K]. teacher_cosines: of the images with all N classes, fp32 [B, N]. copy:
    the same index on the CPU, or on its way there. copied: the event at which it has arrived.
    """

    on_device: Tensor
    teacher_cosines: Tensor
    copy: Tensor
    copied: torch.cuda.Event | None = None

    @property
    def on_cpu(self) -> Tensor:
        """int64 [K]; waits for what was queued before the copy, and for nothing after it."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.copy


@dataclass
class Batch:
    """Some training images, and what frozen models make of them.

    labels: int64 [B]. pixels: preprocessed, [B, 3, S, S], or None where stored features stand for
    them. frozen: features of the frozen image tower, [B, D], not normalised; None where nobody
    needs them. teacher: normalised features of the teacher's image tower, [B, D_t], or None without
    a teacher. chosen: the classes that this step learns from where it does not learn from all of
    them (class-agnostic KDPL).
    """

    labels: Tensor
    pixels: Tensor | None = None
    frozen: Tensor | None = None
    teacher: Tensor | None = None
    chosen: ChosenClasses | None = None


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
    def frozen_images(self) -> Tensor:
        """Normalised features [B, D], fp32, of the frozen image tower, without autograd; only for
        objectives with ``needs_frozen`` where the prompts learn images."""
        if not self.prompts.learns_images:
            return self.images
        return functional.normalize(self.batch.frozen.float(), dim=-1)

    @cached_property
    def text(self) -> TextOutput:
        """Features of all classes, or of those that were chosen, before normalisation, and the
        context states."""
        images = self.images if self.prompts.per_image else None
        chosen = self.batch.chosen
        index = None if chosen is None else chosen.on_cpu
        return self.task.classifier.encode_text(images, index)

    @cached_property
    def classes(self) -> Tensor:
        """Normalised class features, fp32, [C, D] or [B, C, D]."""
        return functional.normalize(self.text.features.float(), dim=-1)

    @cached_property
    def logits(self) -> Tensor:
        """[B, C], logit scale applied, fp32."""
        return self.task.classifier.scaled_cosines(self.images, self.classes)

    def of_chosen(self, values: Tensor) -> Tensor:
        """The rows [K, ...] of what there is for every class [N, ...]."""
        chosen = self.batch.chosen
        return values if chosen is None else values[chosen.on_device]

    @property
    def has_logits(self) -> bool:
        """Whether an objective has read ``logits``."""
        return "logits" in self.__dict__


class Objective(nn.Module):
    """A term of the loss. Subclasses set ``kind``, take their options as keyword arguments, and
    return named 0-d tensors, each of which is added to the loss times ``weight_of`` its name.

    ``needs_labels``, ``needs_teacher`` and ``needs_frozen`` (features of the frozen image tower,
    also where the prompts have replaced them) say what a batch must hold. ``without_labels`` is
    the advice where there are none. Parameters that an objective registers in ``prepare`` are
    learned with the prompts.
    """

    kind: str
    needs_labels = False
    without_labels = "learn from a teacher instead (--objective teacher)"
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


def cosines(images: Tensor, classes: Tensor) -> Tensor:
    """[B, C], fp32, also under autocast, of normalised features [B, D] and [C, D]."""
    with torch.autocast(images.device.type, enabled=False):
        return images.float() @ classes.float().T


def check_number(value: float, what: str, *, zero: bool = True) -> None:
    """Raise VlfastError, naming the option, unless it is finite and at least (or, without
    ``zero``, above) 0."""
    if not (0 < value < math.inf or (zero and value == 0)):
        wanted = "at least 0" if zero else "above 0"
        raise VlfastError(f"objectives: {what}: expected {wanted}, got {value}")
