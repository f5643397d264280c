"""Accelerated models are still what they were: replicas, copies, pickles, state, optimisers."""

import copy
import io
import threading
import warnings

import pytest
import torch
from torch import nn

from tests.dropin.lookalikes import build
from tests.dropin.support import distance, guard_of, replica_of
from vlfast.dropin import accelerate, restore


def logits_and_gradients(model, images, leaves):
    logits = model(images)
    upstream = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    return logits.detach(), torch.autograd.grad(logits, leaves, upstream)


@pytest.mark.parametrize("family", ["coop", "cocoop"])
@pytest.mark.parametrize("first", ["model", "replica"])
def test_replicas_see_their_own_weights(family, first):
    built = build(family)
    built.train(False)
    model, images = built.model, built.images
    leaves = [p for p in model.parameters() if p.requires_grad]
    moved = {p: p.detach() + 0.05 for p in model.text_encoder.parameters()}
    other = replica_of(model, moved)
    expected = logits_and_gradients(model, images, leaves)
    of_other = logits_and_gradients(other, images, leaves)
    assert distance(of_other[0], expected[0]) > 1e-2
    accelerate(model)
    if first == "model":
        model(images)
    found = logits_and_gradients(replica_of(model, moved), images, leaves)
    assert distance(found[0], of_other[0]) <= 1e-5
    for gradient, wanted in zip(found[1], of_other[1], strict=True):
        assert distance(gradient, wanted) <= 1e-4
    assert distance(model(images), expected[0]) <= 1e-5
    with torch.no_grad():
        assert distance(replica_of(model, moved)(images), of_other[0]) <= 1e-5
        assert distance(model(images), expected[0]) <= 1e-5
        assert distance(replica_of(model, moved)(images), of_other[0]) <= 1e-5


def test_replicas_in_threads_are_checked_once():
    built = build("coop", classes=9)
    model, images = built.model, built.images
    moves = [{p: p.detach() + 0.02 * k for p in model.text_encoder.parameters()} for k in range(4)]
    expected = [replica_of(model, moved)(images).detach() for moved in moves]
    report = accelerate(model)
    replicas = [replica_of(model, moved) for moved in moves]
    found, errors = {}, []

    def run(k):
        try:
            found[k] = replicas[k](images)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for k, logits in enumerate(expected):
        assert distance(found[k], logits) <= 1e-5
    assert report.checks["text_encoder"] == ["checked, features and gradients are the same"]


def test_a_check_that_fails_in_a_replica_holds_for_the_model():
    built = build("coop")
    model, images = built.model, built.images
    original = type(model.text_encoder)
    read_last(model)
    expected = model(images)
    accelerate(model)
    with pytest.warns(UserWarning, match="was restored, since features differ"):
        found = replica_of(model)(images)
    assert distance(found, expected) <= 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(images), expected)
        assert torch.equal(replica_of(model)(images), expected)
    assert type(model.text_encoder).__mro__[1] is original


def read_last(model):
    """Let the encoder read the last position rather than EOT's."""

    class Last(type(model.text_encoder)):
        def read(self, x, tokenized_prompts):
            return self.ln_final(x)[:, -1] @ self.text_projection

    model.text_encoder.__class__ = Last


def test_data_parallel_before_and_after():
    built = build("coop")
    expected = built.model(built.images)
    wrapped = nn.DataParallel(built.model)
    report = accelerate(wrapped)
    assert set(report.changed) == {"module.text_encoder"}
    assert distance(wrapped(built.images), expected) <= 1e-5
    assert distance(nn.DataParallel(built.model)(built.images), expected) <= 1e-5
    assert restore(wrapped) == ["module.text_encoder"]
    assert torch.equal(wrapped(built.images), expected)


@pytest.mark.parametrize("called", [False, True])
def test_copies_are_accelerated_and_independent(called):
    built = build("coop")
    model, images = built.model, built.images
    original = type(model.text_encoder)
    accelerate(model)
    if called:
        model(images)
    copied = copy.deepcopy(model)
    assert isinstance(copied.text_encoder, original)
    assert type(copied.text_encoder) is type(model.text_encoder) is not original
    assert guard_of(copied).encoder.learner is copied.prompt_learner
    with torch.no_grad():
        copied.prompt_learner.ctx *= -1
        copied.text_encoder.text_projection[0] *= 3
    found = copied(images)
    restore(copied)
    assert type(copied.text_encoder) is original
    assert distance(found, copied(images)) <= 1e-5
    assert distance(model(images), found) > 1e-3
    assert type(model.text_encoder) is not original


def test_whole_models_can_be_saved():
    built = build("coop")
    accelerate(built.model)
    expected = built.model(built.images)
    file = io.BytesIO()
    torch.save(built.model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert distance(loaded(built.images), expected) <= 1e-6
    assert restore(loaded) == ["text_encoder"]
    assert distance(loaded(built.images), expected) <= 1e-5


def test_optimisers_and_modes_stay():
    built, plain = build("coop"), build("coop")
    before = torch.optim.SGD(built.model.prompt_learner.parameters(), lr=0.1)
    accelerate(built.model)
    after = torch.optim.SGD(built.model.prompt_learner.parameters(), lr=0.1)
    its = torch.optim.SGD(plain.model.prompt_learner.parameters(), lr=0.1)
    for optimizer in (before, after):
        built.step(), plain.step()
        optimizer.step(), its.step()
    restore(built.model)
    built.step(), plain.step()
    after.step(), its.step()
    accelerate(built.model)
    assert distance(built.evaluate(), plain.evaluate()) <= 1e-4
    assert not built.model.prompt_learner.training
    assert built.model.train().text_encoder.training
    for module in built.model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = nn.LayerNorm  # the codebases' own computes in fp32
    moved = built.model.double()
    moved.text_encoder.dtype = moved.dtype = torch.float64
    found = moved(built.images)
    assert found.dtype == torch.float64
    restore(moved)
    assert distance(found, moved(built.images)) <= 1e-12


def test_an_encoder_of_two_models():
    """The second one's contexts are the classes' own, and start out the same."""
    one, other = build("coop"), build("coop", class_specific=True)
    with torch.no_grad():
        other.model.prompt_learner.ctx.copy_(one.model.prompt_learner.ctx)
    other.model.text_encoder = one.model.text_encoder
    expected = [built.step() for built in (one, other, one)]
    accelerate(one.model)
    report = accelerate(other.model)
    assert "already" in report.left["text_encoder"]
    for built, wanted in zip((one, other, one), expected, strict=True):
        found = built.step()
        assert distance(found.loss, wanted.loss) <= 1e-5
        for name, gradient in wanted.gradients.items():
            assert distance(found.gradients[name], gradient) <= 1e-4
