"""Cross-entropy with the labels: CoOp (arXiv 2109.01134), section 3.2."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from vlfast.objectives.base import Objective, Step


class Labels(Objective):
    """Cross-entropy of the logits with the labels, batch mean."""

    kind = "labels"
    needs_labels = True

    def forward(self, step: Step) -> dict[str, Tensor]:
        return {"labels": functional.cross_entropy(step.logits, step.labels)}
