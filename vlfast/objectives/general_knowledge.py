"""The loss whose gradient tells what zero-shot CLIP knows: ProGrad (arXiv 2205.14865)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from vlfast.data.templates import prograd_template
from vlfast.objectives.base import Objective, Step, Task, cosines
from vlfast.objectives.hard_features import pool_features


class GeneralKnowledge(Objective):
    """The cross-entropy of the predictions with those of zero-shot CLIP, in ProGrad's own template
    for the dataset ([Kg] trainers/prograd.py:280-293: the KL divergence, but for the entropy of the
    targets). It is not minimised: ``vlfast.trainers.gradient_projection`` reads its gradient.
    """

    kind = "general_knowledge"
    needs_frozen = True

    def prepare(self, task: Task) -> None:
        classifier = task.classifier
        template = prograd_template(task.dataset, classifier.template)
        (features,) = pool_features(task.clip, classifier.classnames, [template], "projection")
        self._frozen = functional.normalize(features, dim=-1)
        self._scale = task.clip.logit_scale.float()

    def forward(self, step: Step) -> dict[str, Tensor]:
        of_zero_shot = cosines(step.frozen_images, step.of_chosen(self._frozen))
        targets = (self._scale * of_zero_shot).softmax(dim=-1)
        return {self.kind: functional.cross_entropy(step.logits, targets)}
