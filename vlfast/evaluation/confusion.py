"""Which classes are missed most, and what they are taken for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlfast.errors import VlfastError
from vlfast.evaluation.predictions import Predictions


@dataclass(frozen=True)
class ClassErrors:
    """One class. recall: percent of its images that were named right. taken_for: other classes'
    names, each with the percent of this class's images that got it, most first."""

    classname: str
    images: int
    recall: float
    taken_for: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Confusion:
    """Part of a confusion matrix. shares: fp64 [R, K], percent of row class r's images that were
    taken for column class k; what the columns leave out is in no column, so that a row adds up to
    at most 100."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    shares: Tensor


def pool_predictions(several: Sequence[Predictions]) -> Predictions:
    """The predictions of several runs on one label set as one. Raises ValueError for none,
    VlfastError if their class names differ."""
    if not several:
        raise ValueError("predictions: expected at least one run's, got none")
    names = several[0].classnames
    if any(one.classnames != names for one in several):
        raise VlfastError("predictions: expected the same class names in every run, they differ")
    return Predictions(
        torch.cat([one.labels for one in several]),
        torch.cat([one.predicted for one in several]),
        torch.cat([one.confidence for one in several]),
        names,
    )


def worst_classes(
    predictions: Predictions, count: int = 10, confusions: int = 3
) -> list[ClassErrors]:
    """The ``count`` classes of lowest recall among those with images and with a mistake, lowest
    first, and of each the ``confusions`` classes that it is taken for most. Of equal ones the class
    with the smaller label comes first."""
    names = predictions.classnames
    totals, matrix = _rows(predictions)
    found = []
    for label in _order(totals, matrix)[:count]:
        row = matrix[label].clone()
        right, total = row[label].item(), totals[label].item()
        row[label] = 0
        most = row.argsort(descending=True, stable=True)[:confusions].tolist()
        taken = tuple((names[i], 100 * row[i].item() / total) for i in most if row[i] > 0)
        found.append(ClassErrors(names[label], int(total), 100 * right / total, taken))
    return found


def class_recall(predictions: Predictions) -> dict[str, float]:
    """Percent of each class's images that were named right, of the classes that have images."""
    totals, matrix = _rows(predictions)
    right = matrix.diagonal()
    return {
        name: 100 * right[label].item() / totals[label].item()
        for label, name in enumerate(predictions.classnames)
        if totals[label]
    }


def worst_confusion(predictions: Predictions, count: int = 10) -> Confusion:
    """The ``count`` worst classes against themselves and, after them, the classes outside that they
    are taken for most, at most half as many."""
    names = predictions.classnames
    totals, matrix = _rows(predictions)
    worst = _order(totals, matrix)[:count]
    others = matrix[worst].sum(dim=0)
    others[worst] = 0
    most = others.argsort(descending=True, stable=True)[: count // 2].tolist()
    columns = [*worst, *(i for i in most if others[i] > 0)]
    return Confusion(
        tuple(names[i] for i in worst),
        tuple(names[i] for i in columns),
        100 * matrix[worst][:, columns].double() / totals[worst, None],
    )


def _rows(predictions: Predictions) -> tuple[Tensor, Tensor]:
    """Images a class [C], and the counts of what they were taken for [C, C]."""
    classes = len(predictions.classnames)
    pairs = predictions.labels.long() * classes + predictions.predicted.long()
    matrix = torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    return matrix.sum(dim=1), matrix


def _order(totals: Tensor, matrix: Tensor) -> list[int]:
    """Labels of the classes with a mistake, lowest recall first."""
    recall = matrix.diagonal().double() / totals.clamp(min=1)
    missed = (matrix.diagonal() < totals).tolist()
    order = recall.argsort(stable=True).tolist()
    return [label for label in order if missed[label]]
