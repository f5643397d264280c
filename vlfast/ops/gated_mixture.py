"""Distillation from a gated mixture of hard prompts, and the loss that trains the gate.

Method: MoPD, arXiv 2412.19087.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from . import checks, reference

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
        labels: int64 [B], from 0 to C - 1 (values are looked at only under VLFAST_CHECK=1).
        logit_scale: of the teachers, finite and > 0; a number or a 0-d tensor; no gradient.
        temperature: of the distillation, finite and > 0; a number or a 0-d tensor; no gradient.
        top_k: prompts an image learns from, from 1 to H. Ties: the smaller index. With 1, the
            weight is 1 and the gate gets a zero gradient.
        reduction: "none" gives [B] each, "sum" and "mean" (over the B images) 0-d tensors.

    Returns:
        (distillation, selection) in nats: fp32, or fp64 if a feature, the gate or the logits are.
        Half-precision inputs are computed in fp32. Both give a gradient to ``gate``, distillation
        also to ``student_logits``, each in the dtype of its input.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices disagree, a tensor is empty, a number is out of range, or
            image_features, hard_text_features, logit_scale or temperature requires grad.

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
    distillation, selection = reference.gated_mixture(
        image_features,
        gate,
        hard_text_features,
        student_logits,
        labels,
        logit_scale,
        temperature,
        top_k,
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
