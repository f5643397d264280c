"""Guidance by hand-written class features: KgCoOp (arXiv 2303.13283)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from vlfast.data.templates import check_template, kgcoop_template
from vlfast.errors import VlfastError
from vlfast.objectives.base import Objective, Step, Task
from vlfast.objectives.hard_features import pool_features


class Guidance(Objective):
    """1 - the mean cosine of the class features with the frozen CLIP's, as the code has it ([Kg]
    trainers/kgcoop.py:310); the paper's squared distance of unit vectors is twice as much.

    template: of the frozen class features, with one ``{}``; KgCoOp's own for the dataset by
    default, which is the dataset's but for DTD.
    """

    kind = "guidance"

    def __init__(self, weight: float = 8.0, *, template: str | None = None) -> None:
        super().__init__(weight)
        if template is not None:
            check_template(template, "objectives: guidance template")
        self.template = template
        self._frozen: Tensor | None = None

    def check(self, task: Task) -> None:
        if not task.prompts.learns_text:
            raise VlfastError(
                "objectives: guidance compares learned class features with frozen ones, but those "
                f"of {task.prompts.kind!r} prompts depend on nothing that is learned"
            )

    def prepare(self, task: Task) -> None:
        classifier = task.classifier
        template = self.template or kgcoop_template(task.dataset, classifier.template)
        (features,) = pool_features(task.clip, classifier.classnames, [template], "guidance")
        self._frozen = functional.normalize(features, dim=-1)

    def forward(self, step: Step) -> dict[str, Tensor]:
        cosine = (step.classes * step.of_chosen(self._frozen)).sum(dim=-1)
        return {"guidance": 1 - cosine.mean()}
