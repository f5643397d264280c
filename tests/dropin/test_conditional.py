"""Prompts that stand for a tensor: CoCoOp's of all images at once, and selections of classes."""

import numpy as np
import pytest
import torch

from tests.dropin.lookalikes import SMALL, build
from tests.dropin.support import distance, guard_of
from vlfast.dropin import accelerate
from vlfast.dropin.assembled import BatchPrompts, LearnedPrompts, Parts


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
    from vlfast.dropin import text_encoder

    built = build("cocoop", images=30, classes=20)
    accelerate(built.model)
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


def test_prompts_stand_for_their_tensor():
    built = build("cocoop", images=3, classes=4)
    learner = built.model.prompt_learner
    features = torch.randn(3, SMALL.joint)
    with torch.no_grad():
        tensor = learner(features)
        accelerate(built.model)
        prompts = learner(features)
    assert isinstance(prompts, BatchPrompts) and prompts.shape == tensor.shape
    assert len(prompts) == 3 and prompts.dtype == tensor.dtype and prompts.ndim == 4
    assert torch.equal(prompts[1].tensor(), tensor[1]) and torch.equal(prompts[:2], tensor[:2])
    assert torch.equal(torch.cat([prompts, prompts]), torch.cat([tensor, tensor]))
    assert torch.equal(prompts + 1, tensor + 1) and torch.equal(1 + prompts[2], 1 + tensor[2])
    assert torch.equal(prompts.mean(dim=0), tensor.mean(dim=0))
    assert torch.equal(prompts[-1].double(), tensor[-1].double())
    assert prompts.to("cpu") is prompts and prompts.float() is prompts
    assert [len(one) for one in prompts] == [4, 4, 4]
    with pytest.raises(IndexError):
        prompts[3]


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("form", [np.array, torch.tensor, list])
def test_classes_are_selected_before_prompts_are_built(class_specific, form, monkeypatch):
    built = build("kdpl-coop", classes=12, class_specific=class_specific)
    model = built.model
    index = form([7, 0, 11])
    expected = model(built.images, index).detach()
    accelerate(model)
    model(built.images, index)
    built_classes, prompts = [], Parts.prompts

    def counted(self, image=0):
        built_classes.append(self.shape[0])
        return prompts(self, image)

    monkeypatch.setattr(Parts, "prompts", counted)
    assert distance(model(built.images, index).detach(), expected) <= 1e-5
    assert built_classes == ([3] if class_specific else [])
    whole = model.prompt_learner()
    assert isinstance(whole, LearnedPrompts)
    assert isinstance(whole[index], LearnedPrompts) and whole[index].shape[0] == 3
    assert torch.equal(whole[index].tensor(), whole.tensor()[index])
    assert torch.equal(whole[[True, False] * 6], whole.tensor()[[True, False] * 6])
    with pytest.raises(IndexError):
        whole[form([12])]


def test_conditional_selections():
    built = build("kdpl-cocoop", classes=12)
    model = built.model
    indices = [np.array([7, 0, 11]), None, np.array([3])]
    expected = [model(built.images, index).detach() for index in indices]
    accelerate(model)
    for index, logits in zip(indices * 2, expected * 2, strict=True):
        assert distance(model(built.images, index).detach(), logits) <= 1e-5
    assert isinstance(model.prompt_learner(torch.randn(2, SMALL.joint), indices[0]), BatchPrompts)


@pytest.mark.parametrize("family", ["maple", "mopd"])
def test_what_comes_with_the_prompts_stays(family):
    model = build(family).model
    before = model.prompt_learner()
    accelerate(model)
    prompts, *rest = model.prompt_learner()
    assert isinstance(prompts, LearnedPrompts) and torch.equal(prompts.tensor(), before[0])
    for one, other in zip(rest, before[1:], strict=True):
        if isinstance(other, torch.Tensor):
            assert torch.equal(one, other)
        else:
            assert all(map(torch.equal, one, other))


def own_way(learner, forward):
    learner.__class__ = type("Learner", (type(learner),), {"forward": forward})


def scaled(self):
    return self.construct_prompts(self.ctx.expand(7, -1, -1), self.token_prefix, self.token_suffix)


def noisy(self):
    ctx = self.ctx + (torch.randn_like(self.ctx) if self.training else 0)
    return self.construct_prompts(
        ctx.expand(self.n_cls, -1, -1), self.token_prefix, self.token_suffix
    )


def warmed_up(self):
    ctx = self.ctx * getattr(self, "warmth", 1.0)
    return self.construct_prompts(
        ctx.expand(self.n_cls, -1, -1), self.token_prefix, self.token_suffix
    )


def test_learners_of_another_kind_build_their_own_prompts():
    model = build("coop").model
    own_way(model.prompt_learner, noisy)
    accelerate(model)
    assert isinstance(model.prompt_learner.eval()(), LearnedPrompts)
    assert isinstance(model.prompt_learner.train()(), torch.Tensor)

    model = build("coop").model
    own_way(model.prompt_learner, warmed_up)
    accelerate(model)
    assert isinstance(model.prompt_learner(), LearnedPrompts)
    model.prompt_learner.warmth = 0.5
    assert isinstance(model.prompt_learner(), torch.Tensor)

    model = build("coop", classes=7).model
    own_way(model.prompt_learner, scaled)
    accelerate(model)
    assert isinstance(model.prompt_learner(), LearnedPrompts)


def test_a_failed_check_restores_the_learner(recwarn):
    built = build("cocoop")

    class Last(type(built.model.text_encoder)):
        def read(self, x, tokenized_prompts):
            return self.ln_final(x)[:, -1] @ self.text_projection

    built.model.text_encoder.__class__ = Last
    expected = built.step()
    accelerate(built.model)
    learner = type(built.model.prompt_learner).original_class
    for _ in range(2):
        found = built.step()
        assert distance(found.loss, expected.loss) <= 1e-6
    assert type(built.model.prompt_learner) is learner
    assert type(built.model.text_encoder) is Last
    assert len([w for w in recwarn if "was restored" in str(w.message)]) == 1


def test_one_check_serves_all_images():
    built = build("cocoop", images=4)
    accelerate(built.model)
    built.step()
    assert len(guard_of(built.model).checked) == 1
