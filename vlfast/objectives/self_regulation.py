"""Self-regulation by the frozen CLIP: PromptSRC (arXiv 2307.06948)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from vlfast.data.templates import template_pool
from vlfast.errors import VlfastError
from vlfast.objectives.base import Objective, Step, Task, check_number, cosines
from vlfast.objectives.hard_features import pool_features
from vlfast.ops import symmetric_kl_loss


class SelfRegulation(Objective):
    """The distance from the frozen CLIP in class features, image features and predictions
    ([SRC] trainers/promptsrc.py:297-313).

    L1 means over all elements of normalised features, and KL(frozen || prompted) summed and divided
    by B * C. The frozen class features are the mean over the templates of features that are not
    normalised, normalised after. Where the prompts do not learn class or image features, that
    term is 0, and left out.

    text_weight, image_weight, logit_weight: of the three, each times ``weight``. templates: the
    pool of the frozen class features: "imagenet" (PromptSRC's 60), "dataset", "varied", "noisy", or
    a file with one a line.
    """

    kind = "self_regulation"
    needs_frozen = True

    def __init__(
        self,
        weight: float = 1.0,
        *,
        text_weight: float = 25.0,
        image_weight: float = 10.0,
        logit_weight: float = 1.0,
        templates: str = "imagenet",
    ) -> None:
        super().__init__(weight)
        self._weights = {"text": text_weight, "image": image_weight, "logit": logit_weight}
        for name, value in self._weights.items():
            check_number(value, f"self_regulation {name}_weight")
        self.templates = templates
        self._frozen: Tensor | None = None

    def weight_of(self, term: str) -> float:
        return self.weight * self._weights[term.removesuffix("_regulation")]

    def check(self, task: Task) -> None:
        prompts = task.prompts
        if not (prompts.learns_text or prompts.learns_images):
            raise VlfastError(
                "objectives: self_regulation keeps what is learned near the frozen model, but "
                f"neither class nor image features of {prompts.kind!r} prompts are learned"
            )
        own, frozen = task.classifier.width, task.clip.width
        if own != frozen:
            raise VlfastError(
                "objectives: self_regulation compares features with the frozen model's own, got "
                f"{own} numbers for {frozen}; a projector into the teacher's space has none"
            )
        template_pool(self.templates, task.dataset, task.classifier.template)

    def prepare(self, task: Task) -> None:
        classifier = task.classifier
        templates = template_pool(self.templates, task.dataset, classifier.template)
        pool = pool_features(task.clip, classifier.classnames, templates, "templates")
        self._frozen = functional.normalize(sum(pool) / len(templates), dim=-1)

    def forward(self, step: Step) -> dict[str, Tensor]:
        frozen_classes = step.of_chosen(self._frozen)
        terms = {}
        if step.prompts.learns_text:
            terms["text_regulation"] = (step.classes - frozen_classes).abs().mean()
        if step.prompts.learns_images:
            terms["image_regulation"] = (step.images - step.frozen_images).abs().mean()
        terms["logit_regulation"] = symmetric_kl_loss(
            step.logits,
            cosines(step.frozen_images, frozen_classes),
            teacher_scale=step.clip.logit_scale.float(),
            forward_weight=1.0,
            reverse_weight=0.0,
            reduction="mean",
        )
        return terms
