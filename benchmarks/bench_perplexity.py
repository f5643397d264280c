"""The PLPP loss over CLIP's vocabulary: 16 prompt vectors, or 16 for each of 100 classes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import EAGER, MODES, OURS, Case, Problem
from vlfast.ops import plpp_loss, reference

WORDS, WIDTH = 49408, 512


def with_cached_norms(
    prompts: Tensor, hidden: Tensor, embedding: Tensor, unit_embedding: Tensor, top_k: int
) -> Tensor:
    """The loss in PyTorch's own functions, the embedding normalised once for all steps."""
    values, words = (F.normalize(prompts, dim=-1) @ unit_embedding.T).topk(top_k)
    log_p = (hidden @ embedding.T).log_softmax(-1).gather(1, words)
    perplexity = -(values.softmax(-1).detach() * log_p).sum(-1)
    inverted = -(log_p.softmax(-1).detach() * values.log_softmax(-1)).sum(-1)
    return (perplexity + inverted).mean()


def normalising(prompts: Tensor, hidden: Tensor, embedding: Tensor, top_k: int) -> Tensor:
    """The same as people write it, the embedding normalised in each step."""
    return with_cached_norms(prompts, hidden, embedding, F.normalize(embedding, dim=-1), top_k)


def make(rows: int, words: int, top_k: int, dtype: torch.dtype, device: str) -> Problem:
    torch.manual_seed(0)
    embedding = (0.05 * torch.randn(words, WIDTH)).to(device, dtype)
    prompts = 0.05 * torch.randn(rows, WIDTH)
    prompts = prompts.to(device).requires_grad_()
    hidden = torch.randn(rows, WIDTH).to(device).requires_grad_()
    norms = reference.inverse_norm(embedding.float())
    unit_embedding = F.normalize(embedding, dim=-1)
    compiled = torch.compile(with_cached_norms, fullgraph=True, dynamic=False)

    def cast() -> tuple[Tensor, Tensor]:
        """Eager products want one dtype, so these codebases compute in the embedding's."""
        return prompts.to(dtype), hidden.to(dtype)

    def exact() -> list[Tensor]:
        table = embedding.double()
        loss, gradients = 0.0, []
        for chunk in range(0, rows, 100):
            of = slice(chunk, chunk + 100)
            leaves = [x.detach()[of].double().requires_grad_() for x in (prompts, hidden)]
            terms = reference.perplexity_terms(*leaves, table, top_k)
            part = (terms[0] + terms[1]).sum() / rows
            gradients.append(torch.autograd.grad(part, leaves))
            loss = loss + part.detach()
        return [loss, *(torch.cat(parts) for parts in zip(*gradients, strict=True))]

    sides = {
        OURS: lambda: plpp_loss(prompts, hidden, embedding, top_k=top_k, inverse_norms=norms),
        EAGER: lambda: with_cached_norms(*cast(), embedding, unit_embedding, top_k),
    }
    if rows <= 64:  # with more of them a call takes seconds
        sides["eager, norms each step"] = lambda: normalising(*cast(), embedding, top_k)
        sides["torch.compile"] = lambda: compiled(*cast(), embedding, unit_embedding, top_k)
    return Problem(
        sides=sides,
        leaves=[prompts, hidden],
        exact=exact,
        flop=3 * 2.0 * rows * words * WIDTH,
        bytes_read=embedding.nbytes,
    )


def case(
    rows: int, top_k: int, dtype: str = "float32", *, words: int = WORDS, full: bool = False
) -> Case:
    name = f"{rows} row{'s' * (rows > 1)}, k = {top_k}"
    name += "" if dtype == "float32" else f", {dtype}"
    name += "" if words == WORDS else f", {words} words"
    modes = MODES if rows <= 64 else MODES[1:]
    return Case(name, partial(make, rows, words, top_k, getattr(torch, dtype)), full, modes)


CASES = [
    case(1, 1, words=2),  # next to nothing to compute: what a call costs
    case(16, 10),
    case(16, 64),
    case(16, 10, "bfloat16"),
    case(4, 10),
    case(1600, 10),
    case(16, 10, "float16", full=True),
    *(case(rows, 10, full=True) for rows in (1, 64, 128, 400)),
    *(case(16, k, full=True) for k in (1, 100, 1000)),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_perplexity(contest, case, mode):
    contest(case, mode)
