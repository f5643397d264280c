"""Image features are kept between checkpoints only where they can't differ."""

import torch
from torch import nn

from tests.conftest import squares_dataset
from vlfast.evaluation.evaluate import evaluate_dataset
from vlfast.evaluation.kept_features import KeptFeatures
from vlfast.prompts import HardPrompt
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.trainers import images


class Turned(HardPrompt):
    """Image features times a learned number."""

    learns_images = True

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def encode_images(self, clip, pixels, frozen=None):
        return self.factor * super().encode_images(clip, pixels, frozen)


def test_features_are_kept_unless_prompts_change_them(tiny_clip, monkeypatch):
    data = squares_dataset()
    kept = KeptFeatures()
    calls = []

    def counted(classifier, split, encode=images.encode_split, **options):
        calls.append(len(split))
        return encode(classifier, split, **options)

    monkeypatch.setattr("vlfast.evaluation.kept_features.encode_split", counted)
    plain = PromptedClassifier(tiny_clip, HardPrompt(), data.classnames, data.template)
    first = evaluate_dataset(plain, data, "base", kept=kept)
    assert len(calls) == 4
    assert evaluate_dataset(plain, data, "base", kept=kept) == first
    assert len(calls) == 4
    found = []
    for factor in (1.0, -1.0):
        turned = PromptedClassifier(tiny_clip, Turned(factor), data.classnames, data.template)
        found.append(evaluate_dataset(turned, data, "base", kept=kept))
    assert found[0] == first and found[1] != first
    assert len(calls) == 12
