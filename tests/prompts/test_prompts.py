"""Prompts: what they start from, what they learn, what they refuse."""

import pytest
import torch

from vlfast.errors import UnknownNameError
from vlfast.prompts import build_prompts
from vlfast.prompts.classifier import PromptedClassifier

NAMES = ("cat", "yellow school bus", "hen")


def test_shared_context_from_words(tiny_clip):
    prompts = build_prompts("shared", tiny_clip, num_classes=3, n_ctx=None, init="a photo of a")
    assert torch.equal(
        prompts.context.detach(), tiny_clip.text_tower.embed_words("a photo of a").float()
    )
    assert prompts.context.dtype == torch.float32 and prompts.context.requires_grad


def test_fewer_vectors_than_words_take_the_first(tiny_clip):
    prompts = build_prompts("shared", tiny_clip, num_classes=3, n_ctx=2, init="a photo of a")
    assert torch.equal(
        prompts.context.detach(), tiny_clip.text_tower.embed_words("a photo").float()
    )


def test_random_context_has_coops_spread(tiny_clip):
    torch.manual_seed(0)
    context = build_prompts("class_specific", tiny_clip, num_classes=40, n_ctx=16).context
    assert context.shape == (40, 16, 32)
    assert context.std().item() == pytest.approx(0.02, rel=0.02)
    assert not torch.equal(context[0], context[1])


def test_words_of_the_dataset_give_zero_shot(tiny_clip):
    """A context that begins as the template's words is the hard prompt, feature for feature."""
    shared = build_prompts("shared", tiny_clip, num_classes=3, n_ctx=None, init="a photo of a")
    hard = build_prompts("hard", tiny_clip, num_classes=3)
    features = [
        p.encode(tiny_clip, p.tokenize(tiny_clip, NAMES, "a photo of a {}.")).features
        for p in (shared, hard)
    ]
    torch.testing.assert_close(features[0], features[1], atol=1e-6, rtol=1e-5)
    assert features[0].requires_grad and not features[1].requires_grad
    assert list(hard.parameters()) == [] and hard.context_vectors() is None


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("kind", ["shared", "class_specific"])
def test_gradients_reach_every_vector(tiny_clip, kind, position):
    torch.manual_seed(0)
    prompts = build_prompts(kind, tiny_clip, num_classes=3, n_ctx=4, position=position)
    tokens = prompts.tokenize(tiny_clip, NAMES, "a {}.")
    out = prompts.encode(tiny_clip, tokens)
    (out.features * torch.randn_like(out.features)).sum().backward()
    assert bool((prompts.context.grad.abs().sum(dim=-1) > 0).all())


def test_class_contexts_know_their_classes_only(tiny_clip):
    """As many other names would fit the shape, and mean nothing."""
    prompts = build_prompts("class_specific", tiny_clip, num_classes=3, n_ctx=4)
    classifier = PromptedClassifier(tiny_clip, prompts, NAMES, "a {}.")
    assert classifier.for_classes(NAMES).classnames == NAMES
    with pytest.raises(ValueError, match="class_specific prompts know only the 3 classes"):
        classifier.for_classes(["dog", "fox", "owl"])


def test_class_contexts_from_words_are_warned_of(tiny_clip):
    with pytest.warns(UserWarning, match="CoOp draws class-specific contexts at random"):
        build_prompts("class_specific", tiny_clip, num_classes=2, n_ctx=None, init="a photo")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_ctx": 0}, "n_ctx: expected at least 1"),
        ({"n_ctx": None}, "n_ctx: expected at least 1"),
        ({"n_ctx": 5, "init": "a photo of a"}, "n_ctx: expected 1 to 4, the tokens of"),
    ],
)
def test_bad_context_lengths(tiny_clip, options, match):
    with pytest.raises(ValueError, match=match):
        build_prompts("shared", tiny_clip, num_classes=3, **options)


def test_unknown_kind(tiny_clip):
    with pytest.raises(UnknownNameError, match="unknown prompts 'share'; did you mean 'shared'"):
        build_prompts("share", tiny_clip, num_classes=3)
