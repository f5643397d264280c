"""The probe: what it prints and returns for steps that keep their numbers, for those that do not,
and for what it can't use."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.dropin.test_perplexity import make
from vlfast.dropin import accelerate
from vlfast.dropin.probe import load, main, probe
from vlfast.dropin.snapshot import Snapshot
from vlfast.dropin.swap import is_swapped
from vlfast.errors import VlfastError

ROOT = Path(__file__).parents[2]
MODULE = """
import torch
from tests.dropin.test_probe import model_and_step

def build():
    return model_and_step()

def not_a_pair(): return model_and_step()[0]
def no_models(): return [], print
def no_module(): return object(), print
def no_step(): return torch.nn.Linear(2, 2), 3
number = 3
"""


def model_and_step(images=None, change=None, loss_of=lambda loss: loss, loss_scale=1.0, **setting):
    """A CustomCLIP in fp32 and its training step. change: called with the model and its loss where
    the model is accelerated."""
    model, _ = make(**setting)
    model = model.float()
    model.text_encoder.dtype = torch.float32
    fixed, labels = torch.randn(4, 12), torch.arange(4)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.002, momentum=0.9)

    def step():
        loss = functional.cross_entropy(model(fixed if images is None else images()), labels)
        optimizer.zero_grad()
        (loss_scale * loss).backward()
        if change is not None and is_swapped(model.text_encoder):
            loss = change(model, loss)
        optimizer.step()
        return loss_of(loss)

    return model, step


@pytest.mark.parametrize(
    "setting", [{}, {"position": "middle"}, {"conditional": True}, {"deep": 5}], ids=str
)
def test_a_step_that_stays_the_same(setting, capsys):
    model, step = model_and_step(**setting)
    assert probe([model], step, steps=2) == 0
    said = capsys.readouterr().out
    assert "text_encoder: checked, features and gradients are the same" in said
    assert said.count("step from the same state: same") == 2
    assert re.search(r"time of a step, median of 2: \S+ s before, \S+ s after: \S+x \(", said)
    kind = "limit 5e-03, fp16 deep prompts" if "deep" in setting else "limit 1e-04, fp32"
    assert said.count(kind) == 2
    for name, parameter in model.named_parameters():
        assert (f"    {name}: " in said) == parameter.requires_grad


def scale_loss(model, loss):
    return loss * (1 + 1e-4)


def scale_gradient(model, loss):
    model.prompt_learner.ctx.grad *= 1 + 1e-3
    return loss


def drop_gradient(model, loss):
    model.prompt_learner.ctx.grad = None
    model.text_encoder.ln_final.bias.grad = torch.zeros(16)
    return loss


def spoil_gradient(model, loss):
    model.prompt_learner.ctx.grad[0, 0] = float("nan")
    return loss


@pytest.mark.parametrize("change", [scale_loss, scale_gradient, drop_gradient, spoil_gradient])
def test_a_step_that_does_not(change, capsys):
    model, step = model_and_step(change=change)
    assert probe([model], step, steps=1) == 1
    assert capsys.readouterr().out.count("step from the same state: NOT THE SAME") == 2


def test_tolerance(capsys):
    model, step = model_and_step(change=scale_gradient)
    assert probe([model], step, steps=1, tolerance=1e-2) == 0


def test_random_numbers_are_drawn_again(capsys):
    model, step = model_and_step(images=lambda: torch.randn(4, 12) + random.random())
    assert probe([model], step, steps=1) == 0


def test_several_models_and_one_that_is_left(capsys):
    model, step = model_and_step()
    other = nn.Linear(2, 2)
    assert probe([other, model], step, steps=1) == 0
    said = capsys.readouterr().out
    assert "model: left as it is, there is no text encoder in it" in said
    assert "    1.prompt_learner.ctx: " in said


def test_a_gradient_of_rounding_alone(capsys):
    """In front of what takes the mean off, a bias has a gradient of zero but for rounding."""
    model, _ = model_and_step()
    model.bias, model.scale = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
    images, noise = torch.randn(4, 12), iter([1e-9, -3e-9] * 10)

    def step():
        loss = model.scale * functional.cross_entropy(model(images), torch.arange(4))
        (loss + next(noise) * model.bias).backward()
        return loss

    assert probe([model], step, steps=1) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": iter(torch.randn(9, 4, 12)).__next__}, "should take the same batch each time"),
        ({"loss_of": lambda loss: {"loss": 3}}, "should return its loss, one number, got {'loss'"),
        ({"loss_of": lambda loss: loss.repeat(2)}, "one number, got a tensor [2]"),
        ({"loss_of": lambda loss: loss * float("nan")}, "loss or gradients that are not finite"),
        ({"loss_scale": float("inf")}, "with a gradient scaler, let build() take steps until"),
    ],
)
def test_a_step_that_can_not_be_probed(options, message):
    model, step = model_and_step(**options)
    with pytest.raises(VlfastError, match=re.escape(message)):
        probe([model], step, steps=1)


def test_a_model_that_is_accelerated_already():
    model, step = model_and_step()
    accelerate(model)
    with pytest.raises(VlfastError, match=re.escape("build() should leave that to the probe")):
        probe([model], step, steps=1)


def test_what_differs_by_itself_is_told(capsys):
    noise = iter(1 + 1e-3 * torch.arange(9.0))
    model, step = model_and_step(loss_of=lambda loss: loss * next(noise))
    assert probe([model], step, steps=1) == 1
    assert "before anything was changed differ by 1.0e-03" in capsys.readouterr().out


def test_a_step_that_leaves_no_gradient():
    model, step = model_and_step()

    def forgetful():
        loss = step()
        model.zero_grad()
        return loss

    with pytest.raises(VlfastError, match="left no gradient in the models"):
        probe([model], forgetful, steps=1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_steps.py").write_text(MODULE)
    (tmp_path / "my_broken.py").write_text("import not_installed_here")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield str(tmp_path)
    for name in ("my_steps", "my_broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_steps", "expected \"package.module:build\", got 'my_steps'"),
        ("my_step:build", "no module 'my_step' here or in PYTHONPATH; --path DIR"),
        ("my_steps.deeper:build", "no module 'my_steps.deeper'"),
        ("my_steps:bild", "module 'my_steps' has no function 'bild'"),
        ("my_steps:number", "has no function 'number'"),
        ("my_steps:not_a_pair", "should return (model, step), got CustomCLIP"),
        ("my_steps:no_models", "returned no models"),
        ("my_steps:no_module", "should return a model or a list of models first, got object"),
        ("my_steps:no_step", "should return a function that runs a step second, got int"),
    ],
)
def test_builds_that_can_not_be_used(folder, spec, message, capsys):
    assert main([spec, "--path", folder]) == 2
    assert message in capsys.readouterr().err


def test_an_import_that_fails_inside_is_the_users(folder):
    with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
        load("my_broken:build", folder)


def test_command(folder):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "vlfast.dropin.probe"]
    command += ["my_steps:build", "--path", folder, "--steps", "1", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "step from the same state: same" in done.stdout
    assert "(1 thread)" in done.stdout


def test_what_a_snapshot_restores():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    model.register_parameter("frozen", frozen)
    keeper = {"any": torch.optim.Adam(model.parameters(), lr=0.1)}
    schedule = torch.optim.lr_scheduler.StepLR(keeper["any"], 1)
    unrelated = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)

    def step():
        keeper["any"].zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        keeper["any"].step()
        schedule.step()
        return {k: v.clone() for k, v in model.state_dict().items()}

    step()
    snapshot = Snapshot([model])
    assert snapshot.optimizers == [keeper["any"]]
    assert unrelated not in snapshot.optimizers
    written = frozen._version
    expected = [step() for _ in range(3)]
    for _ in range(2):
        snapshot.restore()
        assert schedule.last_epoch == 1
        assert model[0].weight.grad is None
        for wanted in expected:
            found = step()
            assert all(torch.equal(found[k], v) for k, v in wanted.items())
    assert frozen._version == written


class Warmup(torch.optim.lr_scheduler.LRScheduler):
    """As Dassl's: it holds the schedule that comes next, which holds the optimiser."""

    def __init__(self, optimizer, successor):
        self.successor = successor
        super().__init__(optimizer)

    def get_lr(self):
        return [0.5 for _ in self.base_lrs]

    def step(self, epoch=None):
        if self.last_epoch < 1:
            super().step()
        else:
            self.successor.step()


def test_a_schedule_that_holds_the_next_one():
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    successor = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    schedule = Warmup(optimizer, successor)

    def rates():
        found = []
        for _ in range(4):
            optimizer.step()
            schedule.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    snapshot = Snapshot([model])
    expected = rates()
    assert len(set(expected)) > 2
    for _ in range(2):
        snapshot.restore()
        assert schedule.successor is successor and successor.optimizer is optimizer
        assert rates() == expected
