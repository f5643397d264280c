"""KDPL's and PromptKD's distillation against plain PyTorch."""

import pytest
import torch

from tests.objectives.support import (
    KINDS,
    FixedTeacher,
    compare_training,
    kl,
    losses_of,
    make_batch,
    make_task,
)
from vlfast.errors import VlfastError
from vlfast.objectives import build_objectives, complete
from vlfast.ops.backends import reference_only
from vlfast.prompts import Prompts
from vlfast.trainers.fit import TrainingStep

KDPL = {"kind": "teacher"}
PROMPTKD = {
    "kind": "teacher",
    "weight": 1000.0,
    "forward_weight": 1.0,
    "reverse_weight": 0.0,
    "scale": "teacher",
    "reduction": "mean",
}


def of_teacher(task, batch):
    names = task.classifier.classnames
    return batch.teacher.double() @ task.teacher.class_features(names).double().T


@pytest.mark.parametrize("kind", KINDS)
def test_kdpl(tiny_clip, kind):
    """Both directions, batch mean, the student's scale divided by the teacher's calibration."""
    task = make_task(tiny_clip, kind, teacher=FixedTeacher(calibration=1.5))

    def loss(plain, prompts, images, classes, logits, batch):
        teacher = plain.scale / 1.5 * of_teacher(task, batch)
        return (0.5 * kl(teacher, logits) + 0.5 * kl(logits, teacher)).mean()

    compare_training(task, [KDPL], loss)


@pytest.mark.parametrize("kind", ["shared", "images"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_promptkd(tiny_clip, kind, temperature):
    """Forward only, over images and classes, the teacher's own scale, times T squared."""
    task = make_task(tiny_clip, kind, teacher=FixedTeacher(scale=30.0))

    def loss(plain, prompts, images, classes, logits, batch):
        teacher = 30.0 * of_teacher(task, batch)
        terms = kl(teacher / temperature, logits / temperature)
        return 1000 * temperature**2 * terms.sum() / logits.numel()

    # Steps of 1000 times the size leave the region where fp32 can be compared.
    compare_training(task, [{**PROMPTKD, "temperature": temperature}], loss, steps=1)


def test_beside_labels_the_logits_are_computed_once(tiny_clip, monkeypatch):
    task = make_task(tiny_clip, teacher=FixedTeacher())

    def loss(plain, prompts, images, classes, logits, batch):
        teacher = plain.scale * of_teacher(task, batch)
        distilled = (0.5 * kl(teacher, logits) + 0.5 * kl(logits, teacher)).mean()
        return torch.nn.functional.cross_entropy(logits, batch.labels) + 0.7 * distilled

    calls = []
    scaled_cosines = task.classifier.scaled_cosines
    monkeypatch.setattr(
        task.classifier, "scaled_cosines", lambda *a: calls.append(1) or scaled_cosines(*a)
    )
    compare_training(task, [{"kind": "labels"}, {**KDPL, "weight": 0.7}], loss)
    assert len(calls) == 3
    assert len(task.teacher.asked) == 1 + 3  # once to prepare; the others are the test's own


class TeachersClasses(Prompts):
    """Image features turned into the teacher's space, among the teacher's class features."""

    kind = "teachers_classes"
    learns_images = True

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher
        self.width = teacher.width
        self.project = torch.nn.Linear(32, teacher.width)

    def encode(self, clip, tokens, index=None, images=None):
        from vlfast.clip.text_tower import TextOutput

        return TextOutput(self.teacher.class_features(("cat", "hen")), None)

    def encode_images(self, clip, pixels, frozen=None):
        return self.project(frozen)


def test_a_student_among_the_teachers_class_features(tiny_clip):
    from vlfast.objectives import Task
    from vlfast.prompts.classifier import PromptedClassifier

    torch.manual_seed(0)
    teacher = FixedTeacher()
    classifier = PromptedClassifier(tiny_clip, TeachersClasses(teacher), ("cat", "hen"), "a {}.")
    task = Task(classifier, "letters", teacher=teacher)
    (objective,) = build_objectives([PROMPTKD])
    objective.check(task)
    objective.prepare(task)
    batch = make_batch()
    loss, _ = TrainingStep(task, [objective])(batch)
    features = teacher.class_features(("cat", "hen"))
    student = torch.nn.functional.normalize(classifier.prompts.project(batch.frozen), dim=1)
    logits = tiny_clip.logit_scale * student @ features.T
    of_all = teacher.logit_scale * batch.teacher @ features.T
    torch.testing.assert_close(loss, 1000 * kl(of_all, logits).sum() / logits.numel())


@pytest.mark.parametrize("spec", [KDPL, PROMPTKD])
def test_reference(tiny_clip, spec):
    task = make_task(tiny_clip, teacher=FixedTeacher())
    fused = losses_of(task, [spec])
    task = make_task(tiny_clip, teacher=FixedTeacher())
    with reference_only():
        torch.testing.assert_close(losses_of(task, [spec]), fused, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": 0.0}, "teacher temperature: expected above 0, got 0.0"),
        ({"forward_weight": -1.0}, "teacher forward_weight: expected at least 0, got -1.0"),
        ({"reverse_weight": float("nan")}, "teacher reverse_weight"),
        ({"forward_weight": 0.0, "reverse_weight": 0.0}, "expected one above 0"),
        ({"scale": "own"}, "scale: expected 'student' or 'teacher', got 'own'"),
        ({"reduction": "sum"}, "reduction: expected 'batchmean' or 'mean', got 'sum'"),
        ({"weight": float("inf")}, "teacher weight: expected a number"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(VlfastError, match=match):
        build_objectives([{**KDPL, **options}])


def test_defaults_are_kdpls():
    assert complete(KDPL) == {
        "kind": "teacher",
        "weight": 1.0,
        "forward_weight": 0.5,
        "reverse_weight": 0.5,
        "temperature": 1.0,
        "scale": "student",
        "reduction": "batchmean",
    }
