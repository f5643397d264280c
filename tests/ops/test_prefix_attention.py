"""Attention of packed runs to a shared prefix, against loops and against whole sequences."""

import pytest
import torch

from vlfast.ops import reference
from vlfast.ops.packed_runs import PackedRuns
from vlfast.ops.prefix_attention import prefix_attention

from . import oracles
from .support import normal

LAYOUTS = [
    ([1], [1]),
    ([4], [3, 1, 5]),
    ([3, 5], [2, 0, 3, 4]),
    ([0], [2, 2]),
    ([], [3, 1]),
    ([3], []),
]


@pytest.mark.parametrize(("prefixes", "suffixes"), LAYOUTS)
def test_the_equation(prefixes, suffixes):
    runs = PackedRuns.of(prefixes, suffixes)
    qkv = normal(sum(prefixes) + sum(suffixes), 3, 2, 4).requires_grad_()
    actual = prefix_attention(qkv, runs)
    expected = oracles.prefix_attention(qkv, prefixes, suffixes, 4**-0.5)
    torch.testing.assert_close(actual, expected)
    upstream = normal(*actual.shape, seed=5)
    (a,), (e,) = (torch.autograd.grad(x, qkv, upstream) for x in (actual, expected))
    torch.testing.assert_close(a, e)


def test_it_is_causal_attention_with_the_prefix_repeated_for_each_run():
    prefix, lengths = 6, [4, 2, 5]
    qkv = normal(17, 3, 3, 8)
    packed = prefix_attention(qkv, PackedRuns.of([prefix], lengths))
    start = prefix
    for length in lengths:
        whole = torch.cat([qkv[:prefix], qkv[start : start + length]]).transpose(0, 2)
        whole = torch.nn.functional.scaled_dot_product_attention(*whole.unbind(1), is_causal=True)
        whole = whole.transpose(0, 1)
        torch.testing.assert_close(packed[:prefix], whole[:prefix])
        torch.testing.assert_close(packed[start : start + length], whole[prefix:])
        start += length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_fp32(dtype):
    qkv = normal(8, 3, 2, 4, dtype=dtype)
    runs = PackedRuns.of([3], [2, 3])
    with torch.autocast("cpu", torch.bfloat16):
        actual = prefix_attention(qkv, runs)
    expected = reference.prefix_attention(qkv.double(), runs, 0.5)
    assert actual.dtype == dtype
    tolerance = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_scale_replaces_the_default():
    qkv = normal(5, 3, 1, 4)
    runs = PackedRuns.of([2], [3])
    doubled = qkv * torch.tensor([2.0, 1.0, 1.0])[:, None, None]
    torch.testing.assert_close(
        prefix_attention(qkv, runs, scale=1.0), prefix_attention(doubled, runs)
    )
