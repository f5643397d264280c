"""What the tests of the ops share: random tensors, gradients, and how errors are judged."""

import torch
from hypothesis import settings

settings.register_profile("ops", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("ops")


def normal(*shape, seed=0, scale=1.0, dtype=torch.float64):
    """The same numbers in every dtype, up to its rounding."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def gradients(outputs, inputs, seed=9):
    """Gradients under an upstream gradient that differs from row to row. Keeps the graph."""
    upstream = [normal(*x.shape, seed=seed + i, dtype=x.dtype) for i, x in enumerate(outputs)]
    return torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)


def assert_close(actual, expected, tolerance):
    """The largest error is within ``tolerance`` of the largest expected value."""
    error = (actual.detach().double() - expected.detach().double()).abs().max()
    size = expected.detach().double().abs().max().clamp_min(1e-30)
    assert error <= tolerance * size, f"error {error:.3e} on values up to {size:.3e}"
