"""Which backend serves which op: a kernel where one can, else the reference in plain PyTorch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _extension


class Kernel(NamedTuple):
    """What serves an op on a type of device: its language, and where it is to be found."""

    language: str
    function: str
    limits: str = ""


KERNELS = {
    ("perplexity", "cpu"): Kernel(
        "C++", "vlfast._C.perplexity_cpu", "top_k above 512 and fp64 by PyTorch, 64 rows at a time"
    ),
    ("perplexity", "cuda"): Kernel(
        "CUDA",
        "vlfast._C.perplexity_cuda",
        "more than 64 rows or a top_k above 64 and fp64 by PyTorch, 64 rows at a time",
    ),
    ("symmetric_kl", "cpu"): Kernel("C++", "vlfast._C.symmetric_kl_cpu"),
    ("symmetric_kl", "cuda"): Kernel("CUDA", "vlfast._C.symmetric_kl_cuda"),
    ("gated_mixture", "cpu"): Kernel("C++", "vlfast._C.gated_mixture_cpu", "fp64 by the reference"),
    ("gated_mixture", "cuda"): Kernel(
        "Triton", "vlfast.ops.triton.gated_mixture", "fp64 by the reference"
    ),
    ("prefix_attention", "cpu"): Kernel(
        "C++", "vlfast._C.prefix_attention_cpu", "fp64 by the reference"
    ),
    ("prefix_attention", "cuda"): Kernel(
        "Triton",
        "vlfast.ops.triton.prefix_attention",
        "fp64 and heads wider than 256 by the reference",
    ),
}
OPS = ("perplexity", "symmetric_kl", "gated_mixture", "prefix_attention")

# How many times it is asked for: by the environment, and by every reference_only() under way.
_asked_for_reference = int(os.environ.get("VLFAST_REFERENCE", "0") not in ("", "0"))


class BackendRow(NamedTuple):
    """What serves one op on one type of device, and why or what to do about it."""

    op: str
    device: str
    backend: str
    reason: str


@contextmanager
def reference_only() -> Iterator[None]:
    """Within it every op is served by the reference, in all threads; VLFAST_REFERENCE=1 does so
    for a whole process. The reference is differentiable any number of times."""
    global _asked_for_reference
    _asked_for_reference += 1
    try:
        yield
    finally:
        _asked_for_reference -= 1


def reference_must_serve() -> bool:
    """Whether it is asked for, or its autograd is needed: by functorch, or forward-mode AD."""
    return (
        _asked_for_reference > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def kernel_serves(op: str, tensor: Tensor) -> bool:
    """Whether a kernel serves this op where the tensor is. Warns once where one is missing."""
    if reference_must_serve():
        return False
    device = tensor.device
    reason = why_no_kernel(op, device.type, device.index)
    if reason is None:
        return True
    if (op, device.type) in KERNELS and not torch.compiler.is_compiling():
        _extension.warn_once(reason)
    return False


def why_no_kernel(op: str, device_type: str, index: int | None = None) -> str | None:
    """Why no kernel serves this op on this device, and what to do; None where one does."""
    kernel = KERNELS.get((op, device_type))
    if kernel is None:
        return "no kernel is written for it"
    if kernel.language == "Triton":
        return why_no_triton(index)
    if device_type == "cuda" and torch.version.hip:
        return "the kernel is for NVIDIA GPUs"
    if missing := _extension.why_no_kernels(device_type):
        return missing
    if device_type == "cuda":
        capability = torch.cuda.get_device_capability(index)
        return why_not_compiled_for(capability, _extension.cuda_archs())
    return None


# A constant to torch.compile. torch.compiler.assume_constant_result sets this mark too, but imports
# the whole compiler, which takes longer than torch itself.
why_no_kernel._dynamo_marked_constant = True


def why_no_triton(index: int | None) -> str | None:
    """Why Triton does not serve on this GPU, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed, which comes with PyTorch on Linux; pip install triton"
    capability = torch.cuda.get_device_capability(index)
    if not torch.version.hip and capability < (8, 0):
        has = ".".join(map(str, capability))
        return f"the kernel needs compute capability 8.0, and this GPU has {has}"
    return None


def why_not_compiled_for(capability: tuple[int, int], archs: str) -> str | None:
    """Whether code for ``archs`` ("8.0 9.0a"), with PTX of the last one, runs on this GPU."""
    major, minor = capability
    compiled = [arch.split(".") for arch in archs.split()]
    for arch_major, arch_minor in compiled:
        exact = arch_minor[-1] in "af"
        if int(arch_major) != major:
            continue
        if (not exact and int(arch_minor) <= minor) or arch_minor[:-1] == str(minor):
            return None
    newest_major, newest_minor = compiled[-1]
    if newest_minor.isdigit() and (int(newest_major), int(newest_minor)) <= capability:
        return None
    return (
        f"the native extension was built for the GPU architectures {archs}, and this one is "
        f"{major}.{minor}; reinstall with VLFAST_CUDA_ARCHS={major}.{minor}"
    )


def backend_report() -> list[BackendRow]:
    """A row for every op on the CPU and on CUDA: what serves it here and now, and why."""
    rows = []
    for op in OPS:
        for device in ("cpu", "cuda"):
            rows.append(BackendRow(op, device, *_backend_and_reason(op, device)))
    return rows


def _backend_and_reason(op: str, device: str) -> tuple[str, str]:
    if device == "cuda" and not torch.cuda.is_available():
        return "-", "no CUDA device here"
    if _asked_for_reference:
        return "reference", "VLFAST_REFERENCE=1 or reference_only() asks for it"
    reason = why_no_kernel(op, device)
    if reason:
        return "reference", reason
    kernel = KERNELS[op, device]
    return kernel.language, "; ".join(filter(None, (kernel.function, kernel.limits)))
