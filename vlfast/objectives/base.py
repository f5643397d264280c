"""What every objective has in common."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from vlfast.clip.models import ClipModel
from vlfast.clip.text_tower import TextOutput
from vlfast.errors import VlfastError
from vlfast.prompts.base import Prompts


@dataclass(frozen=True)
class Step:
    """What one training step computed, for objectives to read.

    images: normalised features [B, D]. text: class features before normalisation, and the context
    states. logits: [B, C], logit scale applied, fp32. labels: int64 [B].
    """

    clip: ClipModel
    prompts: Prompts
    images: Tensor
    text: TextOutput
    logits: Tensor
    labels: Tensor


class Objective(nn.Module):
    """A term of the loss. Subclasses set ``kind``, take their options as keyword arguments, and
    return named 0-d tensors whose sum, times ``weight``, is added to the loss."""

    kind: str

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if not math.isfinite(weight):
            raise VlfastError(f"objectives: {self.kind} weight: expected a number, got {weight}")
        self.weight = weight

    def forward(self, step: Step) -> dict[str, Tensor]:
        raise NotImplementedError

    def check(self, clip: ClipModel, prompts: Prompts) -> None:
        """Raise ValueError, with the reason, where it makes no sense with these prompts."""
