"""What the text tower is asked for, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Per = Literal["all", "class", "image"]
Position = Literal["end", "middle", "front"]


@dataclass(frozen=True)
class TextOutput:
    """features: [C, D], or [B, C, D] for ``per="image"``; not normalised.

    context_states: the states (after ``ln_final``, before the projection) that predict the context
    vectors, row i for vector i: [n, d] (per "all", position "end"), [B, n, d] (per "image"), else
    [C, n, d]. None without a context.
    """

    features: Tensor
    context_states: Tensor | None
