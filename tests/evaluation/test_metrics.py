"""Accuracy, macro-F1, harmonic mean; which halves and domains are tested."""

import numpy as np
import pytest
import torch

from tests.conftest import squares_dataset
from vlfast.evaluation.evaluate import evaluate_dataset
from vlfast.evaluation.metrics import harmonic_mean, score
from vlfast.evaluation.tables import accuracy_table
from vlfast.prompts import build_prompts
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.trainers.images import encode_split


def test_accuracy_and_macro_f1_by_hand():
    predicted = [0, 0, 1, 2, 2, 2]
    labels = torch.tensor([0, 1, 1, 2, 2, 0])
    logits = torch.nn.functional.one_hot(torch.tensor(predicted), 4).float()
    result = score(logits, labels)
    assert result.accuracy == pytest.approx(100 * 4 / 6)
    f1 = [2 * 1 / (2 + 2), 2 * 1 / (1 + 2), 2 * 2 / (3 + 2)]
    assert result.macro_f1 == pytest.approx(100 * np.mean(f1))
    assert result.images == 6


def test_macro_f1_ignores_classes_that_do_not_occur():
    assert score(torch.eye(3)[:2], torch.tensor([0, 1])).macro_f1 == 100.0


def test_no_images():
    with pytest.raises(ValueError, match="at least one image"):
        score(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def test_harmonic_mean_of_published_numbers():
    """CoOp's averages over 11 datasets as MaPLe's table has them: 82.69, 63.22, 71.66."""
    assert harmonic_mean(82.69, 63.22) == pytest.approx(71.66, abs=0.005)
    assert harmonic_mean(0.0, 0.0) == 0.0


@pytest.fixture
def classifier(tiny_clip):
    data = squares_dataset().restrict("base")
    torch.manual_seed(0)
    prompts = build_prompts("shared", tiny_clip, num_classes=3, n_ctx=3)
    return PromptedClassifier(tiny_clip, prompts, data.classnames, data.template)


def test_base_to_new_tests_each_half_as_a_closed_set(classifier):
    data = squares_dataset()
    result = evaluate_dataset(classifier, data, "base")
    assert set(result) == {"base", "new", "harmonic_mean", "domains"}
    assert set(result["domains"]) == {"noisy"}
    for part in ("base", "new"):
        half = data.restrict(part)
        features, labels = encode_split(classifier, half.test)
        logits = classifier.for_classes(half.classnames).predict(features)
        assert result[part]["accuracy"] == pytest.approx(score(logits, labels).accuracy)
        assert result[part]["images"] == len(half.test)
    assert result["harmonic_mean"] == pytest.approx(
        harmonic_mean(result["base"]["accuracy"], result["new"]["accuracy"])
    )
    table = accuracy_table(result)
    assert "harmonic mean" in table and "noisy" in table


def test_all_classes_have_one_number_a_test_set(tiny_clip):
    data = squares_dataset()
    prompts = build_prompts("hard", tiny_clip, num_classes=5)
    everything = PromptedClassifier(tiny_clip, prompts, data.classnames, data.template)
    result = evaluate_dataset(everything, data, "all")
    assert set(result) == {"test", "domains"}
    assert result["test"]["images"] == 40
    assert "top-1" in accuracy_table(result)


def test_class_specific_contexts_have_no_new_half(tiny_clip):
    data = squares_dataset().restrict("base")
    prompts = build_prompts("class_specific", tiny_clip, num_classes=3, n_ctx=3)
    bound = PromptedClassifier(tiny_clip, prompts, data.classnames, data.template)
    result = evaluate_dataset(bound, squares_dataset(), "base")
    assert "new" not in result and "harmonic_mean" not in result
    assert "-" in accuracy_table(result)


def test_features_of_a_split_are_in_its_order(classifier):
    data = squares_dataset()
    features, labels = encode_split(classifier, data.test)
    assert labels.tolist() == data.test.labels.tolist()
    reverse = data.test.at(list(range(len(data.test)))[::-1])
    torch.testing.assert_close(encode_split(classifier, reverse)[0].flip(0), features)


def test_table_of_two_checkpoints():
    def whole(accuracy):
        scores = {"test": {"accuracy": accuracy, "macro_f1": accuracy - 1, "images": 9}}
        return {**scores, "domains": {"noisy": scores}}

    lines = accuracy_table(whole(50.0), {"epoch": 7, "accuracy": whole(60.0)}).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["test,", "last", "50.0", "49.0"],
        ["test,", "best", "(epoch", "7)", "60.0", "59.0"],
        ["noisy,", "last", "50.0", "49.0"],
        ["noisy,", "best", "(epoch", "7)", "60.0", "59.0"],
    ]
