"""What was predicted for every test image: what calibration and confusions are computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Predictions:
    """labels, predicted: int32 [N]. confidence: fp32 [N], the probability of the predicted class.
    classnames: what the labels stand for."""

    labels: Tensor
    predicted: Tensor
    confidence: Tensor
    classnames: tuple[str, ...]

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, classnames: tuple[str, ...]) -> Predictions:
        """logits: [N, C]. labels: int64 [N]."""
        best = logits.float().softmax(dim=1).max(dim=1)
        return cls(
            labels.to("cpu", torch.int32),
            best.indices.to("cpu", torch.int32),
            best.values.cpu(),
            tuple(classnames),
        )


# Predictions by test set: "test", "base" or "new"; of a domain "remix/test", "remix/base", ...
ByTest = dict[str, Predictions]


def to_tensors(by_test: Mapping[str, Predictions]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata for a file."""
    tensors = {
        f"{test}.{field}": getattr(predictions, field)
        for test, predictions in by_test.items()
        for field in ("labels", "predicted", "confidence")
    }
    return tensors, {"classnames": {test: p.classnames for test, p in by_test.items()}}


def from_tensors(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> ByTest:
    """What ``to_tensors`` was given."""
    return {
        test: Predictions(
            *(tensors[f"{test}.{field}"] for field in ("labels", "predicted", "confidence")),
            tuple(classnames),
        )
        for test, classnames in about["classnames"].items()
    }
