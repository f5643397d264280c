"""Attention of packed runs of tokens to a shared prefix and, causally, to themselves."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._extension import extension
from . import checks, reference
from .backends import kernel_serves
from .kernel_calls import (
    DTYPES,
    addresses,
    dispatcher_sees,
    is_batched,
    refuse_second_derivative,
)
from .packed_runs import PackedRuns


def prefix_attention(qkv: Tensor, runs: PackedRuns, *, scale: float | None = None) -> Tensor:
    """Attention in which many short runs share the keys and values of a prefix.

    Row i of M packed rows attends to the rows of its prefix, all of them, and to those of its own
    run up to itself: softmax(scale * query . key) weighs the values, in each head by itself. That
    is causal attention over prefix and run joined, the prefix being computed once for all runs.

    Args:
        qkv: [M, 3, H, E] floating, the query, key and value of each row in H heads of width E, as
            a linear layer gives them: the prefixes' rows first, then those of the runs.
        runs: where prefixes and runs begin and end, on the device of qkv; see ``PackedRuns``.
        scale: of the scores, 1 / sqrt(E) by default.

    Returns:
        [M, H, E] in the dtype of qkv. Half precision is computed in fp32. The gradient comes back
        whole, [M, 3, H, E]; that of a prefix is summed in one order, so that it has the same bits
        on every run.

    fp64, other devices than CPU and CUDA, E above 256 on a GPU, functorch transforms and
    forward-mode differentiation are served by plain PyTorch. For second derivatives compute it
    under ``vlfast.ops.backends.reference_only()``; without it, create_graph=True raises
    RuntimeError.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices disagree.
    """
    check_arguments(qkv, runs, scale)
    if scale is None:
        scale = qkv.shape[-1] ** -0.5
    scale = float(scale)
    if not kernel_can_serve(qkv):
        return reference.prefix_attention(qkv, runs, scale)
    arguments = (qkv, runs.offsets, runs.rows, runs.prefixes, scale)
    if qkv.requires_grad and torch.is_grad_enabled():
        return PrefixAttention.apply(*arguments)
    return run_kernel(*arguments)[0]


def check_arguments(qkv: Any, runs: Any, scale: Any) -> None:
    """Raise unless the arguments are what :func:`prefix_attention` says."""
    checks.check_floating("qkv", qkv, ("M", "3", "H", "E"))
    if not isinstance(runs, PackedRuns):
        raise TypeError(f"runs: expected a PackedRuns, got {checks.describe(runs)}")
    checks.check_dtype("runs.offsets", runs.offsets, torch.int32, ("R + 1",))
    checks.check_dtype("runs.rows", runs.rows, torch.int32, ("4", "M"))
    if qkv.shape[1] != 3 or 0 in qkv.shape[2:]:
        raise ValueError(f"qkv: expected a shape [M, 3, H, E], got {checks.describe(qkv)}")
    parts, rows = runs.rows.shape
    if parts != 4:
        raise ValueError(f"runs.rows: expected a shape [4, M], got {checks.describe(runs.rows)}")
    if len(qkv) != rows:
        raise ValueError(f"qkv: expected the {rows} rows of runs, got {checks.describe(qkv)}")
    checks.check_same_device(qkv=qkv, **{"runs": runs.offsets, "runs.rows": runs.rows})
    if scale is not None:
        checks.check_positive("scale", scale)
        checks.check_frozen("scale", scale)


def kernel_can_serve(qkv: Tensor) -> bool:
    """Whether there is a kernel for this dtype, here."""
    if qkv.dtype not in KERNEL_DTYPES or (qkv.is_cuda and qkv.shape[3] > WIDEST_ON_GPU):
        return False
    return kernel_serves("prefix_attention", qkv)


KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of a head: tiles of a wider one do not fit the shared memory of every GPU.
WIDEST_ON_GPU = 256


class PrefixAttention(torch.autograd.Function):
    """The op and its gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        results = run_kernel(*arguments)
        remember_problem(ctx, arguments, results)
        return results[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("prefix_attention")
        qkv, output, log_normaliser, offsets, rows = ctx.saved_tensors
        arguments = (upstream, qkv, output, log_normaliser, offsets, rows, *ctx.numbers)
        return run_backward_kernel(*arguments), None, None, None, None


def remember_problem(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    problem = Problem(*inputs)
    # The CPU kernel computes the weights anew, and needs no results of the forward.
    results = (None, None) if problem.qkv.is_cpu else output
    ctx.save_for_backward(problem.qkv, *results, problem.offsets, problem.rows)
    ctx.numbers = (problem.prefixes, problem.scale)


def remember_problem_of_op(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    remember_problem(ctx, inputs, output)
    # The log of the normalisers is for the backward. A gradient to it would be lost unnoticed.
    ctx.mark_non_differentiable(output[1])


def run_kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The op, by the shortest way there is."""
    problem = Problem(*arguments)
    if dispatcher_sees(*problem[:3]):
        return torch.ops.vlfast.prefix_attention(*arguments)
    return (prefix_attention_cpu if problem.qkv.is_cpu else prefix_attention_cuda)(*arguments)


def run_backward_kernel(upstream: Tensor, qkv: Tensor, *others: Any) -> Tensor:
    # The dispatcher takes many upstreams at once apart.
    if dispatcher_sees(upstream, qkv) or is_batched(upstream):
        return torch.ops.vlfast.prefix_attention_backward(upstream, qkv, *others)
    kernel = prefix_attention_backward_cpu if qkv.is_cpu else prefix_attention_backward_cuda
    return kernel(upstream, qkv, *others)


class Problem(NamedTuple):
    """The arguments of the op, in their order."""

    qkv: Tensor
    offsets: Tensor
    rows: Tensor
    prefixes: int
    scale: float

    def empty_results(self) -> tuple[Tensor, Tensor]:
        """Room for the output and, in fp32, the log of each softmax's denominator."""
        rows, _, heads, width = self.qkv.shape
        new_empty = self.qkv.new_empty
        return new_empty(rows, heads, width), new_empty(rows, heads, dtype=torch.float32)

    def for_cpu(self) -> tuple[Any, ...]:
        """The first arguments of the C++ kernels. The tensors must be contiguous."""
        rows, _, heads, width = self.qkv.shape
        numbers = (rows, heads, width, len(self.offsets) - 1, self.prefixes)
        pointers = addresses((self.qkv, self.offsets))
        return DTYPES[self.qkv.dtype], *numbers, *pointers, self.scale


LIBRARY = torch.library.Library("vlfast", "FRAGMENT")
LIBRARY.define(
    "prefix_attention(Tensor qkv, Tensor offsets, Tensor rows, int prefixes, float scale) "
    # [M, H, E] in the dtype of qkv; fp32 [M, H]
    "-> (Tensor output, Tensor log_normaliser)"
)
LIBRARY.define(
    "prefix_attention_backward(Tensor grad_output, Tensor qkv, Tensor? output, "
    "Tensor? log_normaliser, Tensor offsets, Tensor rows, int prefixes, float scale) -> Tensor"
)


def prefix_attention_cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = for_kernel(Problem(*arguments))
    results = problem.empty_results()
    extension().prefix_attention_cpu(
        *problem.for_cpu(), *addresses(results), torch.get_num_threads()
    )
    return results


def prefix_attention_backward_cpu(
    grad_output: Tensor,
    qkv: Tensor,
    output: Tensor | None,
    log_normaliser: Tensor | None,
    *others: Any,
) -> Tensor:
    problem = for_kernel(Problem(qkv, *others))
    grad_output = grad_output.to(qkv.dtype).contiguous()
    to_qkv = torch.empty_like(problem.qkv)
    extension().prefix_attention_backward_cpu(
        *problem.for_cpu(), *addresses((grad_output, to_qkv)), torch.get_num_threads()
    )
    return to_qkv


def prefix_attention_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    from .triton.prefix_attention import prefix_attention_forward

    return prefix_attention_forward(*for_kernel(Problem(*arguments)))


def prefix_attention_backward_cuda(
    grad_output: Tensor, qkv: Tensor, output: Tensor, log_normaliser: Tensor, *others: Any
) -> Tensor:
    from .triton.prefix_attention import prefix_attention_backward

    qkv, *others = for_kernel(Problem(qkv, *others))
    grad_output = grad_output.to(qkv.dtype).contiguous()
    return prefix_attention_backward(grad_output, qkv, output, log_normaliser, *others)


def for_kernel(problem: Problem) -> Problem:
    """Contiguous, and of a dtype that a kernel does not take for another."""
    if problem.qkv.dtype not in KERNEL_DTYPES:
        raise TypeError(
            f"qkv: expected float32, bfloat16 or float16, got {checks.describe(problem.qkv)}"
        )
    return Problem(*(x.contiguous() for x in problem[:3]), *problem[3:])


def prefix_attention_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    return Problem(*arguments).empty_results()


def prefix_attention_backward_fake(grad_output: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


LIBRARY.impl("prefix_attention", prefix_attention_cpu, "CPU")
LIBRARY.impl("prefix_attention", prefix_attention_cuda, "CUDA")
LIBRARY.impl("prefix_attention_backward", prefix_attention_backward_cpu, "CPU")
LIBRARY.impl("prefix_attention_backward", prefix_attention_backward_cuda, "CUDA")
torch.library.register_fake("vlfast::prefix_attention", prefix_attention_fake, lib=LIBRARY)
torch.library.register_fake(
    "vlfast::prefix_attention_backward", prefix_attention_backward_fake, lib=LIBRARY
)
torch.library.register_autograd(
    "vlfast::prefix_attention",
    PrefixAttention.backward,
    setup_context=remember_problem_of_op,
    lib=LIBRARY,
)
