"""The ensemble of hard prompts."""

import pytest
import torch
from torch.nn import functional

from vlfast.errors import VlfastError
from vlfast.prompts import build_prompts
from vlfast.prompts.classifier import PromptedClassifier

NAMES = ("cat", "yellow school bus", "hen")
TEMPLATES = ["a bad photo of the {}.", "own", "{} art"]


def test_it_is_the_mean_of_normalised_features(tiny_clip):
    prompts = build_prompts("ensemble", tiny_clip, num_classes=3, templates=TEMPLATES)
    features = PromptedClassifier(tiny_clip, prompts, NAMES, "a {}, a toy.").class_features()
    each = []
    for template in ("a bad photo of the {}.", "a {}, a toy.", "{} art"):
        ids = tiny_clip.tokenizer([template.format(name) for name in NAMES], 24)
        each.append(functional.normalize(tiny_clip.model.encode_text(ids), dim=-1))
    torch.testing.assert_close(features, torch.stack(each).mean(0), atol=1e-6, rtol=1e-5)


def test_some_classes_and_nothing_to_learn(tiny_clip):
    prompts = build_prompts("ensemble", tiny_clip, num_classes=3)
    assert len(prompts.templates) == 8 and not list(prompts.parameters())
    tokens = prompts.tokenize(tiny_clip, NAMES, "a {}.")
    some = prompts.encode(tiny_clip, tokens, index=torch.tensor([2, 0])).features
    everything = prompts.encode(tiny_clip, tokens).features
    torch.testing.assert_close(some, everything[[2, 0]])


@pytest.mark.parametrize(
    ("templates", "match"),
    [
        ([], "at least one"),
        (["a photo"], "exactly one {}, got 'a photo'"),
        (["a {x} of {}"], "got 'a {x} of {}'"),
    ],
)
def test_bad_templates(tiny_clip, templates, match):
    with pytest.raises(VlfastError, match=match):
        build_prompts("ensemble", tiny_clip, num_classes=3, templates=templates)
