"""The perplexity regulariser of prompts against a frozen vocabulary, and its inverted twin.

Method: PLPP, arXiv 2412.15277.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks, reference
from .backends import reference_must_serve

REDUCTIONS = ("none", "mean", "sum")
# Scores over the vocabulary are held for this many rows at a time, 13 MB each at V = 49408 in fp32.
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
        embedding: [V, d] floating, the frozen token embedding.
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
    cosines. A value that is not finite in prompts or hidden gives NaN in its own row alone. What
    is kept for the backward grows with M * d, not with M * V. Functorch transforms are served by
    the reference, and so are second derivatives under ``vlfast.ops.backends.reference_only()``.

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
    dtype = reference.accumulation_dtype(prompts, hidden, embedding)
    words, cosines, logits, log_normaliser = VocabularyScores.apply(
        reference.unit_rows(prompts.to(dtype)),
        hidden.to(dtype),
        embedding,
        top_k,
        vocabulary,
        inverse_norms,
    )
    return reference.perplexity_from_scores(
        cosines,
        logits,
        log_normaliser,
        reference.in_dtype(temperature, dtype),
        detach_targets,
        None if vocabulary is None else vocabulary[words],
    )


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


class VocabularyScores(torch.autograd.Function):
    """The top-k words of each row, their cosines and logits, and the log-normaliser over V.

    Keeps [M, d] and [M, k] for the backward, never [M, V]: the gradient of the log-normaliser is
    the expected embedding, which the forward has at hand. Gradients go to units and hidden.
    """

    @staticmethod
    def forward(
        ctx: Any,
        units: Tensor,
        hidden: Tensor,
        embedding: Tensor,
        top_k: int,
        vocabulary: Tensor | None,
        inverse_norms: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        table = embedding.to(hidden.dtype)
        scale = reference.inverse_norm(table) if inverse_norms is None else inverse_norms
        scale = scale.to(hidden.dtype)
        needs_expected = ctx.needs_input_grad[1]
        chunks = []
        with reference.without_autocast(table):
            for start in range(0, len(units), ROWS_PER_CHUNK):
                rows = slice(start, start + ROWS_PER_CHUNK)
                chunks.append(
                    score_rows(
                        units[rows], hidden[rows], table, scale, top_k, vocabulary, needs_expected
                    )
                )
        words, cosines, logits, log_normaliser, expected = (
            torch.cat(parts) for parts in zip(*chunks, strict=True)
        )
        ctx.mark_non_differentiable(words)
        ctx.save_for_backward(words, scale[words], expected, embedding)
        return words, cosines, logits, log_normaliser

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _: Any, of_cosines: Tensor, of_logits: Tensor, of_normaliser: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        words, scale, expected, embedding = ctx.saved_tensors
        for_units = for_hidden = None
        if ctx.needs_input_grad[0]:
            for_units = weighted_embeddings(of_cosines * scale, words, embedding)
        if ctx.needs_input_grad[1]:
            for_hidden = weighted_embeddings(of_logits, words, embedding)
            for_hidden = for_hidden + of_normaliser[:, None] * expected
        return for_units, for_hidden, None, None, None, None


def score_rows(
    units: Tensor,
    hidden: Tensor,
    table: Tensor,
    scale: Tensor,
    top_k: int,
    vocabulary: Tensor | None,
    needs_expected: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Words, cosines, logits [m, k], log-normaliser [m], expected embedding [m, d] or [m, 0]."""
    cosines = units @ table.T * scale
    if vocabulary is not None:
        cosines = cosines.masked_fill(~vocabulary, -torch.inf)
    words = reference.smallest_index_topk(cosines, top_k)
    cosines = cosines.gather(1, words)
    all_logits = hidden @ table.T
    if vocabulary is not None:
        all_logits = all_logits.masked_fill(~vocabulary, -torch.inf)
    logits = all_logits.gather(1, words)
    log_normaliser = all_logits.logsumexp(1)
    if needs_expected:
        expected = (all_logits - log_normaliser[:, None]).exp() @ table
    else:
        expected = hidden.new_empty(len(hidden), 0)
    return words, cosines, logits, log_normaliser, expected


def weighted_embeddings(weights: Tensor, words: Tensor, embedding: Tensor) -> Tensor:
    """The sum over k of weights[:, k] * embedding[words[:, k]], in the dtype of weights: [M, d]."""
    gathers = words.shape[1] <= GATHERED_TOP_K
    table = embedding if gathers else embedding.to(weights.dtype)
    chunks = []
    with reference.without_autocast(embedding):
        for start in range(0, len(words), ROWS_PER_CHUNK):
            rows = slice(start, start + ROWS_PER_CHUNK)
            chosen, factors = words[rows], weights[rows]
            if gathers:
                chunks.append((factors[:, None] @ table[chosen].to(factors.dtype))[:, 0])
            else:
                spread = factors.new_zeros(len(chosen), len(table)).scatter(1, chosen, factors)
                chunks.append(spread @ table)
    return torch.cat(chunks)
