"""Every op in plain PyTorch: its definition, and what the kernels are tested against.

All are batched, differentiable and free of host synchronisation. They compute in fp64 where an
input is fp64 and in fp32 otherwise, under autocast too. The checks are in the public functions.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .packed_runs import PackedRuns

NORM_FLOOR = 1e-12
# Further apart than this, two probabilities are subtracted as they are: nothing cancels, while p
# may underflow and exp of the log-ratio overflow, so that their product would lose q.
LOG_RATIO_LIMIT = 20.0


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any of the tensors is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """A context in which matrix products keep the dtype of their inputs."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def in_dtype(value: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """A 0-d tensor in this dtype; a number as a float."""
    return value.to(dtype) if isinstance(value, Tensor) else float(value)


def poison(*scores: Tensor) -> Tensor:
    """NaN for each row that has a score which is not finite, else 0: [M, 1]. Without gradient.

    Among such scores no order is right, so that what is selected by them is no result.
    """
    return sum((0 * x.detach()).sum(1, keepdim=True) for x in scores)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, for log-probabilities that are finite.

    Summed as p (d + expm1(-d)) with d = log p - log q, which adds sum(q) - sum(p) = 0 to the
    textbook p d: then no term is negative, and none cancels where p and q nearly agree.
    """
    log_ratio = log_p - log_q
    p, q = log_p.exp(), log_q.exp()
    safe = log_ratio > -LOG_RATIO_LIMIT
    near = log_ratio.where(safe, 0.0)
    return (
        p * torch.where(safe, near + torch.expm1(-near), log_ratio - 1) + q.where(~safe, 0)
    ).sum(-1)


def symmetric_kl(
    student: Tensor,
    teacher: Tensor,
    student_scale: Tensor | float = 1.0,
    teacher_scale: Tensor | float = 1.0,
    temperature: Tensor | float = 1.0,
    forward_weight: Tensor | float = 0.5,
    reverse_weight: Tensor | float = 0.5,
    index: Tensor | None = None,
) -> Tensor:
    """forward_weight * KL(t || s) + reverse_weight * KL(s || t) of each row: [B].

    student [B, K]; teacher [B, K], or [B, N] with ``index`` int64 [K], its columns to take: one out
    of range makes every row NaN. s and t are the softmax of each side times its scale over
    ``temperature``. Logits are finite.
    """
    dtype = accumulation_dtype(student, teacher)
    if index is not None:
        inside = (index >= 0) & (index < teacher.shape[1])
        teacher = teacher.index_select(1, index.clamp(0, teacher.shape[1] - 1))
        teacher = teacher.where(inside, torch.nan)
    temperature = in_dtype(temperature, dtype)
    student = student.to(dtype) * in_dtype(student_scale, dtype) / temperature
    teacher = teacher.to(dtype) * in_dtype(teacher_scale, dtype) / temperature
    log_student, log_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    forward = divergence(log_teacher, log_student)
    reverse = divergence(log_student, log_teacher)
    return in_dtype(forward_weight, dtype) * forward + in_dtype(reverse_weight, dtype) * reverse


def smallest_index_topk(scores: Tensor, top_k: int) -> Tensor:
    """The ``top_k`` largest of each row, largest first, int64 [M, top_k]. Ties: the smaller index.

    torch.topk leaves open which of several equal scores it takes, hence the repair at its edge.
    """
    columns = scores.shape[1]
    values, words = scores.topk(top_k, dim=1)
    edge = values[:, -1:]
    above = values > edge
    position = torch.arange(columns, 0, -1, dtype=torch.int32, device=scores.device)
    at_edge = torch.where(scores == edge, position, 0).topk(top_k, dim=1).values.long()
    slot = torch.arange(top_k, device=scores.device) - above.sum(1, keepdim=True)
    # A row with NaN has no edge: the clamp keeps its words in range, and its scores stay NaN.
    tied = (columns - at_edge.gather(1, slot.clamp(min=0))).clamp(max=columns - 1)
    words = torch.where(above, words, tied).sort(dim=1).values
    order = scores.gather(1, words).sort(dim=1, descending=True, stable=True).indices
    return words.gather(1, order)


def inverse_norm(rows: Tensor) -> Tensor:
    """1 / the Euclidean norm of each row, the norm clamped at 1e-12."""
    return rows.norm(dim=-1).clamp_min(NORM_FLOOR).reciprocal()


def unit_rows(rows: Tensor) -> Tensor:
    """Each row over its norm. A zero row stays zero, with gradient zero rather than 1e12."""
    norms = rows.norm(dim=-1, keepdim=True)
    return torch.where(norms <= NORM_FLOOR, 0, rows / norms.clamp_min(NORM_FLOOR))


def perplexity_from_scores(
    cosines: Tensor,
    logits: Tensor,
    log_normaliser: Tensor,
    temperature: Tensor | float,
    detach_targets: bool,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The perplexity term and the inverted term, [M] each, from the top-k words of each row.

    cosines, logits: [M, k]. log_normaliser: [M], over the whole vocabulary. counted: bool [M, k],
    False at words that are there only to fill a row whose vocabulary has fewer than k.
    """
    similarities = cosines / temperature
    if counted is not None:
        similarities = similarities.masked_fill(~counted, -torch.inf)
        logits = logits.masked_fill(~counted, -torch.inf)
    log_labels = similarities.log_softmax(1)
    log_renormalised = logits.log_softmax(1)
    log_probabilities = logits - log_normaliser[:, None]
    if counted is not None:
        log_labels, log_renormalised, log_probabilities = (
            x.masked_fill(~counted, 0) for x in (log_labels, log_renormalised, log_probabilities)
        )
    labels, renormalised = log_labels.exp(), log_renormalised.exp()
    if counted is not None:
        labels, renormalised = labels * counted, renormalised * counted
    if detach_targets:
        labels, renormalised = labels.detach(), renormalised.detach()
    return -(labels * log_probabilities).sum(1), -(renormalised * log_labels).sum(1)


def perplexity_terms(
    prompts: Tensor,
    hidden: Tensor,
    embedding: Tensor,
    top_k: int = 10,
    temperature: Tensor | float = 1.0,
    detach_targets: bool = True,
    vocabulary: Tensor | None = None,
    inverse_norms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The perplexity and the inverted-perplexity term of each row: ([M], [M]).

    prompts, hidden [M, d]; embedding [V, d]; vocabulary bool [V]; inverse_norms [V].
    """
    dtype = accumulation_dtype(prompts, hidden, embedding)
    prompts, hidden, embedding = prompts.to(dtype), hidden.to(dtype), embedding.to(dtype)
    scale = inverse_norm(embedding) if inverse_norms is None else inverse_norms.to(dtype)
    with without_autocast(embedding):
        cosines = unit_rows(prompts) @ embedding.T * scale
        logits = hidden @ embedding.T
    if vocabulary is None:
        poisoned = poison(cosines, logits)
    else:
        poisoned = poison(*(x.masked_fill(~vocabulary, 0) for x in (cosines, logits)))
        cosines = cosines.masked_fill(~vocabulary, -torch.inf)
        logits = logits.masked_fill(~vocabulary, -torch.inf)
    words = smallest_index_topk(cosines.detach(), top_k)
    return perplexity_from_scores(
        cosines.gather(1, words) + poisoned,
        logits.gather(1, words) + poisoned,
        logits.logsumexp(1),
        in_dtype(temperature, dtype),
        detach_targets,
        None if vocabulary is None else vocabulary[words],
    )


def gated_mixture(
    image_features: Tensor,
    gate: Tensor,
    hard_text_features: Tensor,
    student_logits: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
    temperature: Tensor | float = 1.0,
    top_k: int = 2,
) -> tuple[Tensor, Tensor]:
    """The distillation and the selection loss of each image: ([B], [B]).

    image_features [B, d]; gate [d, H]; hard_text_features [H, C, d]; student_logits [B, C];
    labels int64 [B]. A label out of range gives NaN in the selection loss of its image.
    """
    dtype = accumulation_dtype(image_features, gate, hard_text_features, student_logits)
    image_features, gate, hard_text_features, student_logits = (
        x.to(dtype) for x in (image_features, gate, hard_text_features, student_logits)
    )
    temperature = in_dtype(temperature, dtype)
    with without_autocast(gate):
        gate_logits = image_features @ gate
        teachers = torch.einsum("bd,hcd->bhc", image_features, hard_text_features)
    selected = smallest_index_topk(gate_logits.detach(), top_k)
    weights = (gate_logits.gather(1, selected) + poison(gate_logits)).softmax(1)
    classes = teachers.shape[2]
    teachers = teachers.gather(1, selected[:, :, None].expand(-1, -1, classes))
    teachers = teachers * in_dtype(logit_scale, dtype)
    log_student = (student_logits / temperature).log_softmax(-1)
    divergences = divergence((teachers / temperature).log_softmax(-1), log_student[:, None])
    in_range = labels.clamp(0, classes - 1)
    label_of_teacher = in_range[:, None, None].expand(-1, top_k, 1)
    cross_entropies = -teachers.log_softmax(-1).gather(2, label_of_teacher)[:, :, 0]
    cross_entropies = cross_entropies.where((labels == in_range)[:, None], torch.nan)
    distillation = temperature**2 * (weights * divergences).sum(1)
    return distillation, (weights * cross_entropies).sum(1)


def prefix_attention(qkv: Tensor, runs: PackedRuns, scale: float) -> Tensor:
    """Attention of packed runs to their prefix and, causally, to themselves: [M, H, E].

    qkv: [M, 3, H, E], the queries, keys and values of M tokens. Runs are padded to the longest, and
    what is not there is masked.
    """
    wide = qkv.to(accumulation_dtype(qkv))
    prefixes, suffixes = runs.prefixes, len(runs) - runs.prefixes
    of_prefix, of_suffix = (
        _PaddedRuns.of(runs, 0, prefixes, runs.longest_prefix),
        _PaddedRuns.of(runs, prefixes, suffixes, runs.longest),
    )
    with without_autocast(qkv):
        query, key, value = of_prefix.gather(wide)
        scores = torch.einsum("nqhe,nkhe->nhqk", query, key) * scale
        weights = scores.masked_fill(~of_prefix.causal()[:, None], -torch.inf).softmax(-1)
        attended = [torch.einsum("nhqk,nkhe->nqhe", weights, value).flatten(0, 1)]

        # [prefixes, suffixes of each, longest, H, E], beside [prefixes, longest_prefix, H, E]
        shape = (prefixes, -1) if prefixes else (suffixes, 1)
        query, own_key, own_value = (x.unflatten(0, shape) for x in of_suffix.gather(wide))
        own = torch.einsum("nrqhe,nrkhe->nrhqk", query, own_key) * scale
        own = own.masked_fill(~of_suffix.causal().unflatten(0, shape)[:, :, None], -torch.inf)
        if prefixes:
            seen = torch.einsum("nrqhe,nkhe->nrhqk", query, key) * scale
            seen = seen.masked_fill(~of_prefix.real[:, None, None, None], -torch.inf)
            own = torch.cat([seen, own], dim=-1)
        weights = own.softmax(-1)
        split = runs.longest_prefix if prefixes else 0
        result = torch.einsum("nrhqk,nrkhe->nrqhe", weights[..., split:], own_value)
        if prefixes:
            result = result + torch.einsum("nrhqk,nkhe->nrqhe", weights[..., :split], value)
        attended.append(result.flatten(0, 2))
    return torch.cat(attended)[_padded_place_of_rows(runs)].to(qkv.dtype)


class _PaddedRuns(NamedTuple):
    """Some of the runs, padded to ``longest`` rows. rows: int64 [R, longest], real: bool."""

    rows: Tensor
    real: Tensor

    @classmethod
    def of(cls, runs: PackedRuns, first: int, count: int, longest: int) -> _PaddedRuns:
        offsets = runs.offsets[first : first + count + 1].long()
        rows = offsets[:-1, None] + torch.arange(longest, device=offsets.device)
        return cls(rows, rows < offsets[1:, None])

    def gather(self, qkv: Tensor) -> tuple[Tensor, ...]:
        padded = qkv[self.rows.where(self.real, 0)]
        return padded.where(self.real[:, :, None, None, None], 0).unbind(2)

    def causal(self) -> Tensor:
        """bool [R, longest, longest]; a row that is not real sees itself, so that it is not NaN."""
        longest = self.rows.shape[1]
        lower = torch.ones(longest, longest, dtype=torch.bool, device=self.rows.device).tril()
        return lower & (self.real[:, None] | ~self.real[:, :, None])


def _padded_place_of_rows(runs: PackedRuns) -> Tensor:
    """Where each packed row stands among the rows of all padded prefixes, then suffixes: [M]."""
    offsets = runs.offsets.long()
    lengths = offsets[1:] - offsets[:-1]
    run = torch.arange(len(runs), device=offsets.device)
    first = (run * runs.longest_prefix).where(
        run < runs.prefixes,
        runs.prefixes * runs.longest_prefix + (run - runs.prefixes) * runs.longest,
    )
    shift = (first - offsets[:-1]).repeat_interleave(lengths, output_size=runs.rows.shape[1])
    return torch.arange(len(shift), device=shift.device) + shift
