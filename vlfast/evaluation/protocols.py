"""What a run is tested on: its own classes, or base and new ones, on every test set there is."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vlfast.data.dataset import ClassSubset, Dataset
from vlfast.evaluation.metrics import harmonic_mean, score
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.trainers.images import encode_split


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
    tests = {"": "test", **{name: name for name in dataset.domains}}
    scores: dict[str, dict[str, Any]] = {domain: {} for domain in tests}
    for part in _parts(classifier, dataset, classes):
        half = dataset.restrict(part)
        named = classifier.for_classes(half.classnames)
        for domain, split_name in tests.items():
            split = half.splits()[split_name]
            if len(split):
                features, labels = encode_split(classifier, split, workers=workers)
                found = score(named.predict(features), labels)
                scores[domain][part] = asdict(found)
    results = {domain: _arrange(of_parts, classes) for domain, of_parts in scores.items()}
    main = results.pop("")
    return {**main, "domains": results} if results else main


def _parts(
    classifier: PromptedClassifier, dataset: Dataset, classes: ClassSubset
) -> list[ClassSubset]:
    if classes != "base":
        return [classes]
    bound = classifier.prompts.class_bound or dataset.num_classes < 2
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
