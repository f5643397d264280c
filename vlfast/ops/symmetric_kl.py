"""Distillation by the Kullback-Leibler divergence in both directions, in one pass over the logits.

Methods: KDPL, arXiv 2407.03056 (both directions); PromptKD, arXiv 2403.02781 (forward only).
"""

from __future__ import annotations

from typing import Any, Literal

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
    number_for_gpu,
    number_on_cpu,
    refuse_second_derivative,
    tensor_and_factor,
)

Reduction = Literal["none", "sum", "batchmean", "mean"]
REDUCTIONS = ("none", "sum", "batchmean", "mean")


def symmetric_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    student_scale: Tensor | float = 1.0,
    teacher_scale: Tensor | float = 1.0,
    temperature: Tensor | float = 1.0,
    forward_weight: Tensor | float = 0.5,
    reverse_weight: Tensor | float = 0.5,
    index: Tensor | None = None,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """The divergence between a teacher's and a student's predictions, in both directions.

    With p = softmax(teacher * teacher_scale / temperature) and q likewise of the student, a row is

        forward_weight * KL(p || q) + reverse_weight * KL(q || p)

    The defaults are KDPL's loss. PromptKD's is ``forward_weight=1, reverse_weight=0,
    reduction="mean"``, times its own weight and temperature**2: this function multiplies by
    neither.

    Args:
        student: [B, K], cosines with their scale below, or logits.
        teacher: [B, K], or [B, N] with ``index``. No gradient.
        student_scale: what the student's cosines are multiplied by, a number or a 0-d tensor.
            A tensor that requires grad gets its gradient.
        teacher_scale: likewise, without gradient.
        temperature: > 0, divides both sides.
        forward_weight: of KL(teacher || student), >= 0.
        reverse_weight: of KL(student || teacher), >= 0.
        index: int64 [K], the column of the teacher for each class of the student.
        reduction: "none" [B], "sum", "batchmean" (sum / B), or "mean" (sum / (B * K)).

    Floating dtypes may differ. The loss is fp32, or fp64 if a side is fp64; half precision is
    computed in fp32; each gradient comes back in its input's dtype. A row with a value that is not
    finite gives NaN for itself alone. Scales on the GPU are not read by the host.

    A temperature or a weight that is a tensor (it then gets its gradient), other devices than CPU
    and CUDA, functorch transforms and forward-mode differentiation are served by plain PyTorch.
    For second derivatives compute the loss under ``vlfast.ops.backends.reference_only()``; without
    it, create_graph=True raises RuntimeError.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: another shape, device or reduction, an empty input, a number or (on the CPU) an
            index out of range, or a teacher or teacher_scale that requires grad.
    """
    check_arguments(
        student,
        teacher,
        student_scale,
        teacher_scale,
        temperature,
        forward_weight,
        reverse_weight,
        index,
        reduction,
    )
    share = 1.0
    if reduction == "batchmean":
        share = 1 / student.shape[0]
    elif reduction == "mean":
        share = 1 / student.numel()
    if not kernel_can_serve(student, teacher, temperature, forward_weight, reverse_weight):
        losses = reference.symmetric_kl(
            student,
            teacher,
            student_scale,
            teacher_scale,
            temperature,
            forward_weight,
            reverse_weight,
            index,
        )
        return losses if reduction == "none" else losses.sum() * share

    student_scale, student_factor = tensor_and_factor(student_scale)
    teacher_scale, teacher_factor = tensor_and_factor(teacher_scale)
    arguments = (
        student,
        teacher,
        student_scale,
        teacher_scale,
        index,
        student_factor / temperature,
        teacher_factor / temperature,
        forward_weight * share,
        reverse_weight * share,
    )
    learns = student.requires_grad or (student_scale is not None and student_scale.requires_grad)
    learns = learns and torch.is_grad_enabled()
    if learns and not dispatcher_sees(student, teacher):
        return SymmetricKL.apply(*arguments, reduction != "none")
    losses = run_kernel(*arguments, learns)[0]
    return losses if reduction == "none" else losses.sum()


def check_arguments(
    student: Tensor,
    teacher: Tensor,
    student_scale: Tensor | float,
    teacher_scale: Tensor | float,
    temperature: Tensor | float,
    forward_weight: Tensor | float,
    reverse_weight: Tensor | float,
    index: Tensor | None,
    reduction: str,
) -> None:
    checks.check_floating("student", student, ("B", "K"))
    checks.check_floating("teacher", teacher, ("B", "K") if index is None else ("B", "N"))
    checks.check_not_empty("student", student)
    checks.check_same_size("B", ("student", student, 0), ("teacher", teacher, 0))
    if index is None:
        checks.check_same_size("K", ("student", student, 1), ("teacher", teacher, 1))
    else:
        checks.check_dtype("index", index, torch.int64, ("K",))
        checks.check_same_size("K", ("student", student, 1), ("index", index, 0))
        checks.check_in_range("index", index, teacher.shape[1])
    checks.check_frozen("teacher", teacher)
    checks.check_positive("student_scale", student_scale)
    checks.check_positive("teacher_scale", teacher_scale)
    checks.check_frozen("teacher_scale", teacher_scale)
    checks.check_positive("temperature", temperature)
    checks.check_weight("forward_weight", forward_weight)
    checks.check_weight("reverse_weight", reverse_weight)
    checks.check_same_device(
        student=student,
        teacher=teacher,
        index=index,
        student_scale=student_scale,
        teacher_scale=teacher_scale,
        temperature=temperature,
        forward_weight=forward_weight,
        reverse_weight=reverse_weight,
    )
    checks.check_reduction(reduction, REDUCTIONS)


def kernel_can_serve(student: Tensor, teacher: Tensor, *numbers: Tensor | float) -> bool:
    """Whether there is a kernel for these dtypes, here, with plain ``numbers``."""
    if any(isinstance(number, Tensor) for number in numbers):
        return False
    if student.dtype not in DTYPES or teacher.dtype not in DTYPES:
        return False
    return kernel_serves("symmetric_kl", student)


class SymmetricKL(torch.autograd.Function):
    """The op and its gradient, which the forward has already computed for an upstream of 1.

    The first backward scales it where it lies and hands it out, which spares a matrix; a later one
    through a retained graph computes it again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        student_scale: Tensor | None,
        teacher_scale: Tensor | None,
        index: Tensor | None,
        student_factor: float,
        teacher_factor: float,
        forward_weight: float,
        reverse_weight: float,
        reduce: bool,
    ) -> Tensor:
        tensors = (student, teacher, student_scale, teacher_scale, index)
        numbers = (student_factor, teacher_factor, forward_weight, reverse_weight, True)
        losses, *ctx.gradients = run_kernel(*tensors, *numbers)
        ctx.save_for_backward(*tensors)
        ctx.numbers = numbers
        ctx.student_dtype = student.dtype
        return losses.sum() if reduce else losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("symmetric_kl_loss")
        for_student = for_scale = None
        if ctx.gradients is None:
            _, *ctx.gradients = run_kernel(*ctx.saved_tensors, *ctx.numbers)
        gradient, gradient_of_scale = ctx.gradients
        if ctx.needs_input_grad[2]:
            for_scale = gradient_to_scale(gradient_of_scale * upstream, ctx.saved_tensors[2])
            for_scale = for_scale * ctx.numbers[0]
        if ctx.needs_input_grad[0]:
            factor = upstream[:, None] if upstream.dim() else upstream
            if is_batched(upstream):
                for_student = gradient * factor
            else:
                for_student = gradient if is_one(upstream) else gradient.mul_(factor)
                ctx.gradients = None
            if for_student.dtype != ctx.student_dtype:
                for_student = for_student.to(ctx.student_dtype)
        return for_student, None, for_scale, *[None] * 7


def is_one(upstream: Tensor) -> bool:
    """Whether this is a 1 that can be looked at without waiting for a GPU."""
    return upstream.dim() == 0 and upstream.is_cpu and upstream.item() == 1


def gradient_to_scale(of_rows: Tensor, scale: Tensor) -> Tensor:
    return of_rows.sum().to(scale.device, scale.dtype)


def run_kernel(student: Tensor, teacher: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op, by the shortest way there is."""
    if dispatcher_sees(student, teacher):
        return torch.ops.vlfast.symmetric_kl(student, teacher, *others)
    kernel = symmetric_kl_cpu if student.is_cpu else symmetric_kl_cuda
    return kernel(student, teacher, *others)


LIBRARY = torch.library.Library("vlfast", "FRAGMENT")
LIBRARY.define(
    "symmetric_kl(Tensor student, Tensor teacher, Tensor? student_scale, Tensor? teacher_scale, "
    "Tensor? index, float student_factor, float teacher_factor, float forward_weight, "
    "float reverse_weight, bool with_gradient) "
    # [B]; [B, K] and [B], the gradient to the student and to its whole scale, or empty.
    "-> (Tensor losses, Tensor gradient, Tensor gradient_of_scale)"
)


def symmetric_kl_cpu(
    student: Tensor,
    teacher: Tensor,
    student_scale: Tensor | None,
    teacher_scale: Tensor | None,
    index: Tensor | None,
    student_factor: float,
    teacher_factor: float,
    forward_weight: float,
    reverse_weight: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher, index = as_the_kernels_take(student, teacher, index)
    results = empty_results(student, student.dtype, with_gradient)
    extension().symmetric_kl_cpu(
        DTYPES[student.dtype],
        student.data_ptr(),
        teacher.data_ptr(),
        0 if index is None else index.data_ptr(),
        *student.shape,
        teacher.shape[1],
        number_on_cpu(student_scale, student_factor),
        number_on_cpu(teacher_scale, teacher_factor),
        0,
        0,
        forward_weight,
        reverse_weight,
        *(result.data_ptr() for result in results),
        torch.get_num_threads(),
    )
    return results


def symmetric_kl_cuda(
    student: Tensor,
    teacher: Tensor,
    student_scale: Tensor | None,
    teacher_scale: Tensor | None,
    index: Tensor | None,
    student_factor: float,
    teacher_factor: float,
    forward_weight: float,
    reverse_weight: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher, index = as_the_kernels_take(student, teacher, index)
    results = empty_results(student, student.dtype, with_gradient)
    compute = results[0].dtype
    student_scale, student_factor = number_for_gpu(student_scale, student_factor, compute)
    teacher_scale, teacher_factor = number_for_gpu(teacher_scale, teacher_factor, compute)
    with torch.cuda.device(student.device):
        extension().symmetric_kl_cuda(
            DTYPES[student.dtype],
            student.data_ptr(),
            teacher.data_ptr(),
            0 if index is None else index.data_ptr(),
            *student.shape,
            teacher.shape[1],
            student_factor,
            teacher_factor,
            *addresses((student_scale, teacher_scale)),
            forward_weight,
            reverse_weight,
            *(result.data_ptr() for result in results),
            torch.cuda.current_stream(student.device).cuda_stream,
        )
    return results


def symmetric_kl_fake(
    student: Tensor,
    teacher: Tensor,
    student_scale: Tensor | None,
    teacher_scale: Tensor | None,
    index: Tensor | None,
    student_factor: float,
    teacher_factor: float,
    forward_weight: float,
    reverse_weight: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return empty_results(student, dtype, with_gradient)


def as_the_kernels_take(
    student: Tensor, teacher: Tensor, index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both sides contiguous and in one dtype."""
    if student.dtype != teacher.dtype:
        dtype = torch.promote_types(student.dtype, teacher.dtype)
        student, teacher = student.to(dtype), teacher.to(dtype)
    if index is not None:
        index = index.contiguous()
    return student.contiguous(), teacher.contiguous(), index


def empty_results(
    student: Tensor, dtype: torch.dtype, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the losses, the gradient and the gradient to the scale, for both sides in ``dtype``.

    A gradient in fp16 could underflow before a gradient scaler's factor reaches it: it is in fp32.
    """
    rows, classes = student.shape
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    of_gradient = dtype if dtype == torch.bfloat16 else compute
    losses = student.new_empty(rows, dtype=compute)
    if not with_gradient:
        return losses, student.new_empty(0, 0, dtype=of_gradient), losses.new_empty(0)
    gradient = student.new_empty(rows, classes, dtype=of_gradient)
    return losses, gradient, torch.empty_like(losses)


LIBRARY.impl("symmetric_kl", symmetric_kl_cpu, "CPU")
LIBRARY.impl("symmetric_kl", symmetric_kl_cuda, "CUDA")
torch.library.register_fake("vlfast::symmetric_kl", symmetric_kl_fake, lib=LIBRARY)


def remember_gradients(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    student, _, student_scale, _, _, student_factor = inputs[:6]
    ctx.save_for_backward(*output[1:], student_scale)
    ctx.student_dtype, ctx.student_factor = student.dtype, student_factor


def backward_of_op(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("symmetric_kl")
    gradient, gradient_of_scale, student_scale = ctx.saved_tensors
    for_student = for_scale = None
    if ctx.needs_input_grad[0]:
        for_student = (gradient * upstream[:, None]).to(ctx.student_dtype)
    if ctx.needs_input_grad[2]:
        for_scale = gradient_to_scale(gradient_of_scale * upstream, student_scale)
        for_scale = for_scale * ctx.student_factor
    return for_student, None, for_scale, *[None] * 7


torch.library.register_autograd(
    "vlfast::symmetric_kl", backward_of_op, setup_context=remember_gradients, lib=LIBRARY
)
