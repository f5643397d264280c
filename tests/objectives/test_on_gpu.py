"""On a GPU no step waits for it: choosing from a dictionary, every objective, both gradients."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from vlfast.clip.models import load_clip
from vlfast.objectives import Batch, Candidates, Task, build_objectives
from vlfast.objectives.general_knowledge import GeneralKnowledge
from vlfast.prompts import HardPrompt, build_prompts
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.trainers.fit import TrainingStep
from vlfast.trainers.gradient_projection import GradientProjection
from vlfast.trainers.teacher import ModelTeacher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NAMES = ("cat", "dog", "tree", "boat", "guitar", "clock", "coffee cup", "red car")


@pytest.fixture(scope="module")
def clips():
    return [load_clip(name, device="cuda") for name in ("glyphs-student", "glyphs-teacher")]


def make_training(clips, specs, *, top_classes=None, projected=False):
    student, of_teacher = clips
    torch.manual_seed(0)
    prompts = build_prompts("shared", student, num_classes=len(NAMES), n_ctx=4).to(student.device)
    template = "an icon of a {}."
    taught = PromptedClassifier(of_teacher, HardPrompt(), NAMES, template)
    task = Task(
        PromptedClassifier(student, prompts, NAMES, template),
        "" if top_classes else "glyphs/nature",
        teacher=ModelTeacher(taught, student),
        labelled=not top_classes,
        candidates=Candidates(top_classes) if top_classes else None,
    )
    objectives = build_objectives(specs)
    general = GeneralKnowledge() if projected else None
    for part in (*objectives, general, task.candidates):
        if part is not None:
            part.prepare(task)
    return TrainingStep(task, objectives, general)


def make_batches(clip, count=2):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 6, 3, clip.image_size, clip.image_size, generator=generator)
    return [Batch(torch.arange(6).to(clip.device), images.to(clip.device)) for images in pixels]


@pytest.mark.parametrize(
    ("specs", "options"),
    [
        ([{"kind": "teacher"}], {}),
        ([{"kind": "teacher"}], {"top_classes": 3}),
        ([{"kind": "teacher"}, {"kind": "guidance"}], {"top_classes": 3}),
        ([{"kind": "mixture"}, {"kind": "labels"}], {}),
        ([{"kind": "mixture", "gate": False}], {}),
        ([{"kind": "mixture", "pool_size": 1}], {}),
        ([{"kind": "self_regulation", "templates": "dataset"}, {"kind": "labels"}], {}),
        ([{"kind": "labels"}], {"projected": True}),
    ],
)
def test_no_step_waits(clips, specs, options):
    training = make_training(clips, specs, **options)
    parameters = list(training.parameters())
    projection = GradientProjection(1.0, parameters) if "projected" in options else None
    alone = SimpleNamespace(scaler=None, num_processes=1)
    batches = make_batches(clips[0])
    ready = training.look_ahead(replace(batches[0]))
    losses = []
    for number in range(1, 7):
        # What is made or compiled once is, in the first steps.
        torch.cuda.set_sync_debug_mode("error" if number > 2 else "default")
        try:
            following = training.look_ahead(replace(batches[number % 2]))
            loss, terms = training(ready)
            for parameter in parameters:
                parameter.grad = None
            if projection is None:
                loss.backward()
            else:
                projection.backward(alone, loss, terms["general_knowledge"])
            with torch.no_grad():
                for parameter in parameters:
                    parameter -= 0.01 * parameter.grad
        finally:
            torch.cuda.set_sync_debug_mode("default")
        losses.append(loss.detach())
        ready = following
    assert torch.stack(losses).isfinite().all()


def test_the_same_choice_and_loss_as_on_the_cpu(clips):
    found = []
    for here in (clips, [load_clip(clip.name) for clip in clips]):
        training = make_training(here, [{"kind": "teacher"}], top_classes=3)
        batch = training.look_ahead(make_batches(here[0])[0])
        loss, _ = training(batch)
        found.append((sorted(batch.chosen.on_cpu.tolist()), float(loss.detach())))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3)
