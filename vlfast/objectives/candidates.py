"""Which names of a dictionary a step learns from: KDPL's class-agnostic mode (arXiv 2407.03056)."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from vlfast.data.dictionary import DICTIONARY_TEMPLATE
from vlfast.errors import VlfastError
from vlfast.objectives.base import ChosenClasses, Task, cosines


class Candidates:
    """In each batch the ``top_classes`` names that the teacher finds most probable: by the mean
    over its images of the softmax over the whole dictionary ([KDPL] kdpl_utils.py:148-164), under
    the student's logit scale divided by the teacher's calibration, as the distillation has it.

    The choice is made on the device and never waited for there: the text tower needs it on the CPU
    one step later, when the copy has long arrived. Under several processes all choose the same, by
    the mean over all their images.
    """

    def __init__(self, top_classes: int) -> None:
        if top_classes < 2:
            raise VlfastError(
                f"data.top_classes: expected at least 2 names to learn from, got {top_classes}"
            )
        self.top_classes = top_classes

    def prepare(self, task: Task) -> None:
        """Encode the dictionary with the teacher, once."""
        teacher, names = task.teacher, task.classifier.classnames
        self._class_features = teacher.class_features(names, DICTIONARY_TEMPLATE)
        self._scale = task.clip.logit_scale.float() / teacher.calibration

    @torch.no_grad()
    def choose(self, teacher_images: Tensor) -> ChosenClasses:
        """The choice for a batch, from the teacher's normalised features [B, D_t] of its images."""
        of_all = cosines(teacher_images, self._class_features)
        probable = torch.softmax(self._scale * of_all, dim=1).sum(dim=0)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(probable)
        index = probable.topk(self.top_classes, sorted=False).indices
        if index.is_cpu:
            return ChosenClasses(index, of_all, index)
        copy = torch.empty(index.shape, dtype=index.dtype, pin_memory=True)
        copy.copy_(index, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return ChosenClasses(index, of_all, copy, copied)
