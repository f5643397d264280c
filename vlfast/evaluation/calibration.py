"""Whether a probability of 80 % is right 80 % of the time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlfast.evaluation.predictions import Predictions

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Predictions by confidence, in bins of equal width over (0, 1].

    counts: int64 [M], images a bin. accuracy, confidence: fp64 [M], means over a bin's images as
    fractions; 0 where a bin is empty.
    """

    counts: Tensor
    accuracy: Tensor
    confidence: Tensor

    @property
    def ece(self) -> float:
        """The expected calibration error in percent: sum over bins m of
        |B_m| / N * |accuracy(B_m) - confidence(B_m)| (Guo et al. 2017, arXiv 1706.04599,
        equation 3)."""
        gaps = (self.accuracy - self.confidence).abs()
        return 100 * (self.counts * gaps).sum().item() / self.counts.sum().item()


def calibration(predictions: Predictions, bins: int = BINS) -> Calibration:
    """Bin m of M holds confidences in ((m - 1) / M, m / M]; 15 bins as in Guo et al. 2017.

    Raises ValueError if there are no images, fewer than one bin, or a confidence that is no
    probability.
    """
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    confidence = predictions.confidence.double()
    if not len(confidence):
        raise ValueError("predictions: expected at least one image, got none")
    # A softmax rounded in fp32 may exceed 1 by a little.
    if not ((confidence >= 0) & (confidence <= 1 + 1e-6)).all():
        raise ValueError("predictions: expected confidences from 0 to 1")
    right = (predictions.predicted == predictions.labels).double()
    edges = torch.arange(1, bins, dtype=torch.float64) / bins
    # In fp32, in which they were rounded, so that one at an edge is at that edge.
    where = torch.bucketize(predictions.confidence.float(), edges.float())
    counts = torch.bincount(where, minlength=bins)
    some = counts.clamp(min=1)
    return Calibration(
        counts,
        torch.bincount(where, right, minlength=bins) / some,
        torch.bincount(where, confidence, minlength=bins) / some,
    )
