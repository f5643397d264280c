"""The numbers that papers report, in percent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """accuracy: top-1, percent. macro_f1: mean F1 over the classes that occur, percent. images."""

    accuracy: float
    macro_f1: float
    images: int


def score(logits: Tensor, labels: Tensor) -> Score:
    """Top-1 accuracy over all images and macro-F1, as [Dassl] evaluation/evaluator.py computes
    them (its macro-F1 averages over the classes among the labels).

    logits: [N, C]. labels: int64 [N]. Raises ValueError if there are no images.
    """
    if len(labels) == 0:
        raise ValueError("labels: expected at least one image, got none")
    predicted = logits.argmax(dim=1)
    f1 = []
    for label in labels.unique():
        hit = ((predicted == label) & (labels == label)).sum().item()
        named, there = (predicted == label).sum().item(), (labels == label).sum().item()
        f1.append(2 * hit / (named + there))
    accuracy = (predicted == labels).double().mean().item()
    return Score(100 * accuracy, 100 * torch.tensor(f1).double().mean().item(), len(labels))


def harmonic_mean(base: float, new: float) -> float:
    """2 * base * new / (base + new); 0 if both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0
