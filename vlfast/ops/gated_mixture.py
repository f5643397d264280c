"""Distillation from a gated mixture of hard prompts, and the loss that trains the gate.

Method: MoPD, arXiv 2412.19087.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._extension import extension
from . import checks, reference
from .backends import kernel_serves
from .kernel_calls import (
    DTYPES,
    dispatcher_sees,
    number_for_gpu,
    number_on_cpu,
    refuse_second_derivative,
    tensor_and_factor,
)

REDUCTIONS = ("none", "mean", "sum")


def gated_mixture_loss(
    image_features: Tensor,
    gate: Tensor,
    hard_text_features: Tensor,
    student_logits: Tensor,
    labels: Tensor,
    *,
    logit_scale: Tensor | float,
    temperature: Tensor | float = 1.0,
    top_k: int = 2,
    reduction: Literal["none", "mean", "sum"] = "mean",
) -> tuple[Tensor, Tensor]:
    """The distillation loss of a gated mixture of hard prompts, and the prompt selection loss.

    For each image, with T = ``temperature``:

    - gate logits: image_features @ gate, one for each of the H hard prompts
    - selected prompts: the ``top_k`` largest gate logits; weights g_i: softmax over those alone
    - teacher i: logits z_i = logit_scale * image_features . hard_text_features[i]
    - distillation: T**2 * sum_i g_i KL(softmax(z_i / T) || softmax(student_logits / T))
    - selection: sum_i g_i cross_entropy(z_i, label), at temperature 1

    Args:
        image_features: [B, d] floating, L2-normalised by the caller; no gradient.
        gate: [d, H] floating. It may start at zeros: then the first ``top_k`` prompts are selected.
        hard_text_features: [H, C, d] floating, of H hand-written prompts for each of C classes,
            L2-normalised by the caller; no gradient.
        student_logits: [B, C] floating, scaled already.
        labels: int64 [B], from 0 to C - 1. On a GPU the values are looked at only under
            VLFAST_CHECK=1; without it the selection loss of another label is NaN.
        logit_scale: of the teachers, finite and > 0; a number or a 0-d tensor; no gradient.
        temperature: of the distillation, finite and > 0; a number or a 0-d tensor; no gradient.
        top_k: prompts an image learns from, from 1 to H. Ties: the smaller index. With 1, the
            weight is 1 and the gate gets a zero gradient.
        reduction: "none" gives [B] each, "sum" and "mean" (over the B images) 0-d tensors.

    Returns:
        (distillation, selection) in nats: fp32, or fp64 if a feature, the gate or the logits are.
        Half-precision inputs are computed in fp32. Both give a gradient to ``gate``, distillation
        also to ``student_logits``, each in the dtype of its input. A row with a value that is not
        finite gives NaN for itself alone. Scales on the GPU are not read by the host.

    fp64, other devices than CPU and CUDA, functorch transforms and forward-mode differentiation are
    served by plain PyTorch. For second derivatives compute the losses under
    ``vlfast.ops.backends.reference_only()``; without it, create_graph=True raises RuntimeError.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices disagree, a tensor is empty, a number or a label is out of
            range, or image_features, hard_text_features, logit_scale or temperature requires grad.

    Source: MoPD, arXiv 2412.19087: the gated prompt selection, the distillation and the
    mixture-of-prompts selection loss. Ours, where it is left open: the order among ties.
    """
    check_arguments(
        image_features,
        gate,
        hard_text_features,
        student_logits,
        labels,
        logit_scale,
        temperature,
        top_k,
        reduction,
    )
    inputs = (image_features, gate, hard_text_features, student_logits)
    if kernel_can_serve(*inputs):
        logit_scale, logit_scale_factor = tensor_and_factor(logit_scale)
        temperature, temperature_factor = tensor_and_factor(temperature)
        arguments = (
            *inputs,
            labels,
            logit_scale,
            temperature,
            logit_scale_factor,
            temperature_factor,
            top_k,
        )
        if (gate.requires_grad or student_logits.requires_grad) and torch.is_grad_enabled():
            distillation, selection = GatedMixture.apply(*arguments, True)
        else:
            distillation, selection = run_kernel(*arguments, False)[:2]
    else:
        distillation, selection = reference.gated_mixture(
            *inputs, labels, logit_scale, temperature, top_k
        )
    if reduction == "none":
        return distillation, selection
    if reduction == "sum":
        return distillation.sum(), selection.sum()
    return distillation.mean(), selection.mean()


def check_arguments(
    image_features: Any,
    gate: Any,
    hard_text_features: Any,
    student_logits: Any,
    labels: Any,
    logit_scale: Any,
    temperature: Any,
    top_k: Any,
    reduction: Any,
) -> None:
    """Raise unless the arguments are what :func:`gated_mixture_loss` says."""
    checks.check_floating("image_features", image_features, ("B", "d"))
    checks.check_floating("gate", gate, ("d", "H"))
    checks.check_floating("hard_text_features", hard_text_features, ("H", "C", "d"))
    checks.check_floating("student_logits", student_logits, ("B", "C"))
    checks.check_dtype("labels", labels, torch.int64, ("B",))
    for name, tensor in (
        ("image_features", image_features),
        ("gate", gate),
        ("hard_text_features", hard_text_features),
    ):
        checks.check_not_empty(name, tensor)
    checks.check_same_size(
        "d",
        ("image_features", image_features, 1),
        ("gate", gate, 0),
        ("hard_text_features", hard_text_features, 2),
    )
    checks.check_same_size("H", ("gate", gate, 1), ("hard_text_features", hard_text_features, 0))
    checks.check_same_size(
        "C", ("hard_text_features", hard_text_features, 1), ("student_logits", student_logits, 1)
    )
    checks.check_same_size(
        "B",
        ("image_features", image_features, 0),
        ("student_logits", student_logits, 0),
        ("labels", labels, 0),
    )
    checks.check_positive("logit_scale", logit_scale)
    checks.check_positive("temperature", temperature)
    for name, value in (
        ("image_features", image_features),
        ("hard_text_features", hard_text_features),
        ("logit_scale", logit_scale),
        ("temperature", temperature),
    ):
        checks.check_frozen(name, value)
    checks.check_top_k(top_k, gate.shape[1], "the hard prompts, H")
    checks.check_reduction(reduction, REDUCTIONS)
    checks.check_same_device(
        image_features=image_features,
        gate=gate,
        hard_text_features=hard_text_features,
        student_logits=student_logits,
        labels=labels,
        logit_scale=logit_scale,
        temperature=temperature,
    )
    checks.check_in_range("labels", labels, student_logits.shape[1])


def kernel_can_serve(*inputs: Tensor) -> bool:
    """Whether there is a kernel for these dtypes, here."""
    if any(x.dtype not in DTYPES for x in inputs):
        return False
    if reference.accumulation_dtype(*inputs) == torch.float64:
        return False
    return kernel_serves("gated_mixture", inputs[0])


class GatedMixture(torch.autograd.Function):
    """The op and its gradients, which the forward has already computed for an upstream of 1."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        results = run_kernel(*arguments)
        remember_gradients(ctx, arguments, results)
        return results[:2]

    @staticmethod
    def backward(
        ctx: Any, of_distillation: Tensor | None, of_selection: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("gated_mixture_loss")
        image_features, to_student, distillation_to_scores, selection_to_scores = ctx.saved_tensors
        for_gate = for_student = None
        if ctx.needs_input_grad[1]:
            shares = [
                to_scores * upstream[:, None]
                for to_scores, upstream in (
                    (distillation_to_scores, of_distillation),
                    (selection_to_scores, of_selection),
                )
                if upstream is not None
            ]
            for_scores = shares[0] if len(shares) == 1 else shares[0] + shares[1]
            with reference.without_autocast(to_student):
                # In this order the product is three times as fast on a CPU.
                transposed = for_scores.T @ image_features.to(for_scores.dtype)
            for_gate = transposed.T.contiguous().to(ctx.gate_dtype)
        if ctx.needs_input_grad[3] and of_distillation is not None:
            for_student = (to_student * of_distillation[:, None]).to(ctx.student_dtype)
        return None, for_gate, None, for_student, *[None] * 7


def remember_gradients(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    problem = Problem(*inputs)
    ctx.save_for_backward(problem.image_features, *output[2:])
    ctx.gate_dtype, ctx.student_dtype = problem.gate.dtype, problem.student_logits.dtype
    # Without zeros in its place, a loss that is not used adds nothing, even where it is NaN.
    ctx.set_materialize_grads(False)


def run_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    """The op, by the shortest way there is."""
    problem = Problem(*arguments)
    if dispatcher_sees(*problem[:5]):
        return torch.ops.vlfast.gated_mixture(*arguments)
    return (gated_mixture_cpu if problem.gate.is_cpu else gated_mixture_cuda)(*arguments)


class Problem(NamedTuple):
    """The arguments of the op, in their order."""

    image_features: Tensor
    gate: Tensor
    hard_text_features: Tensor
    student_logits: Tensor
    labels: Tensor
    logit_scale: Tensor | None
    temperature: Tensor | None
    logit_scale_factor: float
    temperature_factor: float
    top_k: int
    with_gradient: bool

    def empty_results(self) -> tuple[Tensor, ...]:
        """Room for the losses and, or empty, the gradients of each row, in fp32.

        A gradient in fp16 could underflow before a gradient scaler's factor reaches it.
        """
        images, classes = self.student_logits.shape
        heads = self.gate.shape[1]
        shapes = [(images,), (images,), (images, classes), (images, heads), (images, heads)]
        if not self.with_gradient:
            shapes[2:] = [(0, 0)] * 3
        new_empty = self.student_logits.new_empty
        return tuple(new_empty(shape, dtype=torch.float32) for shape in shapes)


LIBRARY = torch.library.Library("vlfast", "FRAGMENT")
LIBRARY.define(
    "gated_mixture(Tensor image_features, Tensor gate, Tensor hard_text_features, "
    "Tensor student_logits, Tensor labels, Tensor? logit_scale, Tensor? temperature, "
    "float logit_scale_factor, float temperature_factor, int top_k, bool with_gradient) "
    # [B] and [B]; [B, C], [B, H] and [B, H], the gradients of each row, or empty.
    "-> (Tensor distillation, Tensor selection, Tensor distillation_to_student, "
    "Tensor distillation_to_scores, Tensor selection_to_scores)"
)


def gated_mixture_cpu(*arguments: Any) -> tuple[Tensor, ...]:
    problem = Problem(*arguments)
    image_features, gate, student_logits = (
        x.to(torch.float32).contiguous()
        for x in (problem.image_features, problem.gate, problem.student_logits)
    )
    hard_text_features = problem.hard_text_features.contiguous()
    labels = problem.labels.contiguous()
    results = problem.empty_results()
    extension().gated_mixture_cpu(
        DTYPES[hard_text_features.dtype],
        *image_features.shape,
        *hard_text_features.shape[:2],
        problem.top_k,
        image_features.data_ptr(),
        gate.data_ptr(),
        hard_text_features.data_ptr(),
        student_logits.data_ptr(),
        labels.data_ptr(),
        number_on_cpu(problem.logit_scale, problem.logit_scale_factor),
        number_on_cpu(problem.temperature, problem.temperature_factor),
        *(result.data_ptr() for result in results),
        torch.get_num_threads(),
    )
    return results


def gated_mixture_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    from .triton.gated_mixture import gated_mixture

    problem = Problem(*arguments)
    return gated_mixture(
        *problem[:5],
        number_on_gpu(problem.logit_scale, problem.logit_scale_factor),
        number_on_gpu(problem.temperature, problem.temperature_factor),
        problem.top_k,
        problem.with_gradient,
    )


def number_on_gpu(number: Tensor | None, factor: float) -> Tensor | float:
    """Their product: a number, or a tensor that stays on its GPU."""
    number, factor = number_for_gpu(number, factor, torch.float32)
    if number is None:
        return factor
    return number if factor == 1 else number * factor


def gated_mixture_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return Problem(*arguments).empty_results()


LIBRARY.impl("gated_mixture", gated_mixture_cpu, "CPU")
LIBRARY.impl("gated_mixture", gated_mixture_cuda, "CUDA")
torch.library.register_fake("vlfast::gated_mixture", gated_mixture_fake, lib=LIBRARY)
torch.library.register_autograd(
    "vlfast::gated_mixture", GatedMixture.backward, setup_context=remember_gradients, lib=LIBRARY
)
