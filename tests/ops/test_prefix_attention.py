"""Attention of packed suffixes to a shared prefix, against loops and against whole sequences."""

import pytest
import torch

from vlfast.ops import reference

from . import oracles
from .support import normal


@pytest.mark.parametrize(
    ("lengths", "prefixes", "prefix_length"),
    [([1], 1, 1), ([3, 1, 5], 1, 4), ([2, 0, 3, 4], 2, 3), ([2, 2], 1, 0)],
)
def test_the_equation(lengths, prefixes, prefix_length):
    ends = torch.tensor(lengths).cumsum(0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    tokens, heads, width = sum(lengths), 2, 4
    query, key, value = (normal(tokens, heads, width, seed=i).requires_grad_() for i in range(3))
    prefix_key, prefix_value = (
        normal(prefixes, prefix_length, heads, width, seed=i).requires_grad_() for i in (3, 4)
    )
    prefix_index = None if prefixes == 1 else torch.arange(len(lengths)) % prefixes
    owners = [0] * len(lengths) if prefix_index is None else prefix_index.tolist()
    runs = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    tensors = (query, key, value, prefix_key, prefix_value)

    actual = reference.prefix_attention(*tensors, offsets, prefix_index)
    expected = oracles.prefix_attention(*tensors, runs, owners, width**-0.5)
    torch.testing.assert_close(actual, expected)
    upstream = normal(*actual.shape, seed=5)
    for a, e in zip(
        torch.autograd.grad(actual, tensors, upstream),
        torch.autograd.grad(expected, tensors, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


def test_it_is_causal_attention_with_the_prefix_repeated_for_each_run():
    lengths, prefix_length, heads, width = [4, 2, 5], 6, 3, 8
    offsets = torch.tensor([0, 4, 6, 11])
    query, key, value = (normal(11, heads, width, seed=i) for i in range(3))
    prefix_query, prefix_key, prefix_value = (
        normal(prefix_length, heads, width, seed=3 + i) for i in range(3)
    )
    packed = reference.prefix_attention(
        query, key, value, prefix_key[None], prefix_value[None], offsets
    )
    for run, length in enumerate(lengths):
        own = slice(int(offsets[run]), int(offsets[run]) + length)
        whole = torch.nn.functional.scaled_dot_product_attention(
            *(
                torch.cat([prefix, suffix[own]]).transpose(0, 1)
                for prefix, suffix in (
                    (prefix_query, query),
                    (prefix_key, key),
                    (prefix_value, value),
                )
            ),
            is_causal=True,
        )
        torch.testing.assert_close(packed[own], whole.transpose(0, 1)[prefix_length:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_fp32(dtype):
    tensors = [normal(5, 2, 4, seed=i, dtype=dtype) for i in range(3)]
    tensors += [normal(1, 3, 2, 4, seed=i, dtype=dtype) for i in (3, 4)]
    offsets = torch.tensor([0, 2, 5])
    with torch.autocast("cpu", torch.bfloat16):
        actual = reference.prefix_attention(*tensors, offsets)
    expected = reference.prefix_attention(*(x.double() for x in tensors), offsets)
    assert actual.dtype == dtype
    tolerance = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_scale_replaces_the_default():
    tensors = [normal(3, 1, 4, seed=i) for i in range(3)]
    prefix = [normal(1, 2, 1, 4, seed=i) for i in (3, 4)]
    offsets = torch.tensor([0, 3])
    torch.testing.assert_close(
        reference.prefix_attention(*tensors, *prefix, offsets, scale=1.0),
        reference.prefix_attention(2 * tensors[0], *tensors[1:], *prefix, offsets),
    )
