"""The classes that the best method misses most, and how the others do on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlfast.evaluation.confusion import (
    ClassErrors,
    Confusion,
    class_recall,
    pool_predictions,
    worst_classes,
    worst_confusion,
)
from vlfast.evaluation.predictions import Predictions
from vlfast.report.sweeps import Method, Sweep, title_of
from vlfast.report.tables import sweep_tests, test_cell

SHOWN = 10


@dataclass(frozen=True)
class Worst:
    """One test set. method: the most accurate one there, whose ``classes`` these are. recalls: of
    every method, in percent by class name."""

    test: str
    part: str
    title: str
    method: Method
    classes: tuple[ClassErrors, ...]
    confusion: Confusion
    recalls: Mapping[Method, Mapping[str, float]]


def worst_of(sweep: Sweep, count: int = SHOWN) -> list[Worst]:
    """The ``count`` worst classes of each test set over all seeds, each method at its most shots;
    only test sets whose predictions were kept and where anything is wrong."""
    parts = ("base", "new") if sweep.protocol == "base-to-new" else ("test",)
    found = []
    for test in sweep_tests(sweep):
        for part in parts:
            by_method = _predictions(sweep, test, part)
            if not by_method:
                continue
            best = max(by_method, key=lambda m: test_cell(sweep, m, test, part).mean or 0.0)
            classes = worst_classes(by_method[best], count)
            if not classes:
                continue
            title = title_of(test, sweep.source) + (f", {part} classes" if part != "test" else "")
            recalls = {method: class_recall(p) for method, p in by_method.items()}
            confusion = worst_confusion(by_method[best], count)
            found.append(Worst(test, part, title, best, tuple(classes), confusion, recalls))
    return found


def _predictions(sweep: Sweep, test: str, part: str) -> dict[Method, Predictions]:
    """Of each method over its seeds; runs with other class names than the first are left out."""
    found = {}
    names = None
    for method in sweep.strongest(untrained=True):
        several = []
        for run in sweep.runs_of(method):
            if test not in run.result.scores:
                continue
            one = run.result.predictions().get(test, {}).get(part)
            if one is not None and len(one.labels):
                names = names or one.classnames
                several += [one] if one.classnames == names else []
        if several:
            found[method] = pool_predictions(several)
    return found
