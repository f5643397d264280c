"""Symmetric KL at the papers' sizes, from the logits of both sides."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import EAGER, MODES, OURS, Case, Problem
from vlfast.ops import reference, symmetric_kl_loss


def with_kl_div(student: Tensor, teacher: Tensor) -> Tensor:
    """KDPL's equation in PyTorch's own losses."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    forward = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    reverse = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    return 0.5 * forward + 0.5 * reverse


def make(images: int, classes: int, device: str, dtype: torch.dtype = torch.float32) -> Problem:
    torch.manual_seed(0)
    student = (5 * torch.randn(images, classes)).to(device, dtype).requires_grad_()
    teacher = (5 * torch.randn(images, classes)).to(device, dtype)
    compiled = torch.compile(with_kl_div, fullgraph=True, dynamic=False)

    def exact() -> list[Tensor]:
        leaf = student.detach().double().requires_grad_()
        loss = reference.symmetric_kl(leaf, teacher.double()).sum() / images
        return [loss.detach(), *torch.autograd.grad(loss, leaf)]

    return Problem(
        sides={
            OURS: lambda: symmetric_kl_loss(student, teacher),
            EAGER: lambda: with_kl_div(student, teacher),
            "torch.compile": lambda: compiled(student, teacher),
        },
        leaves=[student],
        exact=exact,
        bytes_read=3 * student.nbytes,  # both sides in, the gradient out
    )


def case(images: int, classes: int, *, full: bool = False) -> Case:
    return Case(f"{images} x {classes}", partial(make, images, classes), full)


CASES = [
    case(1, 1),  # nothing to compute: what a call costs
    case(8, 397),  # PromptKD's batch on SUN397
    case(128, 100),  # MoPD's batch on 100 classes
    case(32, 1000),  # KDPL's batch on ImageNet's classes
    case(256, 1000),
    case(32, 20930),  # and on its dictionary of words
    *(case(b, c, full=True) for b in (1, 32, 512) for c in (10, 100, 397)),
    case(4096, 1000, full=True),
    case(4096, 20930, full=True),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_symmetric_kl(contest, case, mode):
    contest(case, mode)
