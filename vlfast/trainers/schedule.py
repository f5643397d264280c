"""The learning rate of Dassl, which every CoOp codebase trains with."""

from __future__ import annotations

import math


def learning_rate(
    epoch: int, *, lr: float, epochs: int, warmup_epochs: int, warmup_lr: float
) -> float:
    """The rate of ``epoch`` (the first is 1): ``warmup_lr`` while warming up, then a cosine.

    The cosine starts at ``lr`` after the warm-up and has the whole run as its half period, so with
    a warm-up it never reaches 0 ([Dassl] optim/lr_scheduler.py, ConstantWarmupScheduler over
    CosineAnnealingLR, stepped once an epoch).
    """
    if not 1 <= epoch <= epochs:
        raise ValueError(f"epoch: expected 1 to {epochs}, got {epoch}")
    if epoch <= warmup_epochs:
        return warmup_lr
    return 0.5 * lr * (1 + math.cos(math.pi * (epoch - 1 - warmup_epochs) / epochs))
