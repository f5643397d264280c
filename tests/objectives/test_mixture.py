"""MoPD's and SiPD's distillation against plain PyTorch."""

import pytest
import torch
from torch.nn import functional

from tests.objectives.support import (
    KINDS,
    compare_training,
    kl,
    losses_of,
    make_batch,
    make_task,
    unit,
)
from vlfast.data.templates import template_pool
from vlfast.errors import VlfastError
from vlfast.objectives import build_objectives
from vlfast.ops.backends import reference_only

POOL = template_pool("dataset", "letters", "a photo of a {}.")


def plain_mixture(task, plain, gate, logits, batch, *, count, temperature=1.0, templates=POOL):
    """(distillation, selection) of METHODS' equations, a loop over prompts."""
    images = unit(batch.frozen.double())
    names = task.classifier.classnames
    teachers = torch.stack(
        [plain.scale * images @ unit(plain.hard(names, t)).T for t in templates], dim=1
    )
    scores = images @ gate
    best = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :count]
    weights = scores.gather(1, best).softmax(dim=1)
    distillation = selection = 0
    for i in range(count):
        one = teachers[torch.arange(len(best)), best[:, i]]
        divergence = temperature**2 * kl(one / temperature, logits / temperature)
        distillation = distillation + (weights[:, i] * divergence).mean()
        missed = functional.cross_entropy(one, batch.labels, reduction="none")
        selection = selection + (weights[:, i] * missed).mean()
    return distillation, selection


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "temperature"), [(2, 1.0), (3, 2.0)])
def test_mopd(tiny_clip, kind, count, temperature):
    task = make_task(tiny_clip, kind)

    def loss(plain, prompts, images, classes, logits, batch, gate):
        options = {"count": count, "temperature": temperature}
        distilled, selected = plain_mixture(task, plain, gate, logits, batch, **options)
        supervised = functional.cross_entropy(logits, batch.labels)
        return 0.8 * supervised + 0.2 * distilled + 0.1 * selected

    mixture = {"kind": "mixture", "num_prompts": count, "temperature": temperature}
    specs = [mixture, {"kind": "labels", "weight": 0.8}]
    training = compare_training(task, specs, loss, own=["gate"], steps=2)
    gate = training.learned()["objectives.mixture.gate"]
    assert gate.shape == (32, 12) and gate.abs().sum() > 0


@pytest.mark.parametrize("kind", ["shared", "images"])
def test_all_prompts_without_a_gate(tiny_clip, kind):
    task = make_task(tiny_clip, kind)
    equal = torch.zeros(32, 12, dtype=torch.float64)

    def loss(plain, prompts, images, classes, logits, batch):
        return 0.2 * plain_mixture(task, plain, equal, logits, batch, count=12)[0]

    spec = {"kind": "mixture", "gate": False}
    training = compare_training(task, [spec], loss)
    assert set(training.learned()) == set(task.prompts.state_dict())


@pytest.mark.parametrize("kind", ["shared", "class_specific"])
def test_sipd(tiny_clip, kind):
    """One hard prompt, the first of the pool: no gate, no selection."""
    task = make_task(tiny_clip, kind)
    equal = torch.zeros(32, 1, dtype=torch.float64)

    def loss(plain, prompts, images, classes, logits, batch):
        one = {"count": 1, "templates": POOL[:1]}
        return 0.2 * plain_mixture(task, plain, equal, logits, batch, **one)[0]

    compare_training(task, [{"kind": "mixture", "pool_size": 1, "num_prompts": 1}], loss)


def test_without_selection_no_label_is_read(tiny_clip):
    """Labels of other classes, as unlabelled images may have."""
    task = make_task(tiny_clip)
    (objective,) = build_objectives([{"kind": "mixture", "selection_weight": 0.0}])
    assert not objective.needs_labels
    objective.prepare(task)
    from vlfast.objectives import Step

    batch = make_batch()
    expected = objective(Step(task, batch))
    batch.labels = batch.labels + 1000
    terms = objective(Step(task, batch))
    assert list(terms) == ["mixture"] and torch.equal(terms["mixture"], expected["mixture"])


def test_pool_of_a_file(tiny_clip, tmp_path):
    (tmp_path / "pool.txt").write_text("a photo of a {}.\n\nthe {} of my aunt.\n")
    task = make_task(tiny_clip)
    equal = torch.zeros(32, 2, dtype=torch.float64)

    def loss(plain, prompts, images, classes, logits, batch):
        templates = ("a photo of a {}.", "the {} of my aunt.")
        own = {"count": 2, "templates": templates}
        return 0.2 * plain_mixture(task, plain, equal, logits, batch, **own)[0]

    spec = {"kind": "mixture", "gate": False, "pool": str(tmp_path / "pool.txt")}
    compare_training(task, [spec], loss, steps=1)


@pytest.mark.parametrize("options", [{}, {"gate": False}, {"pool_size": 1, "num_prompts": 1}])
def test_reference(tiny_clip, options):
    specs = [{"kind": "mixture", **options}, {"kind": "labels", "weight": 0.8}]
    fused = losses_of(make_task(tiny_clip), specs)
    with reference_only():
        plain = losses_of(make_task(tiny_clip), specs)
    torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_prompts": 13}, VlfastError, "num_prompts: expected 2 to 12, .*, got 13"),
        ({"num_prompts": 1}, VlfastError, "num_prompts: expected 2 to 12, .*, got 1"),
        ({"pool_size": 13}, VlfastError, "the pool 'dataset' has 12 prompts, got 13"),
        ({"pool_size": 0}, VlfastError, "pool_size: expected at least 1, got 0"),
        ({"pool": "nosuch"}, FileNotFoundError, "no file nosuch, and no pool of that name"),
        ({"temperature": 0.0}, VlfastError, "mixture temperature: expected above 0"),
        ({"selection_weight": -1.0}, VlfastError, "selection_weight: expected at least 0"),
    ],
)
def test_refusals(tiny_clip, options, error, match):
    with pytest.raises(error, match=match):
        (objective,) = build_objectives([{"kind": "mixture", **options}])
        objective.check(make_task(tiny_clip))
