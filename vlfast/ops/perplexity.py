"""The perplexity regulariser of prompts against a frozen vocabulary, and its inverted twin.

Method: PLPP, arXiv 2412.15277.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .._extension import extension
from . import checks, reference
from .backends import kernel_serves, reference_must_serve

REDUCTIONS = ("none", "mean", "sum")
# The dtypes of embeddings that the kernels read, as csrc/include/vlfast/dtype.h has them.
DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
# Up to it the CPU kernel is at least 2.5 times as fast as plain PyTorch (at V = 49408, d = 512).
# Above it the advantage wanes, and its candidates of many rows would take more than 100 MB. The
# CUDA kernel has a lower limit of its own.
KERNEL_TOP_K = 512
# In plain PyTorch, scores over the vocabulary are held for this many rows at a time, 13 MB each at
# V = 49408 in fp32.
ROWS_PER_CHUNK = 64
# Up to this many words a row, their embeddings are gathered; above it, a product over V is cheaper.
GATHERED_TOP_K = 64


def plpp_loss(
    prompts: Tensor,
    hidden: Tensor,
    embedding: Tensor,
    *,
    top_k: int = 10,
    temperature: Tensor | float = 1.0,
    inverse_weight: Tensor | float = 1.0,
    detach_targets: bool = True,
    vocabulary: Tensor | None = None,
    inverse_norms: Tensor | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
) -> Tensor:
    """The prompt-perplexity loss: perplexity term + inverse_weight * inverted term, of each row.

    Arguments and errors are those of :func:`plpp_terms`, and two more:

    Args:
        inverse_weight: weight of the inverted term, finite and >= 0; a number or a 0-d tensor.
        reduction: "none" gives [M], "sum" and "mean" (over the M rows) a 0-d tensor.

    Returns:
        The loss in nats: fp32, or fp64 if an input is.

    Source: PLPP, arXiv 2412.15277. The equal weight of both terms is our default.
    """
    checks.check_reduction(reduction, REDUCTIONS)
    checks.check_weight("inverse_weight", inverse_weight)
    checks.check_frozen("inverse_weight", inverse_weight)
    perplexity, inverted = plpp_terms(
        prompts,
        hidden,
        embedding,
        top_k=top_k,
        temperature=temperature,
        detach_targets=detach_targets,
        vocabulary=vocabulary,
        inverse_norms=inverse_norms,
    )
    losses = perplexity + reference.in_dtype(inverse_weight, inverted.dtype) * inverted
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.mean()


def plpp_terms(
    prompts: Tensor,
    hidden: Tensor,
    embedding: Tensor,
    *,
    top_k: int = 10,
    temperature: Tensor | float = 1.0,
    detach_targets: bool = True,
    vocabulary: Tensor | None = None,
    inverse_norms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The perplexity term and the inverted term of each prompt vector.

    Row i asks which words prompt vector i stands for, and whether the text encoder foresees them:

    - K_i: the ``top_k`` words w whose embeddings have the largest cosine with prompts[i]
    - y_i: softmax over K_i of those cosines / ``temperature``, the soft label
    - p_i: softmax of hidden[i] . embedding[w] over the whole vocabulary, the prediction
    - perplexity term: - sum over K_i of y_iw log p_iw, the log of the perplexity
    - inverted term: - sum over K_i of q_iw log y_iw, with q_i = p_i renormalised over K_i

    Args:
        prompts: [M, d] floating, the prompt vectors, in the space of ``embedding``.
        hidden: [M, d] floating, the text encoder's states that predict them: after the final layer
            norm, before the projection, and one position earlier (the state at the start token
            belongs to the first vector).
        embedding: [V, d] floating, the frozen token embedding. One that is not contiguous is
            copied on every call.
        top_k: words in a soft label, from 1 (a hard label) to V. Ties: the smaller index.
        temperature: of the soft label, finite and > 0; a number or a 0-d tensor.
        detach_targets: no gradient through y in the perplexity term (it trains ``hidden`` alone),
            nor through q in the inverted term (it trains ``prompts`` alone).
        vocabulary: bool [V], the words that count; the others are no labels and have p = 0. If
            fewer than ``top_k`` count, each row has as many labels as count, on a device where
            counting them would need a synchronisation; elsewhere that is an error.
        inverse_norms: [V] floating, 1 / the norm of each row of ``embedding`` (norm clamped at
            1e-12), where the caller keeps it; it is computed otherwise.

    Returns:
        Two tensors [M] in nats: fp32, or fp64 if prompts, hidden or embedding is. Half-precision
        inputs are computed in fp32. Each gradient comes back in the dtype of its input.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices disagree, M or V is 0, ``top_k`` or ``temperature`` is out of
            range, or embedding, inverse_norms or temperature requires grad.

    A zero row has cosine 0 with everything, and a zero prompt vector gets no gradient from the
    cosines. A value that is not finite in prompts or hidden gives NaN in its own row alone. The
    memory in use grows with M * d, not with M * V. The values of tensors on the GPU are not read
    by the host.

    The gradients are computed along with the terms, in one read of the embedding. fp64, a
    ``top_k`` above KERNEL_TOP_K and other devices than CPU and CUDA are served by plain PyTorch,
    64 rows at a time, and functorch transforms by the reference. For second derivatives compute
    the loss under ``vlfast.ops.backends.reference_only()``; without it, create_graph=True raises
    RuntimeError.

    Source: PLPP, arXiv 2412.15277, which derives labels from the cosine of prompts and token
    embeddings, softens them, keeps the k largest, and predicts with a training-free language-model
    head. Ours, where the paper leaves it open: the head is the transposed token embedding without
    scale or bias; the state before a vector predicts it; k is chosen on cosines and shared by both
    terms; labels are renormalised over k while the prediction stays normalised over V; both terms
    are cross-entropies in log space with their targets detached; k = 10 and temperature = 1.
    """
    check_arguments(
        prompts, hidden, embedding, top_k, temperature, detach_targets, vocabulary, inverse_norms
    )
    if reference_must_serve():
        return reference.perplexity_terms(
            prompts,
            hidden,
            embedding,
            top_k,
            temperature,
            detach_targets,
            vocabulary,
            inverse_norms,
        )
    is_tensor = isinstance(temperature, Tensor)
    arguments = (
        prompts,
        hidden,
        embedding,
        vocabulary,
        inverse_norms,
        temperature if is_tensor else None,
        1.0 if is_tensor else float(temperature),
        top_k,
        detach_targets,
    )
    prompts_learn, hidden_learn = (
        x.requires_grad and torch.is_grad_enabled() for x in (prompts, hidden)
    )
    if prompts_learn or hidden_learn:
        return Perplexity.apply(*arguments, prompts_learn, hidden_learn)
    return torch.ops.vlfast.perplexity(*arguments, False, False)[:2]


def check_arguments(
    prompts: Any,
    hidden: Any,
    embedding: Any,
    top_k: Any,
    temperature: Any,
    detach_targets: Any,
    vocabulary: Any,
    inverse_norms: Any,
) -> None:
    """Raise unless the arguments are what :func:`plpp_terms` says."""
    checks.check_floating("prompts", prompts, ("M", "d"))
    checks.check_floating("hidden", hidden, ("M", "d"))
    checks.check_floating("embedding", embedding, ("V", "d"))
    checks.check_same_size("M", ("prompts", prompts, 0), ("hidden", hidden, 0))
    checks.check_same_size(
        "d", ("prompts", prompts, 1), ("hidden", hidden, 1), ("embedding", embedding, 1)
    )
    checks.check_not_empty("prompts", prompts)
    checks.check_not_empty("embedding", embedding)
    checks.check_frozen("embedding", embedding)
    checks.check_top_k(top_k, embedding.shape[0], "the rows of embedding")
    checks.check_positive("temperature", temperature)
    checks.check_frozen("temperature", temperature)
    checks.check_flag("detach_targets", detach_targets)
    if inverse_norms is not None:
        checks.check_floating("inverse_norms", inverse_norms, ("V",))
        checks.check_same_size(
            "V", ("embedding", embedding, 0), ("inverse_norms", inverse_norms, 0)
        )
        checks.check_frozen("inverse_norms", inverse_norms)
    if vocabulary is not None:
        checks.check_dtype("vocabulary", vocabulary, torch.bool, ("V",))
        checks.check_same_size("V", ("embedding", embedding, 0), ("vocabulary", vocabulary, 0))
    checks.check_same_device(
        prompts=prompts,
        hidden=hidden,
        embedding=embedding,
        temperature=temperature,
        vocabulary=vocabulary,
        inverse_norms=inverse_norms,
    )
    if vocabulary is not None and checks.values_readable(vocabulary):
        counted = int(vocabulary.sum())
        checks.check_top_k(top_k, counted, "the words that vocabulary counts")


class Perplexity(torch.autograd.Function):
    """The op and its gradients, which the forward has already computed for upstreams of 1."""

    @staticmethod
    def forward(
        ctx: Any,
        prompts: Tensor,
        hidden: Tensor,
        embedding: Tensor,
        vocabulary: Tensor | None,
        inverse_norms: Tensor | None,
        temperature: Tensor | None,
        temperature_factor: float,
        top_k: int,
        detach_targets: bool,
        prompts_gradient: bool,
        hidden_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        perplexity, inverted, *gradients = torch.ops.vlfast.perplexity(
            prompts,
            hidden,
            embedding,
            vocabulary,
            inverse_norms,
            temperature,
            temperature_factor,
            top_k,
            detach_targets,
            prompts_gradient,
            hidden_gradient,
        )
        ctx.save_for_backward(*gradients)
        ctx.prompts_dtype, ctx.hidden_dtype = prompts.dtype, hidden.dtype
        ctx.detach_targets = detach_targets
        return perplexity, inverted

    @staticmethod
    def backward(ctx: Any, of_perplexity: Tensor, of_inverted: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would be silent here: the saved gradients carry no graph of their own.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "plpp_loss: create_graph=True needs the reference; compute the loss under "
                "vlfast.ops.backends.reference_only()"
            )
        (
            perplexity_to_hidden,
            inverted_to_prompts,
            perplexity_to_prompts,
            inverted_to_hidden,
        ) = ctx.saved_tensors
        for_prompts = for_hidden = None
        if ctx.needs_input_grad[0]:
            for_prompts = of_inverted[:, None] * inverted_to_prompts
            if not ctx.detach_targets:
                for_prompts = for_prompts + of_perplexity[:, None] * perplexity_to_prompts
            for_prompts = for_prompts.to(ctx.prompts_dtype)
        if ctx.needs_input_grad[1]:
            for_hidden = of_perplexity[:, None] * perplexity_to_hidden
            if not ctx.detach_targets:
                for_hidden = for_hidden + of_inverted[:, None] * inverted_to_hidden
            for_hidden = for_hidden.to(ctx.hidden_dtype)
        return for_prompts, for_hidden, *[None] * 9


LIBRARY = torch.library.Library("vlfast", "FRAGMENT")
LIBRARY.define(
    "perplexity(Tensor prompts, Tensor hidden, Tensor embedding, Tensor? vocabulary, "
    "Tensor? inverse_norms, Tensor? temperature, float temperature_factor, SymInt top_k, "
    "bool detach_targets, bool prompts_gradient, bool hidden_gradient) "
    # [M] each.
    "-> (Tensor perplexity, Tensor inverted, "
    # [M, d] each, or empty: the first and the last for hidden_gradient, the others for
    # prompts_gradient, the last two only without detach_targets.
    "Tensor perplexity_to_hidden, Tensor inverted_to_prompts, "
    "Tensor perplexity_to_prompts, Tensor inverted_to_hidden)"
)


def perplexity_cpu(
    prompts: Tensor,
    hidden: Tensor,
    embedding: Tensor,
    vocabulary: Tensor | None,
    inverse_norms: Tensor | None,
    temperature: Tensor | None,
    temperature_factor: float,
    top_k: int,
    detach_targets: bool,
    prompts_gradient: bool,
    hidden_gradient: bool,
) -> tuple[Tensor, ...]:
    if not kernel_can_serve(prompts, hidden, embedding, top_k):
        return perplexity_in_pytorch(
            prompts,
            hidden,
            embedding,
            vocabulary,
            inverse_norms,
            temperature,
            temperature_factor,
            top_k,
            detach_targets,
            prompts_gradient,
            hidden_gradient,
        )
    inputs = as_the_kernels_take(prompts, hidden, embedding, vocabulary, inverse_norms)
    results = empty_results(
        prompts, torch.float32, detach_targets, prompts_gradient, hidden_gradient
    )
    extension().perplexity_cpu(
        DTYPES[embedding.dtype],
        len(prompts),
        *embedding.shape,
        top_k,
        *addresses(inputs),
        temperature_factor if temperature is None else temperature_factor * temperature.item(),
        0,
        detach_targets,
        *addresses(results),
        torch.get_num_threads(),
    )
    return results


def perplexity_cuda(
    prompts: Tensor,
    hidden: Tensor,
    embedding: Tensor,
    vocabulary: Tensor | None,
    inverse_norms: Tensor | None,
    temperature: Tensor | None,
    temperature_factor: float,
    top_k: int,
    detach_targets: bool,
    prompts_gradient: bool,
    hidden_gradient: bool,
) -> tuple[Tensor, ...]:
    device = prompts.device
    if kernel_can_serve(prompts, hidden, embedding, top_k):
        inputs = as_the_kernels_take(prompts, hidden, embedding, vocabulary, inverse_norms)
        # The temperature stays on the GPU, where the kernel reads it.
        scale = None if temperature is None else temperature.to(device, torch.float32)
        results = empty_results(
            prompts, torch.float32, detach_targets, prompts_gradient, hidden_gradient
        )
        problem = (
            DTYPES[embedding.dtype],
            len(prompts),
            *embedding.shape,
            top_k,
            *addresses(inputs),
            temperature_factor,
            *addresses([scale]),
            detach_targets,
            *addresses(results),
        )
        with torch.cuda.device(device):
            workspace_size = extension().perplexity_cuda_workspace(*problem)
            if workspace_size:
                workspace = torch.empty(workspace_size, dtype=torch.uint8, device=device)
                stream = torch.cuda.current_stream(device).cuda_stream
                extension().perplexity_cuda(*problem, workspace.data_ptr(), stream)
                return results
    return perplexity_in_pytorch(
        prompts,
        hidden,
        embedding,
        vocabulary,
        inverse_norms,
        temperature,
        temperature_factor,
        top_k,
        detach_targets,
        prompts_gradient,
        hidden_gradient,
    )


def perplexity_fake(
    prompts: Tensor,
    hidden: Tensor,
    embedding: Tensor,
    vocabulary: Tensor | None,
    inverse_norms: Tensor | None,
    temperature: Tensor | None,
    temperature_factor: float,
    top_k: int,
    detach_targets: bool,
    prompts_gradient: bool,
    hidden_gradient: bool,
) -> tuple[Tensor, ...]:
    dtype = reference.accumulation_dtype(prompts, hidden, embedding)
    return empty_results(prompts, dtype, detach_targets, prompts_gradient, hidden_gradient)


def kernel_can_serve(prompts: Tensor, hidden: Tensor, embedding: Tensor, top_k: int) -> bool:
    """Whether there is a kernel for these dtypes and sizes, here."""
    dtype = reference.accumulation_dtype(prompts, hidden, embedding)
    if dtype != torch.float32 or embedding.dtype not in DTYPES:
        return False
    if len(prompts) == 0 or top_k > KERNEL_TOP_K:
        return False
    return kernel_serves("perplexity", embedding)


def as_the_kernels_take(
    prompts: Tensor,
    hidden: Tensor,
    embedding: Tensor,
    vocabulary: Tensor | None,
    inverse_norms: Tensor | None,
) -> list[Tensor | None]:
    """All contiguous, and all numbers but the embedding in fp32."""
    return [
        prompts.float().contiguous(),
        hidden.float().contiguous(),
        embedding.contiguous(),
        None if vocabulary is None else vocabulary.contiguous(),
        None if inverse_norms is None else inverse_norms.float().contiguous(),
    ]


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """The address of each tensor's data, 0 of what is missing or empty."""
    return [0 if x is None or not x.numel() else x.data_ptr() for x in tensors]


def empty_results(
    prompts: Tensor,
    dtype: torch.dtype,
    detach_targets: bool,
    prompts_gradient: bool,
    hidden_gradient: bool,
) -> tuple[Tensor, ...]:
    """Room for both terms and the four gradients, as the op returns them."""
    wanted = (
        hidden_gradient,
        prompts_gradient,
        prompts_gradient and not detach_targets,
        hidden_gradient and not detach_targets,
    )
    terms = [prompts.new_empty(len(prompts), dtype=dtype) for _ in range(2)]
    gradients = [
        prompts.new_empty(prompts.shape if is_wanted else (0, 0), dtype=dtype)
        for is_wanted in wanted
    ]
    return (*terms, *gradients)


@torch.no_grad()
def perplexity_in_pytorch(
    prompts: Tensor,
    hidden: Tensor,
    embedding: Tensor,
    vocabulary: Tensor | None,
    inverse_norms: Tensor | None,
    temperature: Tensor | None,
    temperature_factor: float,
    top_k: int,
    detach_targets: bool,
    prompts_gradient: bool,
    hidden_gradient: bool,
) -> tuple[Tensor, ...]:
    """The op where no kernel serves: a few rows at a time, so that [M, V] is never held."""
    dtype = reference.accumulation_dtype(prompts, hidden, embedding)
    results = empty_results(prompts, dtype, detach_targets, prompts_gradient, hidden_gradient)
    table = embedding.to(dtype)
    scale = reference.inverse_norm(table) if inverse_norms is None else inverse_norms.to(dtype)
    if temperature is None:
        temperature = temperature_factor
    else:
        temperature = temperature.to(dtype) * temperature_factor
    with reference.without_autocast(table):
        for start in range(0, len(prompts), ROWS_PER_CHUNK):
            rows = slice(start, start + ROWS_PER_CHUNK)
            solve_rows(
                prompts[rows].to(dtype),
                hidden[rows].to(dtype),
                table,
                vocabulary,
                scale,
                temperature,
                top_k,
                [x[rows] if x.numel() else None for x in results],
            )
    return results


def solve_rows(
    prompts: Tensor,
    hidden: Tensor,
    table: Tensor,
    vocabulary: Tensor | None,
    scale: Tensor,
    temperature: Tensor | float,
    top_k: int,
    results: list[Tensor | None],
) -> None:
    """Write the results of a few rows, None where one is not wanted."""
    (
        for_perplexity,
        for_inverted,
        perplexity_to_hidden,
        inverted_to_prompts,
        perplexity_to_prompts,
        inverted_to_hidden,
    ) = results
    units = reference.unit_rows(prompts)
    all_cosines = units @ table.T * scale
    all_logits = hidden @ table.T
    if vocabulary is not None:
        all_cosines = all_cosines.masked_fill(~vocabulary, -torch.inf)
        all_logits = all_logits.masked_fill(~vocabulary, -torch.inf)
    words = reference.smallest_index_topk(all_cosines, top_k)
    logits = all_logits.gather(1, words)
    log_normaliser = all_logits.logsumexp(1, keepdim=True)
    log_labels = (all_cosines.gather(1, words) / temperature).log_softmax(1)
    log_renormalised = logits.log_softmax(1)
    log_probabilities = logits - log_normaliser
    labels, renormalised = log_labels.exp(), log_renormalised.exp()
    if vocabulary is not None:
        # Words that do not count may be there to fill a row; they have no part in its sums.
        counted = vocabulary[words]
        labels, log_labels, renormalised, log_probabilities = (
            x.where(counted, 0) for x in (labels, log_labels, renormalised, log_probabilities)
        )
    perplexity = -(labels * log_probabilities).sum(1, keepdim=True)
    inverted = -(renormalised * log_labels).sum(1, keepdim=True)
    for_perplexity.copy_(perplexity[:, 0])
    for_inverted.copy_(inverted[:, 0])

    if perplexity_to_hidden is not None:
        expected = (all_logits - log_normaliser).exp() @ table
        torch.sub(expected, weighted_embeddings(labels, words, table), out=perplexity_to_hidden)
    if inverted_to_hidden is not None:
        of_logits = -renormalised * (log_labels + inverted)
        inverted_to_hidden.copy_(weighted_embeddings(of_logits, words, table))
    scale = scale[words] / temperature
    if inverted_to_prompts is not None:
        of_units = weighted_embeddings((labels - renormalised) * scale, words, table)
        inverted_to_prompts.copy_(through_unit_rows(of_units, prompts, units))
    if perplexity_to_prompts is not None:
        of_cosines = -labels * (log_probabilities + perplexity)
        of_units = weighted_embeddings(of_cosines * scale, words, table)
        perplexity_to_prompts.copy_(through_unit_rows(of_units, prompts, units))


def weighted_embeddings(weights: Tensor, words: Tensor, table: Tensor) -> Tensor:
    """The sum over k of weights[:, k] * table[words[:, k]]: [m, d]."""
    if words.shape[1] <= GATHERED_TOP_K:
        return (weights[:, None] @ table[words])[:, 0]
    return weights.new_zeros(len(words), len(table)).scatter(1, words, weights) @ table


def through_unit_rows(of_units: Tensor, rows: Tensor, units: Tensor) -> Tensor:
    """The gradient to rows of reference.unit_rows(rows), whose result is ``units``."""
    norms = rows.norm(dim=-1, keepdim=True)
    across = of_units - units * (units * of_units).sum(1, keepdim=True)
    return torch.where(norms <= reference.NORM_FLOOR, 0, across / norms)


LIBRARY.impl("perplexity", perplexity_cpu, "CPU")
LIBRARY.impl("perplexity", perplexity_cuda, "CUDA")
LIBRARY.impl("perplexity", perplexity_in_pytorch, "CompositeExplicitAutograd")
torch.library.register_fake("vlfast::perplexity", perplexity_fake, lib=LIBRARY)
