"""ProGrad's update rule, its general loss and its context, against plain PyTorch."""

import copy
import os
import socket
from types import SimpleNamespace

import pytest
import torch
from torch import multiprocessing
from torch.nn import functional

import vlfast
from tests.conftest import squares_dataset
from tests.objectives.support import KINDS, NAMES, Plain, make_batch, make_task, unit
from vlfast.errors import VlfastError
from vlfast.objectives import build_objectives
from vlfast.objectives.general_knowledge import GeneralKnowledge
from vlfast.prompts.context import init_of_template, initial_context
from vlfast.trainers.fit import TrainingStep
from vlfast.trainers.gradient_projection import GradientProjection, project

ALONE = SimpleNamespace(scaler=None, num_processes=1)


def contradicting(general, step=0):
    """A batch whose labels are what zero-shot CLIP holds least likely."""
    batch = make_batch(step)
    batch.labels = (unit(batch.frozen) @ general._frozen.T).argmin(dim=1)
    return batch


def plain_projection(gradient, general, factor):
    inner = float((gradient * general).sum())
    if inner >= 0:
        return gradient
    direction = general / general.norm()
    return gradient - factor * float((gradient * direction).sum()) * direction


@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("seed", range(6))
def test_project(seed, factor):
    torch.manual_seed(seed)
    gradient, general = torch.randn(2, 4, 5, dtype=torch.float64)
    result = project(gradient, general, factor)
    torch.testing.assert_close(result, plain_projection(gradient, general, factor))
    if factor == 1:
        assert (result * general).sum() > -1e-12
    zero = torch.zeros_like(general)
    assert torch.equal(project(gradient, zero, factor), gradient)
    assert torch.equal(project(zero, general, factor), zero)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dataset", ["letters", "oxford_pets"])
def test_steps(tiny_clip, kind, dataset):
    """Two gradients of one forward, parameter by parameter, over steps of SGD."""
    template = {"letters": "a photo of a {}.", "oxford_pets": "a type of pet, a photo of a {}."}
    task = make_task(tiny_clip, kind, dataset=dataset)
    general = GeneralKnowledge()
    general.prepare(task)
    training = TrainingStep(task, build_objectives([{"kind": "labels"}]), general)
    ours = list(training.parameters())
    projection = GradientProjection(0.8, ours)
    plain = Plain(tiny_clip)
    prompts = copy.deepcopy(task.prompts).double()
    theirs = list(prompts.parameters())
    optimizers = [torch.optim.SGD(ps, lr=0.3, momentum=0.9) for ps in (ours, theirs)]
    bent = 0
    for number in range(4):
        batch = contradicting(general, number)
        loss, terms = training(batch)
        projection.backward(ALONE, loss, terms["general_knowledge"])

        images = plain.images(prompts, batch)
        classes = plain.classes(prompts, NAMES, images)
        logits = plain.scale * (images[:, None] * classes).sum(-1)
        frozen = unit(plain.hard(NAMES, template[dataset]))
        targets = (plain.scale * unit(batch.frozen.double()) @ frozen.T).softmax(1)
        supervised = functional.cross_entropy(logits, batch.labels)
        known = -(targets * logits.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(loss.double(), supervised, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(terms["general_knowledge"].double(), known, rtol=1e-5, atol=1e-6)
        first = torch.autograd.grad(supervised, theirs, retain_graph=True)
        second = torch.autograd.grad(known, theirs)
        for parameter, one, g, k in zip(theirs, ours, first, second, strict=True):
            parameter.grad = plain_projection(g, k, 0.8)
            bent += not torch.equal(parameter.grad, g)
            size = float(g.abs().max())
            torch.testing.assert_close(
                one.grad.double(), parameter.grad, rtol=5e-4, atol=5e-4 * size
            )
        for optimizer in optimizers:
            optimizer.step()
    assert bent or kind == "class_specific"


def test_under_a_gradient_scaler(tiny_clip):
    """Gradients come scaled, as the optimiser's unscaling expects, and an overflow of either loss
    shows."""
    task = make_task(tiny_clip)
    general = GeneralKnowledge()
    general.prepare(task)
    training = TrainingStep(task, build_objectives([{"kind": "labels"}]), general)
    (context,) = training.parameters()
    projection = GradientProjection(1.0, [context])
    loss, terms = training(make_batch())
    projection.backward(ALONE, loss, terms["general_knowledge"])
    unscaled = context.grad.clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = SimpleNamespace(scaler=scaler, num_processes=1)
    loss, terms = training(make_batch())
    projection.backward(scaled, loss, terms["general_knowledge"])
    torch.testing.assert_close(context.grad, 1024 * unscaled, rtol=1e-5, atol=1e-3)

    loss, terms = training(make_batch())
    projection.backward(scaled, loss, terms["general_knowledge"] * float("inf"))
    optimizer = torch.optim.SGD([context], lr=1.0)
    before = context.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(context, before) and scaler.get_scale() == 512


@pytest.mark.parametrize(
    ("gradient", "general"),
    [([1.0, 2.0], [float("inf"), 1.0]), ([float("inf"), 0.0], [-1.0, 1.0])],
)
def test_an_overflow_stays_seen(gradient, general):
    assert not project(torch.tensor(gradient), torch.tensor(general), 1.0).isfinite().all()


def fit(clip, output, **options):
    options = {"shots": 8, "epochs": 3, "batch_size": 8, "n_ctx": 3, "lr": 0.1, **options}
    return vlfast.fit(
        "coop", model=clip, data=squares_dataset(), output=output, show_progress=False, **options
    )


def test_run(tiny_clip, tmp_path):
    """The general loss is logged, not minimised; clipping works; the run differs from CoOp's."""
    free = fit(tiny_clip, tmp_path / "free")
    bound = fit(tiny_clip, tmp_path / "bound", projection=1.0)
    for row in bound.folder.read_metrics():
        assert row["loss"] == pytest.approx(row["labels"], rel=1e-6)
        assert row["general_knowledge"] > 0
    ours, theirs = (run.folder.read_tensors("last")[0]["context"] for run in (free, bound))
    assert not torch.equal(ours, theirs)
    fit(tiny_clip, tmp_path / "clipped", projection=1.0, clip_grad_norm=0.1)
    for name, options in (("bf16", {"precision": "bf16"}), ("mixed", {"add": "mixture"})):
        fit(tiny_clip, tmp_path / name, projection=0.5, **options)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_bad_factor(tiny_clip, tmp_path, factor):
    with pytest.raises(VlfastError, match=r"recipe\.projection: expected a positive number"):
        fit(tiny_clip, tmp_path / "run", projection=factor)
    assert not (tmp_path / "run").exists()


def test_context_of_the_template(tiny_clip, tmp_path):
    """Its words at the end of the context, zeros before them."""
    words = tiny_clip.text_tower.embed_words("a type of pet, a photo of a")
    init = init_of_template("a type of pet, a photo of a {}.")
    context = initial_context(tiny_clip, 12, init)
    assert context.shape == (12, 32) and not context[: 12 - len(words)].any()
    assert torch.equal(context[12 - len(words) :], words)
    assert torch.equal(initial_context(tiny_clip, None, init), words)
    with pytest.raises(ValueError, match="n_ctx: expected at least 9, .*got 8"):
        initial_context(tiny_clip, 8, init)
    with pytest.raises(ValueError, match="no words before the class name"):
        init_of_template("{} texture.")
    run = fit(tiny_clip, tmp_path / "run", init="template", n_ctx=4, epochs=0)
    context = run.folder.read_tensors("last")[0]["context"]
    words = tiny_clip.text_tower.embed_words("a")
    assert torch.equal(context, torch.cat([torch.zeros(3, 32), words]))
    assert torch.equal(
        vlfast.load(tmp_path / "run", clip=tiny_clip).classifier.prompts.context, context
    )


def in_process(rank, port, model, results):
    """One of two: a step over half of the batch each, and a choice from a dictionary."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    from vlfast.clip.models import wrap_clip

    results[rank] = distributed_case(accelerator, wrap_clip(model), slice(rank, None, 2))


def distributed_case(accelerator, clip, rows):
    from tests.objectives.support import FixedTeacher
    from vlfast.objectives import Candidates

    task = make_task(clip, teacher=FixedTeacher())
    general = GeneralKnowledge()
    candidates = Candidates(2)
    for part in (general, candidates):
        part.prepare(task)
    training = TrainingStep(task, build_objectives([{"kind": "labels"}]), general)
    projection = GradientProjection(1.0, list(training.parameters()))
    (context,) = training.parameters()
    found = []
    for number in range(2):
        whole = contradicting(general, number)
        part = copy.copy(whole)
        # Four of the five images, so that halves are equal.
        for name in ("labels", "frozen", "teacher"):
            setattr(part, name, getattr(whole, name)[:4][rows])
        loss, terms = training(part)
        projection.backward(accelerator, loss, terms["general_knowledge"])
        found.append(context.grad.clone())
        with torch.no_grad():
            context -= 0.5 * context.grad
    chosen = candidates.choose(part.teacher).on_cpu.sort().values
    return [*found, chosen]


def test_two_processes_do_what_one_does(tiny_model, tiny_clip):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    manager = multiprocessing.Manager()
    results = manager.dict()
    multiprocessing.spawn(in_process, args=(port, tiny_model, results), nprocs=2)
    expected = distributed_case(ALONE, tiny_clip, slice(None))
    for rank in range(2):
        for ours, theirs in zip(results[rank], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)
