"""The perplexity regulariser of prompts against a frozen vocabulary, and its inverted twin.

Method: PLPP, arXiv 2412.15277.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._extension import extension
from . import checks, reference
from .backends import kernel_serves, reference_must_serve
from .kernel_calls import (
    DTYPES,
    addresses,
    dispatcher_sees,
    number_for_gpu,
    number_on_cpu,
    refuse_second_derivative,
    tensor_and_factor,
)

REDUCTIONS = ("none", "mean", "sum")
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
    cosines. A value that is not finite in prompts or hidden gives NaN in its own row alone; one in
    the embedding or its norms, of a word that counts, gives NaN in every row. The memory in use
    grows with M * (d + top_k), not with M * V. The values of tensors on the GPU are not read by the
    host.

    The gradients are computed along with the terms, in one read of the embedding. fp64, a
    ``top_k`` above KERNEL_TOP_K and other devices than CPU and CUDA are served by plain PyTorch,
    64 rows at a time, and functorch transforms and forward-mode differentiation by the reference,
    which holds M * V. For second derivatives compute
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
    arguments = (
        prompts,
        hidden,
        embedding,
        vocabulary,
        inverse_norms,
        *tensor_and_factor(temperature),
        top_k,
        detach_targets,
    )
    prompts_learn, hidden_learn = (
        x.requires_grad and torch.is_grad_enabled() for x in (prompts, hidden)
    )
    if prompts_learn or hidden_learn:
        return Perplexity.apply(*arguments, prompts_learn, hidden_learn)
    return run_kernel(*arguments, False, False)[:2]


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
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        results = run_kernel(*arguments)
        remember_gradients(ctx, arguments, results)
        return results[:2]

    @staticmethod
    def backward(
        ctx: Any, of_perplexity: Tensor, of_inverted: Tensor, *_: Any
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("plpp_loss")
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


def remember_gradients(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    problem = Problem(*inputs)
    ctx.save_for_backward(*output[2:])
    ctx.prompts_dtype, ctx.hidden_dtype = problem.prompts.dtype, problem.hidden.dtype
    ctx.detach_targets = problem.detach_targets


def run_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    """The op, by the shortest way there is."""
    problem = Problem(*arguments)
    device = problem.prompts.device.type
    if device not in ("cpu", "cuda") or dispatcher_sees(*problem[:5]):
        return torch.ops.vlfast.perplexity(*arguments)
    return (perplexity_cpu if device == "cpu" else perplexity_cuda)(*arguments)


class Problem(NamedTuple):
    """The arguments of the op, in their order."""

    prompts: Tensor
    hidden: Tensor
    embedding: Tensor
    vocabulary: Tensor | None
    inverse_norms: Tensor | None
    temperature: Tensor | None
    temperature_factor: float
    top_k: int
    detach_targets: bool
    prompts_gradient: bool
    hidden_gradient: bool

    @property
    def dtype(self) -> torch.dtype:
        """In which it is computed."""
        return reference.accumulation_dtype(self.prompts, self.hidden, self.embedding)

    def can_be_served(self) -> bool:
        """Whether there is a kernel for these dtypes and sizes, here."""
        if self.dtype != torch.float32 or self.embedding.dtype not in DTYPES:
            return False
        if len(self.prompts) == 0 or self.top_k > KERNEL_TOP_K:
            return False
        return kernel_serves("perplexity", self.embedding)

    def inputs(self) -> list[Tensor | None]:
        """All contiguous, and all numbers but the embedding in fp32."""
        return [
            self.prompts.float().contiguous(),
            self.hidden.float().contiguous(),
            self.embedding.contiguous(),
            None if self.vocabulary is None else self.vocabulary.contiguous(),
            None if self.inverse_norms is None else self.inverse_norms.float().contiguous(),
        ]

    def empty_results(self) -> tuple[Tensor, ...]:
        """Room for both terms and the four gradients, as the op returns them."""
        wanted = (
            self.hidden_gradient,
            self.prompts_gradient,
            self.prompts_gradient and not self.detach_targets,
            self.hidden_gradient and not self.detach_targets,
        )
        rows, width = self.prompts.shape
        terms = [self.prompts.new_empty(rows, dtype=self.dtype) for _ in range(2)]
        gradients = [
            self.prompts.new_empty((rows, width) if is_wanted else (0, 0), dtype=self.dtype)
            for is_wanted in wanted
        ]
        return (*terms, *gradients)


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


def perplexity_cpu(*arguments: Any) -> tuple[Tensor, ...]:
    problem = Problem(*arguments)
    if not problem.can_be_served():
        return perplexity_in_pytorch(*arguments)
    # The addresses hold only as long as these do.
    inputs, results = problem.inputs(), problem.empty_results()
    extension().perplexity_cpu(
        DTYPES[problem.embedding.dtype],
        len(problem.prompts),
        *problem.embedding.shape,
        problem.top_k,
        *addresses(inputs),
        number_on_cpu(problem.temperature, problem.temperature_factor),
        0,
        problem.detach_targets,
        *addresses(results),
        torch.get_num_threads(),
    )
    return results


def perplexity_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    problem = Problem(*arguments)
    if not problem.can_be_served():
        return perplexity_in_pytorch(*arguments)
    device = problem.prompts.device
    temperature, factor = number_for_gpu(
        problem.temperature, problem.temperature_factor, torch.float32
    )
    # The addresses hold only as long as these do.
    inputs, results = problem.inputs(), problem.empty_results()
    pointers = (
        DTYPES[problem.embedding.dtype],
        len(problem.prompts),
        *problem.embedding.shape,
        problem.top_k,
        *addresses(inputs),
        factor,
        *addresses([temperature]),
        problem.detach_targets,
        *addresses(results),
    )
    with torch.cuda.device(device):
        size = extension().perplexity_cuda_workspace(*pointers)
        if not size:
            return perplexity_in_pytorch(*arguments)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
        extension().perplexity_cuda(*pointers, workspace.data_ptr(), stream)
    return results


def perplexity_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return Problem(*arguments).empty_results()


@torch.no_grad()
def perplexity_in_pytorch(*arguments: Any) -> tuple[Tensor, ...]:
    """The op where no kernel serves: a few rows at a time, so that [M, V] is never held."""
    problem = Problem(*arguments)
    dtype, results = problem.dtype, problem.empty_results()
    table = problem.embedding.to(dtype)
    if problem.inverse_norms is None:
        scale = reference.inverse_norm(table)
    else:
        scale = problem.inverse_norms.to(dtype)
    temperature = problem.temperature_factor
    if problem.temperature is not None:
        temperature = problem.temperature.to(dtype) * temperature
    with reference.without_autocast(table):
        for start in range(0, len(problem.prompts), ROWS_PER_CHUNK):
            rows = slice(start, start + ROWS_PER_CHUNK)
            solve_rows(
                problem.prompts[rows].to(dtype),
                problem.hidden[rows].to(dtype),
                table,
                problem.vocabulary,
                scale,
                temperature,
                problem.top_k,
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
    if vocabulary is None:
        poisoned = reference.poison(all_cosines, all_logits)
    else:
        counting = (x.masked_fill(~vocabulary, 0) for x in (all_cosines, all_logits))
        poisoned = reference.poison(*counting)
        all_cosines = all_cosines.masked_fill(~vocabulary, -torch.inf)
        all_logits = all_logits.masked_fill(~vocabulary, -torch.inf)
    words = reference.smallest_index_topk(all_cosines, top_k)
    logits = all_logits.gather(1, words) + poisoned
    log_normaliser = all_logits.logsumexp(1, keepdim=True)
    cosines = all_cosines.gather(1, words) + poisoned
    log_labels = (cosines / temperature).log_softmax(1)
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
        expected = (all_logits - log_normaliser).exp() @ table + poisoned
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
torch.library.register_autograd(
    "vlfast::perplexity", Perplexity.backward, setup_context=remember_gradients, lib=LIBRARY
)
