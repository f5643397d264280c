"""What a run is tested on: its own classes, or base and new ones, on every test set there is."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vlfast.data.dataset import ClassSubset, Dataset, Split
from vlfast.evaluation.metrics import Score, harmonic_mean, score
from vlfast.trainers.classifier import PromptedClassifier, encode_split


def evaluate_split(
    classifier: PromptedClassifier, split: Split, workers: int | None = None
) -> Score:
    """Accuracy and macro-F1 on one split, whose labels index the classifier's class names."""
    features, labels = encode_split(classifier.clip, split, workers=workers)
    return score(classifier.predict(features), labels)


def evaluate_dataset(
    classifier: PromptedClassifier,
    dataset: Dataset,
    classes: ClassSubset,
    workers: int | None = None,
) -> dict[str, Any]:
    """Scores on ``dataset`` (all of its classes) for prompts trained on ``classes``.

    classes "all" or "new": {"test": score, "domains": {name: score}}. classes "base" is the
    base-to-new protocol: {"base", "new", "harmonic_mean", "domains": {name: {the same three}}};
    each half is a closed label set. Prompts that know only the classes they were learned for
    (class_specific) get no new half. A score is {accuracy, macro_f1, images}, in percent.
    """
    halves = {part: dataset.restrict(part) for part in _parts(classifier, dataset, classes)}
    tests = {"": "test", **{name: name for name in dataset.domains}}
    results = {}
    for domain, split_name in tests.items():
        scores = {}
        for part, half in halves.items():
            split = half.splits()[split_name]
            if len(split):
                named = classifier.for_classes(half.classnames)
                scores[part] = asdict(evaluate_split(named, split, workers))
        results[domain] = _arrange(scores, classes)
    main = results.pop("")
    return {**main, "domains": results} if results else main


def _parts(
    classifier: PromptedClassifier, dataset: Dataset, classes: ClassSubset
) -> list[ClassSubset]:
    if classes != "base":
        return [classes]
    bound = classifier.prompts.kind == "class_specific" or dataset.num_classes < 2
    return ["base"] if bound else ["base", "new"]


def _arrange(scores: dict[str, dict[str, Any]], classes: ClassSubset) -> dict[str, Any]:
    if classes != "base":
        return {"test": scores[classes]} if classes in scores else {}
    arranged: dict[str, Any] = dict(scores)
    if len(scores) == 2:
        arranged["harmonic_mean"] = harmonic_mean(
            scores["base"]["accuracy"], scores["new"]["accuracy"]
        )
    return arranged
