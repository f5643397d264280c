"""MoPD's gated mixture of hard prompts, at its batch size and pool of 12 prompts."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import EAGER, MODES, OURS, Case, Problem
from vlfast.ops import gated_mixture_loss, reference

SCALE, WIDTH = 100.0, 512


def of_all_prompts(
    images: Tensor, gate: Tensor, texts: Tensor, student: Tensor, labels: Tensor, top_k: int
) -> Tensor:
    """MoPD's equations as its authors compute them: the logits of all hard prompts, then a choice.

    The temperature is 1, as in the paper's runs.
    """
    heads, classes, _ = texts.shape
    scores, selected = (images @ gate).topk(top_k)
    weights = scores.softmax(-1)
    teachers = (SCALE * images @ texts.flatten(0, 1).T).view(-1, heads, classes)
    teachers = teachers.gather(1, selected[:, :, None].expand(-1, -1, classes))
    log_student = student.log_softmax(-1)
    loss = 0.0
    for i in range(top_k):
        log_teacher = teachers[:, i].log_softmax(-1)
        divergence = F.kl_div(log_student, log_teacher, log_target=True, reduction="none").sum(-1)
        entropy = F.cross_entropy(teachers[:, i], labels, reduction="none")
        loss = loss + (weights[:, i] * (divergence + entropy)).mean()
    return loss


def make(batch: int, heads: int, classes: int, top_k: int, trained: bool, device: str) -> Problem:
    torch.manual_seed(0)

    def units(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape), dim=-1).to(device)

    images, texts = units(batch, WIDTH), units(heads, classes, WIDTH)
    if trained:
        gate = torch.randn(WIDTH, heads).to(device).requires_grad_()
    else:
        # As at the start, all images select the first prompts; not by ties, which topk leaves open.
        images[:, 0] = 1.0
        gate = torch.zeros(WIDTH, heads)
        gate[0] = -0.01 * torch.arange(heads)
        gate = gate.to(device).requires_grad_()
    student = (SCALE * images @ units(classes, WIDTH).T).requires_grad_()
    labels = torch.randint(classes, (batch,)).to(device)
    compiled = torch.compile(of_all_prompts, fullgraph=True, dynamic=False)
    arguments = (images, gate, texts, student, labels)

    def ours() -> Tensor:
        distillation, selection = gated_mixture_loss(*arguments, logit_scale=SCALE, top_k=top_k)
        return distillation + selection

    def exact() -> list[Tensor]:
        leaves = [x.detach().double().requires_grad_() for x in (gate, student)]
        losses = reference.gated_mixture(
            images.double(), leaves[0], texts.double(), leaves[1], labels, SCALE, 1.0, top_k
        )
        loss = losses[0].mean() + losses[1].mean()
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    return Problem(
        sides={
            OURS: ours,
            EAGER: lambda: of_all_prompts(*arguments, top_k),
            "torch.compile": lambda: compiled(*arguments, top_k),
        },
        leaves=[gate, student],
        exact=exact,
        flop=2.0 * batch * top_k * classes * WIDTH,
        bytes_read=texts.nbytes + 3 * student.nbytes,
    )


def case(
    batch: int, heads: int, classes: int, top_k: int, trained: bool = True, *, full: bool = False
) -> Case:
    gate = "" if trained else ", untrained gate"
    name = f"{batch} images, {heads} prompts, {classes} classes, k = {top_k}{gate}"
    return Case(name, partial(make, batch, heads, classes, top_k, trained), full)


CASES = [
    case(1, 1, 1, 1),  # next to nothing to compute: what a call costs
    case(128, 12, 1000, 2),
    case(128, 12, 1000, 2, trained=False),
    case(128, 12, 100, 3),
    case(32, 12, 397, 2),
    *(case(b, 12, c, 2, full=True) for b in (1, 8) for c in (10, 100, 1000)),
    *(case(128, 12, 1000, k, full=True) for k in (1, 6, 12)),
    case(128, 36, 1000, 2, full=True),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gated_mixture(contest, case, mode):
    contest(case, mode)
