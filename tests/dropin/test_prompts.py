"""Prompts that a fork does something else with than CoOp does, before they are encoded."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.dropin.lookalikes import build
from tests.dropin.support import distance
from vlfast.dropin import accelerate


def upstream_of(features):
    return torch.linspace(-1, 1, features.numel()).view_as(features)


def encode(model, prompts):
    return model.text_encoder(prompts, model.tokenized_prompts)


def made_without_autograd(model):
    with torch.no_grad():
        prompts = model.prompt_learner()
    features = encode(model, prompts)
    assert not features.requires_grad
    return [features]


def made_before_the_context_changed(model):
    prompts = model.prompt_learner()
    encode(model, prompts)
    with torch.no_grad():
        model.prompt_learner.ctx.neg_()
    return [encode(model, prompts).detach()]


def written_to(model):
    prompts = model.prompt_learner()
    prompts.mul_(1.5)
    prompts[:, 1:3] += 0.1
    features = encode(model, prompts)
    ctx = model.prompt_learner.ctx
    return [features.detach(), *torch.autograd.grad(features, [ctx], upstream_of(features))]


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def through_a_function(model):
    features = encode(model, Reversed.apply(model.prompt_learner()))
    ctx = model.prompt_learner.ctx
    return [features.detach(), *torch.autograd.grad(features, [ctx], upstream_of(features))]


def with_gradients_of_their_own(model):
    prompts = model.prompt_learner().detach().requires_grad_()
    features = encode(model, prompts)
    features.backward(upstream_of(features))
    return [features.detach(), prompts.grad]


def with_gradients_that_are_kept(model):
    prompts = model.prompt_learner()
    prompts.retain_grad()
    features = encode(model, prompts)
    features.backward(upstream_of(features))
    return [features.detach(), prompts.grad, model.prompt_learner.ctx.grad]


def under_a_checkpoint(model, reentrant=False):
    features = checkpoint(
        model.text_encoder,
        model.prompt_learner(),
        model.tokenized_prompts,
        use_reentrant=reentrant,
    )
    features.backward(upstream_of(features))
    return [features.detach(), model.prompt_learner.ctx.grad]


def under_a_reentrant_checkpoint(model):
    return under_a_checkpoint(model, reentrant=True)


@pytest.mark.parametrize(
    "use",
    [
        made_without_autograd,
        made_before_the_context_changed,
        written_to,
        through_a_function,
        with_gradients_of_their_own,
        with_gradients_that_are_kept,
        under_a_checkpoint,
        under_a_reentrant_checkpoint,
    ],
)
def test_prompts(use, recwarn):
    expected = use(build("coop").model)
    model = build("coop").model
    report = accelerate(model)
    for found, wanted in zip(use(model), expected, strict=True):
        assert distance(found, wanted) <= 1e-4
    checks = report.checks["text_encoder"]
    assert checks and all(said.startswith("checked") for said in checks)


def of_learner(learner, forward, **attributes):
    learner.__class__ = type("Learner", (type(learner),), {"forward": forward})
    for name, value in attributes.items():
        setattr(learner, name, value)


def assemble(learner, ctx):
    return learner.construct_prompts(ctx, learner.token_prefix, learner.token_suffix)


def scheduled(self):
    self.calls += 1
    return assemble(self, self.schedule[0] * self.ctx.expand(self.n_cls, -1, -1))


def test_a_learner_that_keeps_count_and_reads_a_schedule():
    features, counts = [], []
    for accelerated in (False, True):
        model = build("coop").model
        learner = model.prompt_learner
        of_learner(learner, scheduled, calls=0, schedule=[1.0])
        if accelerated:
            accelerate(model)
        for factor in (1.0, 1.0, 0.5):
            learner.schedule[0] = factor
            features.append(encode(model, learner()).detach())
        counts.append(learner.calls)
    assert counts == [3, 3]
    for found, expected in zip(features[3:], features[:3], strict=True):
        assert distance(found, expected) <= 1e-5


def in_part_specific(self):
    """For all classes the first one's context, later each its own."""
    ctx = self.ctx[:1].expand(self.n_cls, -1, -1) if self.common else self.ctx
    return assemble(self, ctx)


def test_another_way_to_the_same_values_is_checked_again():
    gradients = []
    for accelerated in (False, True):
        model = build("coop", class_specific=True).model
        learner = model.prompt_learner
        with torch.no_grad():
            learner.ctx[:] = learner.ctx[0]
        of_learner(learner, in_part_specific, common=True)
        if accelerated:
            accelerate(model)
        for learner.common in (True, False):
            features = encode(model, learner())
            gradients += torch.autograd.grad(features, [learner.ctx], upstream_of(features))
    for found, expected in zip(gradients[2:], gradients[:2], strict=True):
        assert distance(found, expected) <= 1e-4


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("place", ["encoder", "block"])
def test_adapters_that_begin_as_nothing(learns, place):
    outcomes = []
    for accelerated in (False, True):
        model = build("coop").model
        encoder = model.text_encoder
        owner = encoder if place == "encoder" else encoder.transformer.resblocks[1]
        width = 24 if place == "encoder" else 32
        owner.up = nn.Linear(width, width, bias=False).requires_grad_(learns)
        nn.init.zeros_(owner.up.weight)

        class Adapted(type(owner)):
            def forward(self, x, tokens=None):
                x = super().forward(x) if tokens is None else super().forward(x, tokens)
                return x + self.up(x)

        owner.__class__ = Adapted
        model.prompt_learner.ctx.requires_grad_(not learns)
        report = accelerate(model) if accelerated else None
        with torch.no_grad():
            outcomes.append(encode(model, model.prompt_learner()))
            torch.manual_seed(0)
            if not learns:
                nn.init.normal_(owner.up.weight)
        features = encode(model, model.prompt_learner())
        leaf = owner.up.weight if learns else model.prompt_learner.ctx
        outcomes += [features.detach()]
        outcomes += torch.autograd.grad(features, [leaf], upstream_of(features))
    for found, expected in zip(outcomes[3:], outcomes[:3], strict=True):
        assert torch.equal(found, expected)
    assert "up.weight, which CLIP's text encoder has not" in str(report)
