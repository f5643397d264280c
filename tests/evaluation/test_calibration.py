"""Expected calibration error of examples worked out by hand."""

import pytest
import torch

from vlfast.evaluation.calibration import calibration
from vlfast.evaluation.predictions import Predictions


def predictions(right, confidence):
    labels = torch.zeros(len(right), dtype=torch.int32)
    predicted = torch.tensor([0 if r else 1 for r in right], dtype=torch.int32)
    return Predictions(labels, predicted, torch.tensor(confidence), ("a", "b"))


def test_by_hand():
    """Two bins: (0, 0.5] has 0.3 and 0.5, one right: |0.5 - 0.4|; (0.5, 1] has 0.6, 0.9 and 0.9,
    two right: |2/3 - 0.8|. Weighted 2/5 and 3/5: 0.04 + 0.08."""
    found = calibration(
        predictions([True, False, True, True, False], [0.3, 0.5, 0.6, 0.9, 0.9]), bins=2
    )
    assert found.counts.tolist() == [2, 3]
    assert found.accuracy.tolist() == pytest.approx([1 / 2, 2 / 3])
    assert found.confidence.tolist() == pytest.approx([0.4, 0.8])
    assert found.ece == pytest.approx(12.0)


def test_edges_belong_to_the_bin_below():
    fifteenths = [m / 15 for m in range(1, 16)]
    found = calibration(predictions([True] * 15, fifteenths))
    assert found.counts.tolist() == [1] * 15


def test_perfect_and_worst():
    assert calibration(predictions([True, True], [1.0, 1.0])).ece == pytest.approx(0)
    assert calibration(predictions([False, False], [1.0, 1.0])).ece == pytest.approx(100)
    assert calibration(predictions([False], [0.0])).counts.tolist() == [1] + [0] * 14


def test_refusals():
    with pytest.raises(ValueError, match="at least one image"):
        calibration(predictions([], []))
    with pytest.raises(ValueError, match="confidences from 0 to 1"):
        calibration(predictions([True], [float("nan")]))
    with pytest.raises(ValueError, match="confidences from 0 to 1"):
        calibration(predictions([True], [1.5]))
    with pytest.raises(ValueError, match="bins: expected at least 1, got 0"):
        calibration(predictions([True], [0.5]), bins=0)
