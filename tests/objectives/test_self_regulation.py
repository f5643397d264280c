"""PromptSRC's losses against plain PyTorch."""

import pytest
import torch
from torch.nn import functional

from tests.objectives.support import (
    NAMES,
    FixedTeacher,
    Plain,
    compare_training,
    kl,
    losses_of,
    make_batch,
    make_task,
    unit,
)
from vlfast.data.templates import template_pool
from vlfast.errors import VlfastError
from vlfast.objectives import Batch, build_objectives
from vlfast.objectives.base import ChosenClasses
from vlfast.ops.backends import reference_only
from vlfast.trainers.fit import TrainingStep

# Twelve templates keep the whole sequences of the plain model few.
SPEC = {"kind": "self_regulation", "templates": "dataset"}
POOL = template_pool("dataset", "letters", "a photo of a {}.")


def frozen_classes(plain, names, pool=POOL):
    return unit(torch.stack([plain.hard(names, template) for template in pool]).mean(dim=0))


@pytest.mark.parametrize("kind", ["shared", "class_specific", "per_image", "images", "only_images"])
def test_promptsrc(tiny_clip, kind):
    task = make_task(tiny_clip, kind)
    if kind == "only_images":
        task.prompts.context = None

    def loss(plain, prompts, images, classes, logits, batch):
        fixed = frozen_classes(plain, task.classifier.classnames)
        zero_shot = unit(batch.frozen.double())
        total = functional.cross_entropy(logits, batch.labels)
        total = total + kl(plain.scale * zero_shot @ fixed.T, logits).sum() / logits.numel()
        if kind != "only_images":
            total = total + 25 * functional.l1_loss(classes, fixed.expand_as(classes))
        return total + 10 * functional.l1_loss(images, zero_shot)

    compare_training(task, [SPEC, {"kind": "labels"}], loss, steps=2, rtol=1e-3)


def test_sixty_templates_by_default(tiny_clip):
    """The mean of features that are not normalised."""
    task = make_task(tiny_clip, names=("cat", "red fox"))
    (objective,) = build_objectives([{"kind": "self_regulation"}])
    objective.prepare(task)
    pool = template_pool("imagenet", "", "")
    with torch.no_grad():
        expected = frozen_classes(Plain(tiny_clip), ("cat", "red fox"), pool)
    assert len(pool) == len(set(pool)) == 60
    torch.testing.assert_close(objective._frozen.double(), expected, rtol=1e-4, atol=1e-5)


def test_terms_are_those_that_can_differ_from_zero(tiny_clip):
    both = {"text_regulation", "image_regulation", "logit_regulation"}
    for kind, missing in (
        ("shared", "image_regulation"),
        ("only_images", "text_regulation"),
        ("images", None),
    ):
        (objective,) = build_objectives([SPEC])
        task = make_task(tiny_clip, kind)
        objective.prepare(task)
        _, terms = TrainingStep(task, [objective])(make_batch())
        assert set(terms) - {"accuracy"} == both - {missing}


def test_weights(tiny_clip):
    (objective,) = build_objectives([{**SPEC, "weight": 2.0, "image_weight": 3.0}])
    terms = ("text_regulation", "image_regulation", "logit_regulation")
    assert [objective.weight_of(term) for term in terms] == [50.0, 6.0, 2.0]


def test_with_candidates_all_sides_are_of_those_classes(tiny_clip):
    """Beside class-agnostic distillation: equal to a task of the chosen names alone."""
    index = torch.tensor([3, 1])
    teacher = FixedTeacher()
    batch = make_batch()
    of_all = batch.teacher @ teacher.class_features(NAMES).T
    losses = []
    for names, chosen in (
        (NAMES, ChosenClasses(index, of_all, index)),
        (("red fox", "yellow school bus"), None),
    ):
        task = make_task(tiny_clip, "images", names=names, teacher=teacher, labelled=False)
        objectives = build_objectives([SPEC, {"kind": "teacher"}, {"kind": "guidance"}])
        for objective in objectives:
            objective.prepare(task)
        objectives[1]._class_features = teacher.class_features(names)
        here = Batch(batch.labels, frozen=batch.frozen, teacher=batch.teacher, chosen=chosen)
        losses.append(TrainingStep(task, objectives)(here)[0])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_reference(tiny_clip):
    specs = [SPEC, {"kind": "labels"}]
    fused = losses_of(make_task(tiny_clip, "images"), specs)
    with reference_only():
        plain = losses_of(make_task(tiny_clip, "images"), specs)
    torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-6)


def test_refusals(tiny_clip):
    (objective,) = build_objectives([SPEC])
    with pytest.raises(VlfastError, match="neither class nor image features of 'hard' prompts"):
        objective.check(make_task(tiny_clip, "hard"))
    task = make_task(tiny_clip, "images")
    task.prompts.width = 24
    with pytest.raises(VlfastError, match="got 24 numbers for 32"):
        objective.check(task)
    with pytest.raises(VlfastError, match="self_regulation text_weight: expected at least 0"):
        build_objectives([{**SPEC, "text_weight": -1.0}])
    (objective,) = build_objectives([{**SPEC, "templates": "nosuch"}])
    with pytest.raises(FileNotFoundError, match="no file nosuch"):
        objective.check(make_task(tiny_clip))
