"""CoCoOp's images, encoded together behind its loop, and KDPL's selections of classes."""

import gc

import numpy as np
import pytest
import torch

from tests.dropin.lookalikes import SMALL, build
from tests.dropin.support import distance, guard_of
from vlfast.dropin import accelerate, text_encoder
from vlfast.dropin.image_batch import image_batch


@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize("classes", [1, 3, 8, 9, 11])
def test_cocoop(images, classes):
    built = build("cocoop", images=images, classes=classes)
    expected, logits = built.step(), built.evaluate()
    accelerate(built.model)
    for _ in range(2):
        found = built.step()
        assert distance(found.loss, expected.loss) <= 1e-5 or classes == 1
        for name, gradient in expected.gradients.items():
            error = (found.gradients[name] - gradient).abs().max()
            assert error <= 1e-4 * gradient.abs().max() + 1e-9, name
        assert distance(built.evaluate(), logits) <= 1e-5


def test_images_are_encoded_together_where_they_are_learned_from(monkeypatch):
    built = build("cocoop", images=30, classes=20)
    report = accelerate(built.model)
    assert report.changed["text_encoder"].endswith("up to EOT, of all images together")
    built.step(), built.evaluate()
    rows, through = [], text_encoder._through

    def counted(encoder, packing, *arguments):
        rows.append((packing.images, len(packing.positions)))
        return through(encoder, packing, *arguments)

    monkeypatch.setattr(text_encoder, "_through", counted)
    built.step()
    assert [images for images, _ in rows] == [30]
    del rows[:]
    built.evaluate()
    # No more at a time than the original has for one image.
    assert sum(images for images, _ in rows) == 30 and len(rows) > 1
    assert all(count <= 20 * SMALL.length for _, count in rows)
    gc.collect()
    assert len(guard_of(built.model).encoder.batches) == 0


def test_inference_mode():
    built = build("cocoop")
    expected = built.evaluate()
    accelerate(built.model)
    with torch.inference_mode():
        for _ in range(2):
            assert distance(built.model(built.images), expected) <= 1e-5


def test_which_image_of_a_batch():
    batch = torch.randn(3, 2, 5, 4, requires_grad=True) * 1
    for image, view in enumerate(batch):
        found = image_batch(view)
        assert found[0] is batch and found[1] == image
    assert image_batch(batch[-1])[1] == 2 and image_batch(batch[1:][1])[1] == 2
    others = [batch[:, 0], batch[1] + 0, batch[1].detach(), batch[:, :1].expand(3, 2, 5, 4)[1]]
    others += [batch.transpose(0, 1)[0], batch[0].transpose(0, 1)]
    assert [image_batch(other) for other in others] == [None] * len(others)


def of_images(model, images, change=lambda prompts: None, grad=True):
    """Features of all images in a loop, and the context's gradient."""
    prompts, features = model.prompt_learner(images), []
    for image in range(len(images)):
        its = prompts[image]
        change(its)
        features.append(model.text_encoder(its, model.tokenized_prompts))
        if not grad:
            # A caller's own, to write to.
            kept = features.pop()
            features.append(kept.clone())
            kept.zero_()
    features = torch.stack(features)
    if not grad:
        return features, None
    upstream = torch.linspace(-1, 1, features.numel()).view_as(features)
    return features.detach(), torch.autograd.grad(features, [model.prompt_learner.ctx], upstream)[0]


@pytest.mark.parametrize("grad", [True, False])
def test_prompts_may_be_written_to_in_the_loop(grad):
    model = build("cocoop").model
    images = torch.randn(3, SMALL.joint)

    def change(prompts):
        prompts[:, 1:4] *= 1.5

    with torch.set_grad_enabled(grad):
        expected = of_images(model, images, change, grad)
        accelerate(model)
        for _ in range(2):
            found = of_images(model, images, change, grad)
            assert distance(found[0], expected[0]) <= 1e-5
            assert not grad or distance(found[1], expected[1]) <= 1e-4


def test_a_batch_that_is_asked_twice():
    model = build("cocoop").model
    accelerate(model)
    with torch.no_grad():
        prompts = model.prompt_learner(torch.randn(3, SMALL.joint))
        first = [model.text_encoder(p, model.tokenized_prompts) for p in prompts]
        expected = [features.clone() for features in first]
        for features in first:
            features.zero_()
        for its_prompts, wanted in zip(prompts, expected, strict=True):
            assert torch.equal(model.text_encoder(its_prompts, model.tokenized_prompts), wanted)


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("form", [np.array, torch.tensor, list])
def test_selections_of_classes(class_specific, form):
    model = (built := build("kdpl-coop", classes=12, class_specific=class_specific)).model
    selections = [[7, 0, 11], [3], [11, 2, 5, 1, 0]]
    expected = [model(built.images, form(index)).detach() for index in selections]
    accelerate(model)
    for index, logits in zip(selections * 2, expected * 2, strict=True):
        assert distance(model(built.images, form(index)).detach(), logits) <= 1e-5


def test_conditional_selections():
    built = build("kdpl-cocoop", classes=12)
    model = built.model
    indices = [np.array([7, 0, 11]), None, np.array([3])]
    expected = [model(built.images, index).detach() for index in indices]
    accelerate(model)
    for index, logits in zip(indices * 2, expected * 2, strict=True):
        assert distance(model(built.images, index).detach(), logits) <= 1e-5


def test_a_failed_check_warns_once(recwarn):
    built = build("cocoop")

    class Last(type(built.model.text_encoder)):
        def read(self, x, tokenized_prompts):
            return self.ln_final(x)[:, -1] @ self.text_projection

    built.model.text_encoder.__class__ = Last
    expected = built.step()
    accelerate(built.model)
    for _ in range(2):
        found = built.step()
        assert distance(found.loss, expected.loss) <= 1e-6
    assert type(built.model.text_encoder) is Last
    assert len([w for w in recwarn if "was restored" in str(w.message)]) == 1


def test_one_check_serves_all_images():
    built = build("cocoop", images=4)
    accelerate(built.model)
    built.step()
    assert len(guard_of(built.model).checked) == 1
