"""A CoOp-style text encoder that computes only what counts: what all classes share once, and the
rest of each class up to EOT."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlfast.clip.block import finish_block, interference, project_qkv, why_block_whole
from vlfast.clip.feature_cache import FeatureCache
from vlfast.dropin.conditional import BatchPrompts, ImagePrompts
from vlfast.dropin.deep_prompts import deep_prompts
from vlfast.dropin.packed_prompts import Packing
from vlfast.ops import prefix_attention

_KEPT_PACKINGS = 8


class TrainingCall(NamedTuple):
    """A call with autograd, as far as the states of its context need it, should someone ask.

    tokenized: int64 [C, L]. rows: [M, d], the packed prompts. x: [M, d], the last block's input;
    attended: [M, H, E]. autocast: the dtype that it ran in, or None.
    """

    encoder: nn.Module
    tokenized: Tensor
    packing: Packing
    rows: Tensor
    x: Tensor
    attended: Tensor
    autocast: torch.dtype | None


@dataclass
class EncoderState:
    """What an accelerated text encoder knows beside its weights.

    learner: the module that assembles its prompts, or None where none was found. unchecked: what is
    still to be compared with the original, "features" and "gradients". share: whether classes may
    share more than SOS. half_deep: whether deep prompts go through fp16, as [MaPLe] clip/model.py
    has them. last: by device, for the perplexity.
    """

    learner: nn.Module | None
    unchecked: set[str]
    share: bool = True
    half_deep: bool = True
    last: dict[torch.device, TrainingCall] = field(default_factory=dict)
    cache: FeatureCache = field(default_factory=FeatureCache)
    packings: OrderedDict[tuple[Any, ...], Packing] = field(default_factory=OrderedDict)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("last", "cache", "packings")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, last={}, cache=FeatureCache(), packings=OrderedDict())

    @property
    def context_length(self) -> int:
        """How many context vectors all classes of an image share; 0 where they do not."""
        context = getattr(self.learner, "ctx", None)
        if not self.share or not isinstance(context, Tensor) or context.ndim != 2:
            return 0
        return len(context)

    def packing(self, prompts: Tensor, ends: Tensor, images: int) -> Packing:
        """For prompts [C, L, d] of one image, the same for all; ends: where EOT is, int64 [C]."""
        ends = ends.cpu()
        n = self.context_length
        key = (ends.numpy().tobytes(), prompts.shape[1], images, n, str(prompts.device))
        found = self.packings.get(key)
        # Values are compared at every call on a CPU; a GPU would have to be waited for.
        if found is not None and (prompts.is_cuda or _shares(prompts, found.shared)):
            return found
        shared = _common(prompts, min(int(ends.min()), self._most_shared(n))) if n else 1
        found = Packing.of(
            ends, prompts.shape[1], shared=shared, n_ctx=n, images=images, device=prompts.device
        )
        self.packings[key] = found
        while len(self.packings) > _KEPT_PACKINGS:
            self.packings.popitem(last=False)
        return found

    def _most_shared(self, n: int) -> int:
        """Behind it, a context vector of one class may only happen to hold what is a name's token
        in another."""
        position = getattr(self.learner, "class_token_position", "end")
        before = {"middle": n // 2, "front": 0}
        return 1 + before[position] if position in before else sys.maxsize


def why_original(encoder: nn.Module, prompts: Any, tokenized: Any) -> str | None:
    """Why this call has to take the codebase's own way, or None. Asked at each call, since hooks
    come and go."""
    if not isinstance(prompts, (Tensor, ImagePrompts)) or len(prompts.shape) != 3:
        return "its prompts are no tensor [classes, tokens, width]"
    if not isinstance(tokenized, Tensor) or tuple(tokenized.shape) != tuple(prompts.shape[:2]):
        return "its tokens are no tensor [classes, tokens]"
    for module, name in ((encoder.transformer, "transformer"),):
        if found := interference(module):
            return f"{name} {found}"
    for layer, block in enumerate(encoder.transformer.resblocks):
        if found := why_block_whole(block):
            return f"transformer.resblocks[{layer}]{found}"
    return None


def encode(
    encoder: nn.Module, state: EncoderState, prompts: Any, tokenized: Tensor, rest: Sequence[Any]
) -> Tensor | None:
    """Features [C, D], not normalised, or None where deep prompts have no place of their own."""
    ends = tokenized.argmax(dim=-1)
    if isinstance(prompts, ImagePrompts):
        batch = prompts.batch
        features = batch.once(
            (id(encoder), ends.cpu().numpy().tobytes()),
            lambda: _encode_batch(encoder, state, batch, tokenized, ends, rest),
        )
        return None if features is None else features[prompts.image]
    packing = state.packing(prompts, ends, 1)
    flat = prompts.flatten(0, 1)
    prefix, runs = flat[: packing.shared], flat[packing.runs]
    return _run(encoder, state, packing, prefix, runs, tokenized, rest)


def _encode_batch(
    encoder: nn.Module,
    state: EncoderState,
    batch: BatchPrompts,
    tokenized: Tensor,
    ends: Tensor,
    rest: Sequence[Any],
) -> Tensor:
    """[B, C, D], or None."""
    first = batch.of_image(0)
    packing = state.packing(first, ends, len(batch))
    n = batch.context.shape[1]
    behind = first[0, 1 + n : packing.shared].expand(len(batch), -1, -1)
    start = batch.prefix[:1].expand(len(batch), -1, -1)
    prefix = torch.cat([start, batch.context, behind], dim=1)
    runs = first.flatten(0, 1)[packing.runs]
    features = _run(encoder, state, packing, prefix.flatten(0, 1), runs, tokenized, rest)
    return None if features is None else features.unflatten(0, (len(batch), -1))


def _run(
    encoder: nn.Module,
    state: EncoderState,
    packing: Packing,
    prefix: Tensor,
    runs: Tensor,
    tokenized: Tensor,
    rest: Sequence[Any],
) -> Tensor | None:
    blocks = encoder.transformer.resblocks
    deep = deep_prompts(blocks, rest, state.half_deep)
    if any(v is not None and len(v) != packing.n_ctx for v in deep):
        return None
    rows = torch.cat([prefix, runs.repeat(packing.images, 1)])
    learned = [rows, *(v for v in deep if v is not None), *encoder.parameters()]
    if torch.is_grad_enabled() and any(t.requires_grad for t in learned):
        state.last.pop(rows.device, None)
        features, x, attended = _through(encoder, packing, rows, deep)
        state.last[rows.device] = TrainingCall(
            encoder, tokenized, packing, rows, x, attended, _autocast_dtype(rows.device.type)
        )
        return features
    return state.cache.get(
        encoder.modules(),
        lambda: _through(encoder, packing, rows, deep)[0],
        [rows, packing.eot_rows, *(v for v in deep if v is not None)],
    )


def _through(
    encoder: nn.Module, packing: Packing, rows: Tensor, deep: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of the packed rows, the last block's input and what its rows attended to."""
    dtype = getattr(encoder, "dtype", rows.dtype)
    blocks = encoder.transformer.resblocks
    places = encoder.positional_embedding.index_select(0, packing.positions)
    x = rows + places.type(dtype)
    for layer, block in enumerate(blocks):
        if deep[layer] is not None:
            vectors = deep[layer].to(x.dtype).repeat(packing.images, 1)
            x = x.index_copy(0, packing.context_rows, vectors)
        attended = prefix_attention(project_qkv(block.attn, block.ln_1(x)), packing.packed)
        if layer < len(blocks) - 1:
            x = finish_block(block, x, attended)

    features = final_states(encoder, x, attended, packing.eot_rows)
    projection = encoder.text_projection
    features = projection(features) if isinstance(projection, nn.Module) else features @ projection
    return features, x, attended


def final_states(encoder: nn.Module, x: Tensor, attended: Tensor, where: Tensor) -> Tensor:
    """What the last block and the final layer norm make of the rows ``where``, int64 [N]: [N, d].

    x: [M, d], the last block's input. attended: [M, H, E].
    """
    dtype = getattr(encoder, "dtype", x.dtype)
    out = finish_block(encoder.transformer.resblocks[-1], x[where], attended[where])
    return encoder.ln_final(out).type(dtype)


def _autocast_dtype(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _common(prompts: Tensor, most: int) -> int:
    """How many positions, at most ``most``, hold the same in all classes; SOS always counts."""
    with torch.no_grad():
        same = (prompts[:, :most] == prompts[:1, :most]).all(-1).all(0)
        return max(1, int(same.long().cumprod(0).sum()))


def _shares(prompts: Tensor, count: int) -> bool:
    with torch.no_grad():
        return bool((prompts[:, :count] == prompts[:1, :count]).all())
