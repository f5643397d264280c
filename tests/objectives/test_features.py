"""Feature distances to the teacher against plain PyTorch."""

import pytest
from torch.nn import functional

from tests.objectives.support import FixedTeacher, compare_training, make_batch, make_task
from vlfast.errors import VlfastError
from vlfast.objectives import build_objectives
from vlfast.trainers.fit import TrainingStep


@pytest.mark.parametrize("kind", ["images", "only_images"])
@pytest.mark.parametrize("loss", ["l1", "mse"])
def test_features(tiny_clip, kind, loss):
    task = make_task(tiny_clip, kind, teacher=FixedTeacher(width=32))
    (objective,) = build_objectives([{"kind": "features", "loss": loss, "weight": 2.0}])
    objective.check(task)
    batch = make_batch(width=32)
    ours, _ = TrainingStep(task, [objective])(batch)
    turn = task.prompts.turn.detach().double().requires_grad_()
    student = functional.normalize(batch.frozen.double() @ turn, dim=1)
    apart = {"l1": functional.l1_loss, "mse": functional.mse_loss}[loss]
    theirs = 2 * apart(student, batch.teacher.double())
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    ours.backward()
    theirs.backward()
    assert functional.cosine_similarity(
        task.prompts.turn.grad.double().flatten(), turn.grad.flatten(), dim=0
    ).item() == pytest.approx(1, abs=1e-9)
    assert task.prompts.context.grad is None


def test_beside_labels(tiny_clip):
    task = make_task(tiny_clip, "images", teacher=FixedTeacher(width=32))
    batch = make_batch

    def loss(plain, prompts, images, classes, logits, batch):
        apart = functional.mse_loss(images, batch.teacher.double())
        return functional.cross_entropy(logits, batch.labels) + 3 * apart

    def wide(step=0, width=32):
        return batch(step, width)

    specs = [{"kind": "features", "loss": "mse", "weight": 3.0}, {"kind": "labels"}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.objectives.support.make_batch", wide)
        compare_training(task, specs, loss)


def test_refusals(tiny_clip):
    (objective,) = build_objectives([{"kind": "features"}])
    task = make_task(tiny_clip, "images", teacher=FixedTeacher(width=24))
    with pytest.raises(VlfastError, match="got 32 and 24; prompts.projector"):
        objective.check(task)
    with pytest.raises(VlfastError, match="those of 'shared' prompts depend on nothing"):
        objective.check(make_task(tiny_clip, teacher=FixedTeacher(width=32)))
    with pytest.raises(VlfastError, match="loss: expected 'l1' or 'mse', got 'l2'"):
        build_objectives([{"kind": "features", "loss": "l2"}])
