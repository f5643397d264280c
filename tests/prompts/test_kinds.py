"""Every kind of prompts against plain PyTorch, step by step; what they start from, count and
refuse."""

from contextlib import nullcontext

import open_clip
import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.prompts.support import (
    LABELS,
    SETTINGS,
    WORDS,
    deep_clip,
    images,
    make,
    plain_model,
    resnet_clip,
    shake,
)
from vlfast.clip.models import wrap_clip
from vlfast.objectives import Batch, Step, Task, build_objectives
from vlfast.ops.backends import reference_only
from vlfast.prompts import build_prompts, tower_blocks
from vlfast.trainers.fit import TrainingStep


@pytest.fixture(scope="module")
def clip():
    return deep_clip()


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_training_is_the_plain_one(clip, setting, reference):
    """Losses, logits and gradients of every learnable tensor over steps of SGD with momentum."""
    kind, options, plainly = SETTINGS[setting]
    model = make(clip, kind, **options)
    shake(model.prompts)
    task = Task(model, "letters")
    training = TrainingStep(task, build_objectives([{"kind": "labels"}]))
    learned = {k: v.detach().clone() for k, v in model.prompts.named_parameters()}
    learned = {k: v.requires_grad_() for k, v in learned.items()}
    ours = torch.optim.SGD(model.prompts.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    theirs = torch.optim.SGD(learned.values(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    for step in range(4):
        pixels = images(seed=step)
        ours.zero_grad()
        theirs.zero_grad()
        batch = training.look_ahead(Batch(LABELS, pixels))
        assert (batch.frozen is None) == model.prompts.learns_images
        with reference_only() if reference else nullcontext():
            loss, _ = training(batch)
        loss.backward()
        logits, _, _ = plain_model(kind, clip, learned, pixels, **plainly)
        expected = functional.cross_entropy(logits, LABELS)
        expected.backward()
        torch.testing.assert_close(loss, expected, atol=2e-5, rtol=1e-5)
        gradients = {k: v.grad for k, v in model.prompts.named_parameters()}
        assert gradients.keys() == learned.keys()
        for name, gradient in gradients.items():
            wanted = learned[name].grad
            scale = float(wanted.abs().max())
            assert scale > 0
            torch.testing.assert_close(gradient, wanted, atol=2e-4 * scale + 1e-7, rtol=1e-4)
        ours.step()
        theirs.step()
    assert all(w.grad is None for w in clip.model.parameters())


@pytest.mark.parametrize("setting", SETTINGS)
def test_predictions_are_the_plain_ones(clip, setting, monkeypatch):
    """In chunks where every image has class features of its own."""
    kind, options, plainly = SETTINGS[setting]
    monkeypatch.setattr("vlfast.prompts.classifier.IMAGES_AT_ONCE", 4)
    model = make(clip, kind, **options)
    learned = dict(model.prompts.named_parameters())
    with torch.no_grad():
        found = model.predict(model.encode_images(images()))
        expected, _, _ = plain_model(kind, clip, learned, images(), **plainly)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("setting", ["cocoop", "ivlp", "maple", "vpt"])
def test_some_classes_alone(clip, setting):
    kind, options, _ = SETTINGS[setting]
    model = make(clip, kind, **options)
    index = torch.tensor([2, 0])
    unit = model.encode_images(images()) if model.prompts.per_image else None
    whole, some = model.encode_text(unit).features, model.encode_text(unit, index).features
    torch.testing.assert_close(some, whole[..., index, :], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("setting", ["cocoop", "ivlp", "maple", "vpt"])
def test_bfloat16_autocast(clip, setting):
    kind, options, _ = SETTINGS[setting]
    model = make(clip, kind, **options)
    training = TrainingStep(Task(model, "letters"), build_objectives([{"kind": "labels"}]))
    exact, _ = training(training.look_ahead(Batch(LABELS, images())))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = training(training.look_ahead(Batch(LABELS, images())))
    loss.backward()
    torch.testing.assert_close(loss, exact, atol=0.1, rtol=0.1)
    for parameter in model.prompts.parameters():
        assert parameter.grad.dtype == torch.float32 and bool(parameter.grad.isfinite().all())


def test_conditional_context_needs_images(clip):
    model = make(clip, "conditional", n_ctx=3)
    assert torch.equal(model.prompts.context_vectors(), model.prompts.context)
    unit = functional.normalize(torch.randn(5, 64), dim=1)
    assert model.prompts.context_vectors(unit).shape == (5, 3, 32)
    with pytest.raises(ValueError, match=r"expected features \[B, D\], got None"):
        model.encode_text()


def test_coupled_projections_behind_the_first_start_as_copies(clip):
    first, second, third = make(clip, "coupled", n_ctx=2, depth=3).prompts.projections
    assert torch.equal(second.weight, third.weight) and torch.equal(second.bias, third.bias)
    assert second.weight.data_ptr() != third.weight.data_ptr()
    assert not torch.equal(first.weight, second.weight)


def test_what_learns_and_where(clip):
    learns = {"visual": True, "coupled": True, "conditional": False, "finetune": True}
    for kind, expected in learns.items():
        assert make(clip, kind, n_ctx=2).prompts.learns_images is expected
    for n_visual, expected in ((None, False), (0, False), (2, True)):
        prompts = make(clip, "independent", n_ctx=2, n_visual=n_visual).prompts
        assert prompts.learns_images is expected
        assert len(prompts.visual) == expected
    assert make(clip, "visual").prompts.context_vectors() is None
    assert len(make(clip, "visual").prompts.visual) == 4
    assert make(clip, "visual").prompts.visual[0].shape == (8, 32)


def test_prompts_without_images_learned_take_frozen_features(clip):
    model = make(clip, "independent", n_ctx=2, depth=2)
    frozen = torch.randn(3, 64)
    expected = functional.normalize(frozen, dim=1)
    assert torch.equal(model.encode_images(None, frozen), expected)


def test_random_prompts_have_the_usual_spread(clip):
    prompts = make(clip, "visual", n_visual=200).prompts
    assert torch.cat(list(prompts.visual)).std().item() == pytest.approx(0.02, rel=0.02)
    assert not torch.equal(prompts.visual[0], prompts.visual[1])


def test_words_that_stay_frozen(clip):
    for n_ctx, words in ((1, "photo of a"), (2, "of a"), (4, ""), (None, "")):
        prompts = make(clip, "coupled", n_ctx=n_ctx, init=WORDS).prompts
        assert prompts.frozen_words == words
    assert make(clip, "independent", n_ctx=2).prompts.frozen_words == ""
    with pytest.raises(ValueError, match="parts init='🦒' between words, got 1"):
        make(clip, "coupled", n_ctx=1, init="🦒")


def test_finetuning_is_training_the_image_tower(clip):
    model = make(clip, "finetune")
    copied = model.prompts.visual
    assert copied is not clip.model.visual and model.tokens.template == "a {name} square."
    training = TrainingStep(Task(model, "letters"), build_objectives([{"kind": "labels"}]))
    training.train()
    assert not copied.training
    before = {k: v.clone() for k, v in clip.model.state_dict().items()}
    with torch.no_grad():
        texts = make(clip, "hard").class_features()
    for step in range(2):
        loss, _ = training(Batch(LABELS, images(seed=step)))
        unit = functional.normalize(copied(images(seed=step)), dim=1)
        classes = functional.normalize(texts, dim=1)
        logits = clip.model.logit_scale.exp() * unit @ classes.T
        expected = functional.cross_entropy(logits, LABELS)
        torch.testing.assert_close(loss, expected, atol=2e-5, rtol=1e-5)
        found = torch.autograd.grad(loss, list(copied.parameters()))
        wanted = torch.autograd.grad(expected, list(copied.parameters()))
        for (name, parameter), ours, theirs in zip(
            copied.named_parameters(), found, wanted, strict=True
        ):
            scale = float(theirs.abs().max())
            torch.testing.assert_close(ours, theirs, atol=1e-4 * scale + 1e-7, rtol=1e-3, msg=name)
            parameter.data -= 0.01 * ours
    after = clip.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_resnet_is_finetuned_and_takes_no_prompts():
    torch.manual_seed(0)
    clip = resnet_clip()
    assert tower_blocks(clip) == (3, 0)
    model = make(clip, "finetune")
    norms = [m for m in model.prompts.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    training = TrainingStep(Task(model, "letters"), build_objectives([{"kind": "labels"}]))
    training.train()
    loss, _ = training(Batch(LABELS, images()))
    loss.backward()
    assert all(p.grad is not None for p in model.prompts.parameters())
    assert all(torch.equal(a, norm.running_mean) for a, norm in zip(before, norms, strict=True))
    make(clip, "conditional", n_ctx=2)
    make(clip, "independent", n_ctx=2, depth=3)
    for kind, options in (
        ("visual", {}),
        ("coupled", {"n_ctx": 2}),
        ("independent", {"n_ctx": 2, "n_visual": 2}),
    ):
        with pytest.raises(ValueError, match="image tower of ModifiedResNet has no class_emb"):
            make(clip, kind, **options)


def test_blocks_of_the_towers(clip, tiny_clip):
    assert tower_blocks(clip) == (3, 4)
    assert tower_blocks(tiny_clip) == (3, 1)


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("coupled", {"depth": 4}, "depth: expected 1 to 3, the blocks of the text tower, got 4"),
        ("coupled", {"depth": 0}, "depth: expected 1 to 3"),
        ("coupled", {"depth": 2.0}, "depth: expected 1 to 3"),
        ("independent", {"depth": 4}, "depth: expected 1 to 3, the blocks of the text tower"),
        (
            "independent",
            {"n_visual": 2, "visual_depth": 5},
            "visual_depth: expected 1 to 4, the blocks of the image tower, got 5",
        ),
        ("independent", {"n_visual": -1}, "n_visual: expected at least 1, got -1"),
        ("visual", {"visual_depth": 5}, "visual_depth: expected 1 to 4"),
        ("visual", {"n_visual": 0}, "n_visual: expected at least 1, got 0"),
        ("visual", {"n_visual": True}, "n_visual: expected at least 1, got True"),
        ("conditional", {"n_ctx": 0}, "n_ctx: expected at least 1, got 0"),
        ("conditional", {"n_ctx": None}, "n_ctx: expected at least 1, got None"),
        ("coupled", {"n_ctx": 5, "init": WORDS}, "n_ctx: expected 1 to 4, the tokens of"),
        ("conditional", {"position": "middle"}, "position: conditional prompts need the class"),
        ("independent", {"position": "front"}, "position: independent prompts need the class"),
        ("coupled", {"position": "middle"}, "position: coupled prompts need the class"),
    ],
)
def test_bad_options(clip, kind, options, match):
    with pytest.raises(ValueError, match=match):
        make(clip, kind, **{"n_ctx": 2, **options})


def test_the_image_tower_bounds_coupled_prompts(tiny_clip):
    match = "depth: expected 1 to 1, the blocks of the image tower, got 3"
    with pytest.raises(ValueError, match=match):
        build_prompts("coupled", tiny_clip, num_classes=3, n_ctx=2, depth=3)


@pytest.fixture(scope="module")
def of_full_size():
    """A CLIP of ViT-B/16's sizes, whose weights were never written and take no memory."""
    config = open_clip.get_model_config("ViT-B-16")
    with torch.device("meta"):
        model = open_clip.model.CLIP(**config)
    model = model.to_empty(device="cpu")
    model.attn_mask = torch.full((77, 77), -torch.inf).triu(1)
    with torch.no_grad():
        model.token_embedding.weight[:1000] = 0
    return wrap_clip(model, name="full")


@pytest.mark.parametrize(
    ("kind", "options", "count"),
    [
        ("shared", {"n_ctx": None, "init": WORDS}, 2_048),
        ("conditional", {"n_ctx": None, "init": WORDS}, 35_360),
        ("visual", {}, 73_728),
        ("independent", {"n_ctx": 2, "init": WORDS, "depth": 12, "n_visual": 2}, 30_720),
        ("independent", {"n_ctx": None, "init": WORDS, "depth": 9, "n_visual": 4}, 46_080),
        ("coupled", {"n_ctx": 2, "init": WORDS, "depth": 9}, 3_555_072),
        ("coupled", {"n_ctx": 2, "init": WORDS, "depth": 3}, 1_185_024),
    ],
)
def test_as_many_parameters_as_published(of_full_size, kind, options, count):
    prompts = build_prompts(kind, of_full_size, num_classes=10, **options)
    assert sum(p.numel() for p in prompts.parameters()) == count
    assert all(p.dtype == torch.float32 and p.requires_grad for p in prompts.parameters())


def test_steps_encode_images_once(clip):
    """What objectives read is shared: one pass of the image tower a step."""
    model = make(clip, "coupled", n_ctx=2, depth=2)
    step = Step(Task(model, "letters"), Batch(LABELS, images()))
    assert step.images is step.images and step.logits.shape == (6, 4)


@pytest.mark.parametrize("n_ctx", [None, 6])
def test_words_of_a_template_are_learned_once(clip, n_ctx):
    """ProGrad's start, on deep prompts: no part of it is left as frozen words."""
    options = {"n_ctx": n_ctx, "init": "template: a photo of a", "depth": 2}
    for kind in ("independent", "coupled"):
        prompts = build_prompts(kind, clip, num_classes=4, **options)
        assert prompts.frozen_words == ""
        words = clip.text_tower.embed_words("a photo of a").float()
        assert torch.equal(prompts.context[-4:].detach(), words)
    text = build_prompts("visual", clip, num_classes=4, **options).words
    assert text == "a photo of a"
