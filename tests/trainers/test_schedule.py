"""Dassl's schedule."""

import math

import pytest
import torch

from vlfast.trainers.schedule import learning_rate

COOP = {"lr": 0.002, "epochs": 50, "warmup_epochs": 1, "warmup_lr": 1e-5}


def test_coops_fifty_epochs():
    """The first, second and last rate of [CoOp]'s configs, worked out from Dassl's scheduler."""
    assert learning_rate(1, **COOP) == 1e-5
    assert learning_rate(2, **COOP) == 0.002
    assert learning_rate(50, **COOP) == pytest.approx(7.885e-6, rel=1e-3)


def test_cosine_is_pytorchs():
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.002)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for epoch in range(2, 51):
        assert learning_rate(epoch, **COOP) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()


def test_without_warm_up_the_first_epoch_has_the_full_rate():
    assert learning_rate(1, **{**COOP, "warmup_epochs": 0}) == 0.002


def test_rates_fall_after_the_warm_up():
    rates = [learning_rate(e, **COOP) for e in range(2, 51)]
    assert rates == sorted(rates, reverse=True) and min(rates) > 0
    assert math.isclose(rates[25], 0.001)


@pytest.mark.parametrize("epoch", [0, 51])
def test_epochs_outside_the_run(epoch):
    with pytest.raises(ValueError, match="epoch: expected 1 to 50"):
        learning_rate(epoch, **COOP)
