"""fp16's loss scale, on a CPU with a scaler of our own, and bf16."""

import pytest
import torch

import vlfast
from tests.conftest import squares_dataset
from tests.trainers.test_fit import SHORT, Killed, kill_in_epoch
from vlfast import training
from vlfast.trainers.device import make_accelerator


@pytest.fixture
def scaled(monkeypatch):
    """Make runs scale their loss by this much; what they made of it stands in the list."""
    scalers = []

    def use(scale):
        def make(device, precision):
            accelerator = make_accelerator(device, precision)
            scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=7)
            accelerator.scaler = scaler
            # accelerate's own does this only where the precision is fp16.
            accelerator.unscale_gradients = lambda: [
                scaler.unscale_(prepared.optimizer) for prepared in accelerator._optimizers
            ]
            scalers.append(scaler)
            return accelerator

        monkeypatch.setattr(training, "make_accelerator", make)
        return scalers

    return use


def fit(clip, output, **options):
    given = {**SHORT, "lr": 0.1, **options}
    return vlfast.fit("plpp", model=clip, data=squares_dataset(), output=output, **given)


def context(run):
    return run.folder.read_tensors("last")[0]["context"]


@pytest.mark.parametrize("clip_grad_norm", [None, 0.1])
def test_a_scaled_loss_is_the_same_training(tiny_clip, tmp_path, scaled, clip_grad_norm):
    """A power of two changes no digit; clipping sees the gradients as they are."""
    plain = fit(tiny_clip, tmp_path / "plain", clip_grad_norm=clip_grad_norm)
    scalers = scaled(2.0**10)
    run = fit(tiny_clip, tmp_path / "scaled", clip_grad_norm=clip_grad_norm)
    assert torch.equal(context(run), context(plain))
    assert scalers[0].get_scale() == 2.0**12  # 20 steps grow it twice


def test_infinite_gradients_skip_a_step_and_halve_the_scale(tiny_clip, tmp_path, scaled):
    """The loss is finite, so nothing is wrong."""
    scalers = scaled(2.0**127)
    run = fit(tiny_clip, tmp_path / "run", epochs=8)
    assert scalers[0].get_scale() < 2.0**127
    assert context(run).isfinite().all()
    losses = [row["loss"] for row in run.folder.read_metrics()]
    assert losses[-1] < losses[0]


def test_resuming_keeps_the_scale(tiny_clip, tmp_path, scaled, monkeypatch):
    scaled(2.0**10)
    whole = fit(tiny_clip, tmp_path / "whole")
    kill_in_epoch(monkeypatch, 3)
    with pytest.raises(Killed):
        fit(tiny_clip, tmp_path / "parts")
    monkeypatch.undo()
    scalers = scaled(2.0**3)
    resumed = vlfast.resume(
        tmp_path / "parts", clip=tiny_clip, dataset=squares_dataset(), show_progress=False
    )
    assert torch.equal(context(resumed), context(whole))
    assert scalers[-1].get_scale() == 2.0**12


def test_bf16_keeps_fp32_prompts_and_finds_the_same_way(tiny_clip, tmp_path):
    """One step from the same start: the gradients agree to bf16's three digits."""
    one_step = {"epochs": 1, "batch_size": 40, "warmup_epochs": 0, "clip_grad_norm": 1.0}
    exact = fit(tiny_clip, tmp_path / "fp32", lr=0.01, **one_step)
    half = fit(tiny_clip, tmp_path / "bf16", lr=0.01, precision="bf16", **one_step)
    torch.manual_seed(1)
    start = torch.randn(3, 32) * 0.02
    moved = [context(run) - start for run in (exact, half)]
    assert context(half).dtype == torch.float32
    assert torch.cosine_similarity(moved[0].flatten(), moved[1].flatten(), dim=0) > 0.99
    assert half.result["accuracy"].keys() == exact.result["accuracy"].keys()
