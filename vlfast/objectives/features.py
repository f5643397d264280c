"""Image features as near as can be to the teacher's: PromptKD's ablation (arXiv 2403.02781)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vlfast.errors import VlfastError
from vlfast.objectives.base import Objective, Step, Task


class Features(Objective):
    """The mean absolute ("l1") or squared ("mse") difference, over all elements, between normalised
    image features of student and teacher."""

    kind = "features"
    needs_teacher = True

    def __init__(self, weight: float = 1.0, *, loss: Literal["l1", "mse"] = "l1") -> None:
        super().__init__(weight)
        self.loss = loss

    def check(self, task: Task) -> None:
        if not task.prompts.learns_images:
            raise VlfastError(
                "objectives: features compares learned image features with the teacher's, but "
                f"those of {task.prompts.kind!r} prompts depend on nothing that is learned"
            )
        own, wanted = task.classifier.width, task.teacher.width
        if own != wanted:
            raise VlfastError(
                f"objectives: features needs image features as wide as the teacher's, got {own} "
                f"and {wanted}; prompts.projector makes them so"
            )

    def forward(self, step: Step) -> dict[str, Tensor]:
        difference = step.images - step.batch.teacher
        apart = difference.abs() if self.loss == "l1" else difference.square()
        return {"features": apart.mean()}
