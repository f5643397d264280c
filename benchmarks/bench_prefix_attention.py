"""Attention of packed runs to a shared prefix, at the sizes of CLIP's text towers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import EAGER, MODES, OURS, Case, Problem
from vlfast.ops import PackedRuns, prefix_attention, reference

WIDTH = 64
# Rows of a class name with its full stop and end of text: 4.2 on average, as in ImageNet.
NAMES = [2] * 15 + [3] * 25 + [4] * 25 + [5] * 18 + [6] * 10 + [7] * 3 + [8, 9, 12, 15]


class Padded:
    """What one writes without the op: padded runs, the keys of the prefix repeated for each, and a
    mask. Where everything lies is found once for a layout, and not part of the time."""

    def __init__(self, runs: PackedRuns, device: str) -> None:
        prefixes, suffixes = runs.prefixes, len(runs) - runs.prefixes
        starts, ends = runs.offsets[:-1, None].cpu(), runs.offsets[1:, None].cpu()
        prefix = starts[:prefixes] + torch.arange(runs.longest_prefix)
        prefix_is_real = prefix < ends[:prefixes]
        suffix = starts[prefixes:] + torch.arange(runs.longest)
        is_real = suffix < ends[prefixes:]
        each = suffixes // max(prefixes, 1)
        keys = torch.cat([prefix.repeat_interleave(each, 0), suffix], 1)
        seen = torch.cat([prefix_is_real.repeat_interleave(each, 0), is_real], 1)
        causal = torch.ones(runs.longest, runs.longest, dtype=torch.bool).tril()
        causal = F.pad(causal, (runs.longest_prefix, 0), value=True)
        last = runs.rows.shape[1] - 1
        self.prefix, self.suffix, self.keys = (
            x.clamp(max=last).to(device) for x in (prefix, suffix, keys)
        )
        self.mask = (seen[:, None] & causal)[:, None].to(device)
        real = torch.cat([prefix_is_real.flatten(), is_real.flatten()])
        self.packed = real.nonzero()[:, 0].to(device)

    def attention(self, qkv: Tensor) -> Tensor:
        of_prefix = qkv[self.prefix].permute(2, 0, 3, 1, 4)
        parts = [F.scaled_dot_product_attention(*of_prefix, is_causal=True)]
        if self.suffix.numel():
            query = qkv[:, 0][self.suffix].transpose(1, 2)
            key, value = qkv[:, 1:][self.keys].permute(2, 0, 3, 1, 4)
            parts.append(F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask))
        rows = torch.cat([x.transpose(1, 2).flatten(0, 1) for x in parts])
        return rows[self.packed]


def make(prefixes: list[int], suffixes: list[int], heads: int, device: str) -> Problem:
    torch.manual_seed(0)
    runs = PackedRuns.of(prefixes, suffixes)
    padded = Padded(runs, device)
    runs = runs.to(device)
    rows = runs.rows.shape[1]
    qkv = torch.randn(rows, 3, heads, WIDTH).to(device).requires_grad_()
    upstream = torch.randn(rows * heads * WIDTH).to(device)
    compiled = torch.compile(reference.prefix_attention, fullgraph=True, dynamic=False)
    scale = WIDTH**-0.5

    def loss(output: Tensor) -> Tensor:
        return output.flatten() @ upstream.to(output.dtype)

    def exact() -> list[Tensor]:
        leaf = qkv.detach().double().requires_grad_()
        value = loss(reference.prefix_attention(leaf, runs, scale))
        return [value.detach(), *torch.autograd.grad(value, [leaf])]

    each = len(suffixes) // max(len(prefixes), 1)
    pairs = sum(n * (n + 1) / 2 for n in (*prefixes, *suffixes))
    pairs += sum(n * prefixes[i // each] for i, n in enumerate(suffixes)) if prefixes else 0
    return Problem(
        sides={
            OURS: lambda: loss(prefix_attention(qkv, runs)),
            EAGER: lambda: loss(padded.attention(qkv)),
            "torch.compile": lambda: loss(compiled(qkv, runs, scale)),
        },
        leaves=[qkv],
        exact=exact,
        flop=14.0 * pairs * heads * WIDTH,  # two products forward, five backward
        bytes_read=3.0 * qkv.nbytes,
    )


def case(
    name: str, prefixes: list[int], suffixes: list[int], heads: int = 8, *, full: bool = False
) -> Case:
    return Case(name, partial(make, prefixes, suffixes, heads), full)


CASES = [
    case("1 run behind 1 row", [1], [1]),  # next to nothing to compute: what a call costs
    case("1000 names behind 17 rows", [17], NAMES * 10),
    case("100 names behind 17 rows", [17], NAMES),
    case("50 names behind 5 rows", [5], NAMES[::2]),
    case("8 prefixes, 100 names each", [17] * 8, NAMES * 8),
    case("1000 runs of 20 rows behind 1 row", [1], [20] * 1000),
    case("one prefix of 77 rows", [77], []),
    case("100 runs of 60 rows behind 17 rows", [17], [60] * 100, full=True),
    *(
        case(f"1000 names behind 17 rows, {heads} heads", [17], NAMES * 10, heads, full=True)
        for heads in (12, 20)
    ),
    *(case(f"1000 names behind {rows} rows", [rows], NAMES * 10, full=True) for rows in (5, 21)),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefix_attention(contest, case, mode):
    contest(case, mode)
