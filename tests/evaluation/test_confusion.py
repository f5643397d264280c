"""The worst classes of an example worked out by hand."""

import pytest
import torch

from vlfast.errors import VlfastError
from vlfast.evaluation.confusion import (
    class_recall,
    pool_predictions,
    worst_classes,
    worst_confusion,
)
from vlfast.evaluation.predictions import Predictions

NAMES = ("cat", "dog", "fish", "unseen", "owl")


def example():
    """cat: 1 of 4, taken for dog twice and owl once; dog: 1 of 2, taken for fish; fish: all right;
    unseen: no image, owl: 0 of 1, taken for cat."""
    pairs = [(0, 0), (0, 1), (0, 1), (0, 4), (1, 1), (1, 2), (2, 2), (2, 2), (4, 0)]
    labels, predicted = torch.tensor(pairs, dtype=torch.int32).T
    return Predictions(labels, predicted, torch.full((9,), 0.5), NAMES)


def test_worst_first():
    found = worst_classes(example())
    assert [(one.classname, one.images, one.recall) for one in found] == [
        ("owl", 1, 0.0),
        ("cat", 4, 25.0),
        ("dog", 2, 50.0),
    ]
    assert found[1].taken_for == (("dog", 50.0), ("owl", 25.0))
    assert [one.classname for one in worst_classes(example(), count=1)] == ["owl"]
    assert worst_classes(example(), confusions=1)[1].taken_for == (("dog", 50.0),)


def test_recall_of_classes_with_images():
    assert class_recall(example()) == {"cat": 25.0, "dog": 50.0, "fish": 100.0, "owl": 0.0}


def test_confusion_of_the_worst():
    found = worst_confusion(example(), count=2)
    assert found.rows == ("owl", "cat")
    assert found.columns == ("owl", "cat", "dog")  # dog is not among the worst two
    assert found.shares.tolist() == [[0, 100, 0], [25, 25, 50]]


def test_nothing_wrong():
    right = Predictions(*(torch.tensor([0, 1]),) * 2, torch.ones(2), ("a", "b"))
    assert worst_classes(right) == []


def test_pooling():
    both = pool_predictions([example(), example()])
    assert worst_classes(both)[1].images == 8
    other = Predictions(*(torch.tensor([0]),) * 2, torch.ones(1), ("x",))
    with pytest.raises(VlfastError, match="same class names"):
        pool_predictions([example(), other])
    with pytest.raises(ValueError, match="at least one run"):
        pool_predictions([])
