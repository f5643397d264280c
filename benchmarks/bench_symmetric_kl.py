"""Symmetric KL, forward and backward, at the papers' sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlfast.ops import symmetric_kl_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# KDPL on ImageNet's classes (32 images a batch, and a large batch) and on its dictionary of words;
# MoPD's batch on 100 classes; PromptKD's batch on SUN397.
SIZES = [(32, 1000), (256, 1000), (32, 20930), (128, 100), (8, 397)]


def with_kl_div(student: Tensor, teacher: Tensor) -> Tensor:
    """The equation in PyTorch's own losses."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    forward = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    reverse = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    return 0.5 * forward + 0.5 * reverse


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]} x {size[1]}")
def test_symmetric_kl(contest, size):
    torch.manual_seed(0)
    student = (5 * torch.randn(size, device=DEVICE)).requires_grad_()
    teacher = 5 * torch.randn(size, device=DEVICE)
    compiled = torch.compile(with_kl_div, fullgraph=True)
    losses = {"vlfast": symmetric_kl_loss, "eager": with_kl_div, "torch.compile": compiled}
    expected = symmetric_kl_loss(student, teacher)
    for loss in losses.values():
        torch.testing.assert_close(loss(student, teacher), expected, rtol=1e-4, atol=0)

    def step(loss):
        return lambda: torch.autograd.grad(loss(student, teacher), student)

    contest({name: step(loss) for name, loss in losses.items()})
