"""Distillation of a teacher's predictions: KDPL (arXiv 2407.03056), PromptKD (2403.02781)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vlfast.errors import VlfastError
from vlfast.objectives.base import Objective, Step, Task, check_number, cosines
from vlfast.ops import symmetric_kl_loss


class Distillation(Objective):
    """The divergence between the teacher's predictions and the student's.

    temperature**2 * (forward_weight * KL(teacher || student) + reverse_weight * KL(student ||
    teacher)), both softened by ``temperature``. The defaults are KDPL's loss ([KDPL]
    trainers/coop_kdpl.py:116-123, the student's logit scale on both sides); PromptKD's ([PKD]
    trainers/promptkd.py:410-416) is ``weight=1000, forward_weight=1, reverse_weight=0,
    scale="teacher", reduction="mean"``.

    scale: whose logit scale the teacher's cosines get; its calibration divides them in any case.
    reduction: "batchmean" divides by the images, "mean" by the classes too.
    """

    kind = "teacher"
    needs_teacher = True

    def __init__(
        self,
        weight: float = 1.0,
        *,
        forward_weight: float = 0.5,
        reverse_weight: float = 0.5,
        temperature: float = 1.0,
        scale: Literal["student", "teacher"] = "student",
        reduction: Literal["batchmean", "mean"] = "batchmean",
    ) -> None:
        super().__init__(weight)
        check_number(forward_weight, "teacher forward_weight")
        check_number(reverse_weight, "teacher reverse_weight")
        check_number(temperature, "teacher temperature", zero=False)
        if forward_weight == reverse_weight == 0:
            raise VlfastError(
                "objectives: teacher forward_weight and reverse_weight: expected one above 0, "
                "got 0 and 0"
            )
        self.forward_weight = forward_weight
        self.reverse_weight = reverse_weight
        self.temperature = temperature
        self.scale = scale
        self.reduction = reduction
        self._class_features: Tensor | None = None

    def prepare(self, task: Task) -> None:
        teacher = task.teacher
        self._scale = teacher.logit_scale
        if self.scale == "student":
            self._scale = task.clip.logit_scale.float() / teacher.calibration
        if task.candidates is None:
            template = task.classifier.template if task.from_dictionary else None
            names = task.classifier.classnames
            self._class_features = teacher.class_features(names, template)

    def forward(self, step: Step) -> dict[str, Tensor]:
        chosen = step.batch.chosen
        if chosen is None:
            of_teacher, index = cosines(step.batch.teacher, self._class_features), None
        else:
            of_teacher, index = chosen.teacher_cosines, chosen.on_device
        loss = symmetric_kl_loss(
            step.logits,
            of_teacher,
            teacher_scale=self._scale,
            temperature=self.temperature,
            forward_weight=self.forward_weight,
            reverse_weight=self.reverse_weight,
            index=index,
            reduction=self.reduction,
        )
        return {"teacher": self.temperature**2 * loss}
