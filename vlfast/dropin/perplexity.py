"""PLPP's term for codebases whose text encoder is accelerated."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from vlfast.dropin.accelerate import AcceleratedTextEncoder
from vlfast.dropin.context_rows import context_rows
from vlfast.dropin.swap import STATE
from vlfast.dropin.text_encoder import EncoderState, final_states
from vlfast.ops import plpp_loss

# By embedding, of which values its rows had which inverse norms.
_norms = WeakTensorKeyDictionary()


def perplexity(
    model: nn.Module,
    token_embedding: nn.Embedding | Tensor,
    *,
    top_k: int = 10,
    inverse_weight: float = 1.0,
    temperature: float = 1.0,
    detach_targets: bool = True,
    vocabulary: Tensor | None = None,
) -> Tensor:
    """PLPP's loss of the context vectors in the last training call of an accelerated text encoder.

    Each context vector is compared with the state that predicts it: once where all classes share
    the context behind SOS, per class and then the mean where the name stands in the middle or in
    front or where contexts are class-specific, per image and then the mean in CoCoOp. Of deep
    prompts the vectors at the input count, and the states are those that the deeper ones have
    changed. Ask for it before the optimiser's step, and add it to the loss with a weight:

        loss = F.cross_entropy(output, label) + 0.1 * vlfast.dropin.perplexity(model, embedding)

    model: accelerated, plain or in nn.DataParallel; it holds one accelerated text encoder.
    token_embedding: the CLIP's, an nn.Embedding or its weight [V, d], where the prompts are; it
    gets no gradient. top_k, inverse_weight, temperature, detach_targets, vocabulary: see
    ``vlfast.plpp_loss``.

    Returns the loss in nats, 0-d, fp32, or fp64 for a model in fp64.

    Raises TypeError for a model or an embedding of another type, ValueError for a model that is
    not accelerated or holds several text encoders, where no training call went the fast way, and
    for an embedding of another width or on another device.

    Source: PLPP, arXiv 2412.15277, as ``vlfast.plpp_loss`` has it.
    """
    embedding = _weight(token_embedding)
    state = _encoder_state(model)
    if not state.last:
        raise ValueError(
            "perplexity: the text encoder has not been called with autograd yet, or took the "
            "codebase's own way (print the report of accelerate, it says why)"
        )
    call = state.last.get(embedding.device)
    if call is None:
        raise ValueError(
            f"perplexity: token_embedding is on {embedding.device}, the prompts are on "
            f"{', '.join(map(str, state.last))}"
        )
    if embedding.shape[1] != call.rows.shape[1]:
        raise ValueError(
            f"perplexity: token_embedding has {embedding.shape[1]} numbers a word, the prompts "
            f"have {call.rows.shape[1]}"
        )
    where = context_rows(state.learner, call)
    # Asked after the forward, outside of its autocast.
    with torch.autocast(
        embedding.device.type, dtype=call.autocast, enabled=call.autocast is not None
    ):
        states = final_states(call.encoder, call.x, call.attended, where.states)
    losses = plpp_loss(
        call.rows[where.vectors],
        states,
        embedding.detach(),
        top_k=top_k,
        inverse_weight=inverse_weight,
        temperature=temperature,
        detach_targets=detach_targets,
        vocabulary=vocabulary,
        inverse_norms=_inverse_norms(embedding),
        reduction="none",
    )
    return losses.mean() if where.weights is None else losses @ where.weights.to(losses)


def _weight(token_embedding: nn.Embedding | Tensor) -> Tensor:
    weight = token_embedding
    if isinstance(weight, nn.Embedding):
        weight = weight.weight
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise TypeError(
            "perplexity: token_embedding: expected an nn.Embedding or its weight [V, d], got "
            + (
                f"{weight.dtype} {list(weight.shape)}"
                if isinstance(weight, Tensor)
                else repr(weight)
            )
        )
    return weight


def _encoder_state(model: nn.Module) -> EncoderState:
    if not isinstance(model, nn.Module):
        raise TypeError(f"perplexity: model: expected an nn.Module, got {type(model).__name__}")
    found = {n: m for n, m in model.named_modules() if isinstance(m, AcceleratedTextEncoder)}
    if not found:
        raise ValueError(
            "perplexity: the model holds no accelerated text encoder; call "
            "vlfast.accelerate(model) first"
        )
    if len(found) > 1:
        raise ValueError(
            f"perplexity: the model holds several accelerated text encoders, {', '.join(found)}; "
            "hand over the part with the one that learns"
        )
    (encoder,) = found.values()
    return encoder.__dict__[STATE].encoder


def _inverse_norms(embedding: Tensor) -> Tensor:
    # A parameter that is moved, cast or given other .data stays the same object, at the same count
    # of writes.
    of = None
    if not embedding.is_inference():
        storage = StorageWeakRef(embedding.untyped_storage())
        of = (storage, embedding.dtype, embedding._version)
    kept = _norms.get(embedding)
    if of is None or kept is None or kept[0] != of:
        dtype = torch.float64 if embedding.dtype == torch.float64 else torch.float32
        norms = embedding.detach().to(dtype).norm(dim=1).clamp_min(1e-12).reciprocal()
        _norms[embedding] = kept = (of, norms)
    return kept[1]
