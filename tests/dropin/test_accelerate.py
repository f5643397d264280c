"""What accelerate changes, what it leaves, and what it says."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.dropin.lookalikes import build
from tests.dropin.support import distance, guard_of
from vlfast.dropin import accelerate, restore


def test_report_reads_well():
    built = build("coop")
    report = accelerate(built.model)
    assert str(report).splitlines() == [
        "text_encoder: what all classes share is encoded once, the rest up to EOT",
        "text_encoder: not called yet",
    ]
    built.step(), built.evaluate()
    assert str(report).endswith("text_encoder: checked, features and gradients are the same")


def test_twice():
    built = build("coop")
    expected = built.evaluate()
    accelerate(built.model)
    classes = [type(module) for module in built.model.modules()]
    report = accelerate(built.model)
    assert not report.changed and report.left == {"text_encoder": "it is accelerated already"}
    assert [type(module) for module in built.model.modules()] == classes
    assert restore(built.model) == ["text_encoder"]
    assert restore(built.model) == []
    assert torch.equal(built.evaluate(), expected)


def test_trainers():
    coop, teacher = build("kdpl-coop"), build("promptkd")
    trainer = SimpleNamespace(student_model=coop.model, model_teacher=teacher.target, model=None)
    report = accelerate(trainer)
    assert {"student_model.text_encoder", "model_teacher.text_encoder"} <= set(report.changed)
    assert "student_model.text_encoder" in restore(trainer)
    with pytest.raises(TypeError, match="expected an nn.Module that holds .* got SimpleNamespace"):
        accelerate(SimpleNamespace(network=coop.model))
    with pytest.raises(TypeError, match="got str"):
        restore("model")


def replaced(model):
    model.text_encoder.forward = lambda prompts, tokens: None


def unary(model):
    class Unary(type(model.text_encoder)):
        def forward(self, tokens):
            return tokens

    model.text_encoder.__class__ = Unary


def without_blocks(model):
    model.text_encoder.transformer = nn.Identity()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (replaced, "forward was replaced on the object"),
        (unary, "its forward takes tokens, not prompts and tokens"),
        (without_blocks, "its transformer has no resblocks"),
    ],
)
def test_left_as_they_are(spoil, why):
    model = build("coop").model
    spoil(model)
    classes = [type(module) for module in model.modules()]
    report = accelerate(model)
    assert not report.changed and why in report.left["text_encoder"]
    assert [type(module) for module in model.modules()] == classes


def test_nothing_to_accelerate():
    assert "constants there already" in accelerate(build("vpt").model).left["text_encoder"]
    assert "CLIP of its own" in accelerate(build("kdpl-coop").beside).left["text_encoder"]
    assert "there is no text encoder in it" in str(accelerate(nn.Linear(2, 2)))


def hook_on_block(model):
    model.text_encoder.transformer.resblocks[1].register_forward_hook(lambda *_: None)


def hook_in_block(model):
    model.text_encoder.transformer.resblocks[1].mlp.c_fc.register_forward_hook(lambda *_: None)


def see_all(model):
    for block in model.text_encoder.transformer.resblocks:
        block.attn_mask = torch.zeros_like(block.attn_mask)


def see_two_more(model):
    for block in model.text_encoder.transformer.resblocks:
        block.attn_mask = torch.full_like(block.attn_mask, float("-inf")).triu(3)


def no_mask(model):
    for block in model.text_encoder.transformer.resblocks:
        block.attn_mask = None


def replaced_attention(model):
    block = model.text_encoder.transformer.resblocks[0]
    block.attention = lambda x: 0.5 * type(block).attention(block, x)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (hook_on_block, r"transformer.resblocks.1 has a forward hook"),
        (hook_in_block, "mlp.c_fc has a forward hook"),
        (see_all, "attn_mask is not causal"),
        (see_two_more, "attn_mask is not causal"),
        (no_mask, "has no attn_mask"),
        (replaced_attention, "has methods replaced in this instance"),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("verify", [True, False])
def test_calls_that_go_the_codebases_own_way(spoil, why, when, verify):
    plain, built = build("coop"), build("coop")
    spoil(plain.model)
    if when == "before":
        spoil(built.model)
    report = accelerate(built.model, verify=verify)
    if when == "after":
        built.step()
        spoil(built.model)
    found, expected = built.step(), plain.step()
    assert torch.equal(found.loss, expected.loss)
    assert why.replace("\\", "").replace("resblocks.1", "resblocks") in str(report).replace(
        ".1 has", " has"
    )


def test_dropout_in_training_mode():
    built = build("coop")
    for block in built.model.text_encoder.transformer.resblocks:
        block.mlp.append(nn.Dropout(0.5).eval())
    accelerate(built.model)
    expected = build("coop").evaluate()
    assert distance(built.evaluate(), expected) <= 1e-5
    built.model.text_encoder.train()
    torch.manual_seed(0)
    first = built.model(built.images)
    torch.manual_seed(0)
    assert torch.equal(built.model(built.images), first)
    torch.manual_seed(1)
    assert not torch.equal(built.model(built.images), first)
    assert "dropout in training mode" in guard_of(built.model).said[-1]


@pytest.mark.parametrize("family", ["coop", "cocoop", "maple"])
def test_checks_consume_no_random_numbers(family):
    built = build(family)
    accelerate(built.model)
    torch.manual_seed(3)
    built.step(), built.evaluate()
    after = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), after)


def test_at_most_eight_classes_are_checked(monkeypatch):
    built = build("cocoop", classes=[[7] * (1 + n % 13) for n in range(40)])
    accelerate(built.model)
    original = type(built.model.text_encoder).original_class
    forward, seen = original.forward, []

    def counted(self, prompts, tokens):
        seen.append(tokens.argmax(-1))
        return forward(self, prompts, tokens)

    monkeypatch.setattr(original, "forward", counted)
    built.step(), built.step(), built.evaluate()
    (ends,) = seen
    every = built.model.tokenized_prompts.argmax(-1)
    assert len(ends) == 8 and ends.min() == every.min() and ends.max() == every.max()


def test_without_verify(monkeypatch):
    built = build("coop", class_specific=True)
    expected = built.step()
    accelerate(built.model, verify=False)

    def fail(self, prompts, tokens):
        raise AssertionError("the codebase's own way was taken")

    monkeypatch.setattr(type(built.model.text_encoder).original_class, "forward", fail)
    name = "prompt_learner.ctx"
    assert distance(built.step().gradients[name], expected.gradients[name]) <= 1e-4
