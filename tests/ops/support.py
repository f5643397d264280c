"""What the tests of the ops share: random tensors, gradients, and how errors are judged."""

import torch
from hypothesis import settings

settings.register_profile("ops", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("ops")


def normal(*shape, seed=0, scale=1.0, dtype=torch.float64):
    """The same numbers in every dtype, up to its rounding."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def gradients(outputs, inputs, seed=9, keep_graph=True):
    """Gradients under an upstream gradient that differs from row to row."""
    upstream = [
        normal(*x.shape, seed=seed + i, dtype=x.dtype).to(x.device) for i, x in enumerate(outputs)
    ]
    return torch.autograd.grad(outputs, inputs, upstream, retain_graph=keep_graph)


def assert_close(actual, expected, tolerance):
    """The largest error is within ``tolerance`` of the largest expected value."""
    error = (actual.detach().double() - expected.detach().double()).abs().max()
    size = expected.detach().double().abs().max().clamp_min(1e-30)
    assert error <= tolerance * size, f"error {error:.3e} on values up to {size:.3e}"


def assert_as_precise(ours, theirs, truth, smallest=0.0):
    """Results are as near to the fp64 truth as those of PyTorch in the same dtype, or nearly so.

    The slack is a few roundings of the largest number, or of ``smallest`` if all are below it:
    PyTorch's error can be small by chance.
    """
    for mine, its, true in zip(ours, theirs, truth, strict=True):
        assert mine.dtype == its.dtype
        resolution = max(torch.finfo(mine.dtype).eps, 1e-12)
        slack = (32 * resolution * true.abs().max().clamp_min(smallest)).item()
        error, its_error = ((x.double() - true).abs().max().item() for x in (mine, its))
        assert error <= 1.5 * its_error + slack, (error, its_error, slack)
