"""Features that are computed once: when they are, and when they are not."""

import copy
import pickle
from typing import ClassVar

import pytest
import torch

from vlfast.clip.feature_cache import FeatureCache
from vlfast.clip.models import wrap_clip
from vlfast.clip.text_tower import TextTower
from vlfast.prompts import build_prompts
from vlfast.prompts.classifier import PromptedClassifier


@pytest.fixture
def model(tiny_model):
    return copy.deepcopy(tiny_model).requires_grad_(False)


class Counting(torch.nn.LayerNorm):
    """Counts how often the text tower ran. A hook could, too, but with hooks nothing is kept."""

    calls: ClassVar[list[int]] = []

    def forward(self, x):
        self.calls.append(1)
        return super().forward(x)


@pytest.fixture
def runs(model):
    model.ln_final.__class__ = Counting
    Counting.calls.clear()
    return Counting.calls


def hard_features(tower, tokens, **options):
    return tower(None, tokens, **options).features


def test_a_hard_prompt_is_encoded_once(model, runs):
    tower = TextTower(model)
    pool = [tower.tokenize(["cat", "dog"], f"{words} {{name}}.") for words in ("a", "a photo of")]
    first = [hard_features(tower, tokens) for tokens in pool]
    again = [hard_features(tower, tokens) for tokens in pool]
    assert len(runs) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])


def test_classes_of_a_frozen_teacher_are_encoded_once(model, runs):
    """Other classes at every step, as class-agnostic distillation draws them."""
    tower = TextTower(model)
    tokens = tower.tokenize([f"thing {i}" for i in range(20)], "a {name}.")
    everything = hard_features(tower, tokens)
    for seed in range(5):
        index = torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:4]
        assert torch.equal(hard_features(tower, tokens, index=index), everything[index])
    assert len(runs) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.ln_final.weight.mul_(2.0),
        lambda model: model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}),
        lambda model: model.load_state_dict(
            {k: 2 * v for k, v in model.state_dict().items()}, assign=True
        ),
        lambda model: model.bfloat16(),
    ],
    ids=["in place", "state dict", "assigned", "dtype"],
)
def test_changed_weights_are_noticed(model, change):
    tower = TextTower(model)
    tokens = tower.tokenize(["cat", "dog"], "a {name}.")
    before = hard_features(tower, tokens)
    with torch.no_grad():
        change(model)
    after = hard_features(tower, tokens)
    assert not torch.equal(before.float(), after.float())
    assert torch.equal(after, hard_features(TextTower(model), tokens))


def test_the_image_tower_may_change(model, runs):
    tower = TextTower(model)
    tokens = tower.tokenize(["cat"], "a {name}.")
    hard_features(tower, tokens)
    with torch.no_grad():
        model.visual.proj.mul_(2.0)
    hard_features(tower, tokens)
    assert len(runs) == 1


def test_weights_that_learn_keep_their_graph(model):
    tower = TextTower(model.requires_grad_(True))
    tokens = tower.tokenize(["cat"], "a {name}.")
    for _ in range(2):
        hard_features(tower, tokens).sum().backward()
    assert model.ln_final.weight.grad is not None


def test_features_written_to_by_a_caller_are_made_anew(model):
    tower = TextTower(model)
    tokens = tower.tokenize(["cat"], "a {name}.")
    features = hard_features(tower, tokens)
    expected = features.clone()
    features.zero_()
    assert torch.equal(hard_features(tower, tokens), expected)


def test_autocast_has_features_of_its_own(model):
    tower = TextTower(model)
    tokens = tower.tokenize(["cat", "dog"], "a {name}.")
    with torch.autocast("cpu", torch.bfloat16):
        rough = hard_features(tower, tokens)
    exact = hard_features(tower, tokens)
    assert not torch.equal(rough.float(), exact)
    assert torch.equal(exact, hard_features(TextTower(model), tokens))


def test_features_of_inference_mode_can_be_trained_with(model):
    tower = TextTower(model)
    tokens = tower.tokenize(["cat", "dog"], "a {name}.")
    with torch.inference_mode():
        hard_features(tower, tokens)
    scale = torch.ones((), requires_grad=True)
    (scale * hard_features(tower, tokens)).sum().backward()
    assert scale.grad is not None


def test_nothing_is_kept_of_inference_tensors():
    cache, made = FeatureCache(), []
    with torch.inference_mode():
        module = torch.nn.Linear(2, 2)
    for _ in range(2):
        cache.get([module], lambda: made.append(1) or torch.ones(1))
    assert len(made) == 2


def test_a_hook_may_do_anything_so_that_nothing_is_kept(model):
    tower = TextTower(model)
    tokens = tower.tokenize(["cat"], "a {name}.")
    before = hard_features(tower, tokens)
    factor = 2.0
    with model.ln_final.register_forward_hook(lambda module, args, output: factor * output):
        torch.testing.assert_close(hard_features(tower, tokens), 2 * before)
        factor = 3.0
        torch.testing.assert_close(hard_features(tower, tokens), 3 * before)
    assert torch.equal(hard_features(tower, tokens), before)


def test_a_replaced_module_is_noticed(model):
    tower = TextTower(model)
    tokens = tower.tokenize(["cat"], "a {name}.")
    before = hard_features(tower, tokens)
    model.transformer.resblocks[0].mlp.gelu = torch.nn.ReLU()
    assert not torch.equal(hard_features(tower, tokens), before)


def replace_activation(model):
    mlp = model.transformer.resblocks[0].mlp
    other = torch.nn.Tanh if isinstance(mlp.gelu, torch.nn.ReLU) else torch.nn.ReLU
    mlp.gelu = torch.nn.GELU()
    mlp.gelu = other()


def replace_weights(model):
    linear = model.transformer.resblocks[0].mlp.c_fc
    for _ in range(2):
        linear.weight = torch.nn.Parameter(torch.randn_like(linear.weight), requires_grad=False)


@pytest.mark.parametrize("change", [replace_activation, replace_weights])
def test_what_stands_at_the_address_of_another_is_not_taken_for_it(model, change):
    tower = TextTower(model)
    tokens = tower.tokenize(["cat"], "a {name}.")
    for _ in range(5):
        hard_features(tower, tokens)
        change(model)
        assert torch.equal(hard_features(tower, tokens), hard_features(TextTower(model), tokens))


class Adapted(torch.nn.Module):
    """A linear layer with an adapter that can be switched off, as adapter libraries have it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.register_buffer("mask", torch.ones(1))
        self.disabled = False
        self.scaling = {"default": 2.0}

    def forward(self, x):
        out = self.base(x) * self.mask
        return out if self.disabled else out * self.scaling["default"]


def replace_forward(linear):
    linear.base.forward = lambda x: 3 * torch.nn.functional.linear(x, linear.base.weight)


@pytest.mark.parametrize(
    "change",
    [
        lambda adapted: setattr(adapted, "disabled", True),
        lambda adapted: adapted.scaling.update(default=5.0),
        lambda adapted: adapted.mask.mul_(3.0),
        replace_forward,
    ],
    ids=["attribute", "dict", "buffer", "method"],
)
def test_a_changed_option_of_a_module_is_noticed(model, change):
    mlp = model.transformer.resblocks[0].mlp
    mlp.c_proj = Adapted(mlp.c_proj)
    tower = TextTower(model)
    tokens = tower.tokenize(["cat"], "a {name}.")
    before = hard_features(tower, tokens)
    change(mlp.c_proj)
    after = hard_features(tower, tokens)
    assert not torch.equal(before, after)
    assert torch.equal(after, hard_features(TextTower(model), tokens))


def test_the_scale_of_logits_may_learn(model, runs):
    tower = TextTower(model)
    tokens = tower.tokenize(["cat"], "a {name}.")
    model.logit_scale.requires_grad_(True)
    for _ in range(3):
        assert not hard_features(tower, tokens).requires_grad
        with torch.no_grad():
            model.logit_scale.add_(0.1)
    assert len(runs) == 1


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda tower: pickle.loads(pickle.dumps(tower))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_of_a_tower_compute_features_of_their_own(model, copied):
    tower = TextTower(model, max_memory="1GB")
    tokens = tower.tokenize(["cat", "dog"], "a {name}.")
    before = hard_features(tower, tokens)
    other = copied(tower)
    after = hard_features(other, tokens)
    assert torch.equal(after, before) and after is not before
    assert other.max_memory == tower.max_memory


def test_class_features_are_computed_once_for_evaluation(model, runs):
    torch.manual_seed(0)
    clip = wrap_clip(model)
    prompts = build_prompts("shared", clip, num_classes=2, n_ctx=2)
    classifier = PromptedClassifier(clip, prompts, ["cat", "dog"], "a {}.")
    images = torch.nn.functional.normalize(torch.randn(3, 32), dim=-1)
    first = classifier.predict(images)
    once = len(runs)
    assert torch.equal(classifier.predict(images), first) and len(runs) == once
    with torch.no_grad():
        prompts.context.add_(1.0)
    assert not torch.equal(classifier.predict(images), first)
    assert len(runs) == 2 * once


def test_other_class_names_are_remembered_for_a_while(tiny_clip):
    prompts = build_prompts("shared", tiny_clip, num_classes=2, n_ctx=2)
    classifier = PromptedClassifier(tiny_clip, prompts, ["cat", "dog"], "a {}.")
    other = classifier.for_classes(["hen", "cow"])
    assert classifier.for_classes(["hen", "cow"]) is other
    assert classifier.for_classes(["cat", "dog"]) is classifier
    for number in range(20):
        classifier.for_classes([f"thing {number}"])
    assert classifier.for_classes(["hen", "cow"]) is not other


def test_a_write_through_data_is_seen_in_prompts(tiny_clip):
    """They are small: their numbers are compared."""
    prompts = build_prompts("shared", tiny_clip, num_classes=2, n_ctx=2)
    classifier = PromptedClassifier(tiny_clip, prompts, ["cat", "dog"], "a {}.")
    before = classifier.class_features()
    assert classifier.class_features() is before
    prompts.context.data.add_(1.0)
    assert not torch.equal(classifier.class_features(), before)


def test_forget(model):
    tower = TextTower(model)
    tokens = tower.tokenize(["cat"], "a {name}.")
    before = hard_features(tower, tokens)
    model.ln_final.weight.data.mul_(2.0)
    assert torch.equal(hard_features(tower, tokens), before)
    tower.forget()
    assert not torch.equal(hard_features(tower, tokens), before)
