"""Distillation from a mixture of hard prompts: MoPD and SiPD (arXiv 2412.19087)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlfast.data.templates import template_pool
from vlfast.errors import VlfastError
from vlfast.objectives.base import Objective, Step, Task, check_number, cosines
from vlfast.objectives.hard_features import pool_features
from vlfast.ops import gated_mixture_loss, symmetric_kl_loss


class Mixture(Objective):
    """The predictions of hard prompts of the same CLIP teach the learned one; a gate chooses whose.

    Each image learns from the ``num_prompts`` prompts of the pool with the highest gate logits, its
    frozen features times the gate, weighted by their softmax ([MoPD] trainers/MoPD.py:199-214). The
    selection term is the cross-entropy of those prompts with the label, by the same weights, which
    trains the gate. See ``vlfast.gated_mixture_loss``.

    In the loss, distillation counts ``weight`` and selection ``selection_weight``; MoPD's w is the
    weight of the labels, with ``weight`` 1 - w. Gate and pool see features of the frozen image
    tower; where the prompts learn image features, only the student's logits have those.

    SiPD is ``pool_size=1, num_prompts=1``: one hard prompt, hence no gate and no selection.

    gate: False gives every prompt of the pool the same weight, without selection. num_prompts
    counts only with a gate. pool: "dataset", "varied", "noisy", "imagenet", or a file with one
    template a line; see ``vlfast.data.templates.template_pool``. pool_size: only so many of its
    first. Learns gate, fp32 [D, H], from zeros.
    """

    kind = "mixture"
    needs_frozen = True
    without_labels = "selection_weight: 0.0 leaves out the selection, which reads them"

    def __init__(
        self,
        weight: float = 0.2,
        *,
        selection_weight: float = 0.1,
        num_prompts: int = 2,
        temperature: float = 1.0,
        gate: bool = True,
        pool: str = "dataset",
        pool_size: int | None = None,
    ) -> None:
        super().__init__(weight)
        check_number(selection_weight, "mixture selection_weight")
        check_number(temperature, "mixture temperature", zero=False)
        if pool_size is not None and pool_size < 1:
            raise VlfastError(
                f"objectives: mixture pool_size: expected at least 1, got {pool_size}"
            )
        self.selection_weight = selection_weight
        self.num_prompts = num_prompts
        self.temperature = temperature
        self.gated = gate and pool_size != 1
        self.pool = pool
        self.pool_size = pool_size
        self.gate: nn.Parameter | None = None
        self._pool: Tensor | None = None

    @property
    def needs_labels(self) -> bool:
        return self.gated and self.selection_weight > 0

    def weight_of(self, term: str) -> float:
        return self.selection_weight if term == "selection" else self.weight

    def check(self, task: Task) -> None:
        count = len(self._templates(task))
        if not self.gated:
            return
        if count == 1:
            raise VlfastError(
                "objectives: mixture gate: a pool of one prompt leaves nothing to choose; with "
                "pool_size=1 there is no gate"
            )
        # The weight of one prompt is 1 whatever the gate says: the first of the pool for ever.
        if not 2 <= self.num_prompts <= count:
            raise VlfastError(
                f"objectives: mixture num_prompts: expected 2 to {count}, the prompts of the pool, "
                f"for the gate to learn to weigh, got {self.num_prompts}"
            )

    def prepare(self, task: Task) -> None:
        classifier, templates = task.classifier, self._templates(task)
        pool = pool_features(task.clip, classifier.classnames, templates, "pool")
        self._pool = torch.stack([functional.normalize(features, dim=-1) for features in pool])
        gate = self._pool.new_zeros(self._pool.shape[-1], len(templates))
        if self.gated:
            self.gate = nn.Parameter(gate)
        else:
            # Equal gate logits of all prompts are equal weights.
            self._zeros = gate

    def forward(self, step: Step) -> dict[str, Tensor]:
        chosen = step.batch.chosen
        pool = self._pool if chosen is None else self._pool[:, chosen.on_device]
        scale = step.clip.logit_scale.float()
        if len(pool) == 1:
            loss = symmetric_kl_loss(
                step.logits,
                cosines(step.frozen_images, pool[0]),
                teacher_scale=scale,
                temperature=self.temperature,
                forward_weight=1.0,
                reverse_weight=0.0,
            )
            return {"mixture": self.temperature**2 * loss}
        distillation, selection = gated_mixture_loss(
            step.frozen_images,
            self.gate if self.gated else self._zeros,
            pool,
            step.logits,
            step.labels if self.needs_labels else torch.zeros_like(step.labels),
            logit_scale=scale,
            temperature=self.temperature,
            top_k=self.num_prompts if self.gated else len(pool),
        )
        if not self.needs_labels:
            return {"mixture": distillation}
        return {"mixture": distillation, "selection": selection}

    def _templates(self, task: Task) -> tuple[str, ...]:
        templates = template_pool(self.pool, task.dataset, task.classifier.template)
        if self.pool_size is None:
            return templates
        if self.pool_size > len(templates):
            raise VlfastError(
                f"objectives: mixture pool_size: the pool {self.pool!r} has {len(templates)} "
                f"prompts, got {self.pool_size}"
            )
        return templates[: self.pool_size]
