"""What a run is tested on: its own classes, or base and new ones, on every test set there is."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from accelerate import Accelerator

from vlfast.data.dataset import ClassSubset, Dataset
from vlfast.evaluation.kept_features import KeptFeatures
from vlfast.evaluation.metrics import harmonic_mean, score
from vlfast.evaluation.predictions import ByTest, Predictions
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.trainers.distributed import gather_shares, share_of
from vlfast.trainers.images import encode_split


def evaluate_dataset(
    classifier: PromptedClassifier,
    dataset: Dataset,
    classes: ClassSubset,
    workers: int | None = None,
    *,
    accelerator: Accelerator | None = None,
    kept: KeptFeatures | None = None,
    predictions: ByTest | None = None,
) -> dict[str, Any]:
    """Scores on ``dataset`` (all of its classes) for prompts trained on ``classes``.

    classes "all" or "new": {"test": score, "domains": {name: score}}. classes "base" is the
    base-to-new protocol: {"base", "new", "harmonic_mean", "domains": {name: {the same three}}};
    each half is a closed label set. Prompts that know only the classes they were learned for
    (class_specific) get no new half. A score is {accuracy, macro_f1, images}, in percent.

    accelerator: its processes share the images, all of them must call, and all get the scores.
    kept: where image features are kept for the next call with the same images and model; those of
    prompts in the image tower are not. predictions: where what was predicted goes, by test set.
    """
    encode = encode_split if kept is None else kept.encode
    tests = {"": "test", **{name: name for name in dataset.domains}}
    scores: dict[str, dict[str, Any]] = {domain: {} for domain in tests}
    for part in _parts(classifier, dataset, classes):
        half = dataset.restrict(part)
        named = classifier.for_classes(half.classnames)
        for domain, split_name in tests.items():
            split = half.splits()[split_name]
            if not len(split):
                continue
            found = encode(classifier, share_of(split, accelerator), workers=workers)
            logits, labels = (
                gather_shares(rows, len(split), accelerator)
                for rows in (named.predict(found[0]), found[1])
            )
            scores[domain][part] = asdict(score(logits, labels))
            if predictions is not None:
                name = "test" if classes != "base" else part
                of_test = f"{domain}/{name}" if domain else name
                predictions[of_test] = Predictions.of(logits, labels, half.classnames)
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
