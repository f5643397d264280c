"""A CoOp-style text encoder that computes only what counts: what all classes share once, and the
rest of each class up to EOT."""

from __future__ import annotations

import sys
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlfast.clip.block import finish_block, interference, project_qkv, why_block_whole
from vlfast.clip.feature_cache import FeatureCache
from vlfast.dropin.assembled import ImagePrompts, LearnedPrompts, Parts
from vlfast.dropin.causal_mask import MaskReader
from vlfast.dropin.deep_prompts import deep_prompts
from vlfast.dropin.packed_prompts import Packing
from vlfast.dropin.stand_in import StandIn, as_tensors
from vlfast.dropin.swap import is_replica
from vlfast.ops import prefix_attention

_KEPT_PACKINGS = 16


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


class Reading(NamedTuple):
    """How a codebase's forward is read.

    share: whether classes may share more than what no gradient tells apart. half_deep: whether deep
    prompts go through fp16, as [MaPLe] clip/model.py has them.
    """

    share: bool = True
    half_deep: bool = True


class Ends(NamedTuple):
    """Where EOT is in each class: int64 [C] on the CPU, and as what a dictionary can hold."""

    positions: Tensor
    key: bytes
    first: int


@dataclass
class EncoderState:
    """What an accelerated text encoder knows beside its weights.

    learner: the module that assembles its prompts, or None where none was found. last: by device,
    for the perplexity.
    """

    learner: nn.Module | None
    reading: Reading = field(default_factory=Reading)
    last: dict[torch.device, TrainingCall] = field(default_factory=dict)
    cache: FeatureCache = field(default_factory=FeatureCache)
    masks: MaskReader = field(default_factory=MaskReader)
    packings: OrderedDict[tuple[Any, ...], Packing] = field(default_factory=OrderedDict)
    read_tokens: tuple[weakref.ref[Tensor], int, Ends] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"learner": self.learner, "reading": self.reading}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def ends(self, tokenized: Tensor) -> Ends:
        """Of tokens [C, L]; EOT has the largest number."""
        version = None if tokenized.is_inference() else tokenized._version
        found = self.read_tokens
        if found is not None and found[0]() is tokenized and found[1] == version is not None:
            return found[2]
        positions = tokenized.argmax(dim=-1).cpu()
        ends = Ends(positions, positions.numpy().tobytes(), int(positions.min()))
        self.read_tokens = (weakref.ref(tokenized), version, ends)
        return ends

    def packing(
        self, ends: Ends, length: int, *, shared: int, images: int, device: torch.device
    ) -> Packing:
        """The same for the same places; few are kept, since selections of classes may be new at
        every step."""
        key = (ends.key, length, shared, images, device)
        found = self.packings.pop(key, None)
        if found is None:
            found = Packing.of(ends.positions, length, shared=shared, images=images, device=device)
        self.packings[key] = found
        while len(self.packings) > _KEPT_PACKINGS:
            try:
                self.packings.popitem(last=False)
            except KeyError:
                # Another replica's thread was first.
                break
        return found

    def packing_of(self, prompts: Tensor, ends: Ends, reading: Reading, kind: Hashable) -> Packing:
        """For prompts [C, L, d] of which only the values are known."""
        key = (kind, ends.key, prompts.shape[1], reading.share, prompts.device)
        known = self.packings.get(key)
        # Values are compared at every call on a CPU; a GPU would have to be waited for, in training
        # for nothing: there the gradients have shown what is shared.
        trusted = prompts.is_cuda and prompts.requires_grad and torch.is_grad_enabled()
        if known is not None and (trusted or _shares(prompts, known.shared)):
            return known
        most = min(ends.first, self._most_shared() if reading.share else 1)
        found = self.packing(
            ends, prompts.shape[1], shared=_common(prompts, most), images=1, device=prompts.device
        )
        self.packings[key] = found
        return found

    def _most_shared(self) -> int:
        """Behind it, a context vector of one class may only happen to hold what is a name's token
        in another."""
        context = getattr(self.learner, "ctx", None)
        position = getattr(self.learner, "class_token_position", "end")
        if not isinstance(context, Tensor) or position not in ("middle", "front"):
            return sys.maxsize
        return 1 + (context.shape[-2] // 2 if position == "middle" else 0)


def why_original(
    encoder: nn.Module, state: EncoderState, prompts: Any, tokenized: Any, rest: Sequence[Any]
) -> str | None:
    """Why this call has to take the codebase's own way, or None. Asked at each call, since hooks
    come and go."""
    if not isinstance(prompts, (Tensor, StandIn)) or len(prompts.shape) != 3:
        return "its prompts are no tensor [classes, tokens, width]"
    if not isinstance(tokenized, Tensor) or tuple(tokenized.shape) != tuple(prompts.shape[:2]):
        return "its tokens are no tensor [classes, tokens]"
    if 0 in tokenized.shape:
        return "it is called without classes"
    blocks = encoder.transformer.resblocks
    if rest and not _are_deep_prompts(blocks, rest):
        return "it is called with more than prompts, tokens and deep prompts"
    places = encoder.positional_embedding
    if not isinstance(places, Tensor) or places.ndim != 2 or len(places) != prompts.shape[1]:
        return "its positional_embedding does not fit its tokens"
    for module in encoder.modules():
        if module is not encoder and (found := interference(module)):
            name = next(name for name, m in encoder.named_modules() if m is module)
            return f"{name} {found}"
    for layer, block in enumerate(blocks):
        if found := why_block_whole(block):
            return f"transformer.resblocks[{layer}]{found}"
    return state.masks.why_not_causal(encoder, prompts.shape[1])


def _are_deep_prompts(blocks: Sequence[nn.Module], rest: Sequence[Any]) -> bool:
    if len(rest) != 1 or not all(hasattr(block, "compound_prompt_nctx") for block in blocks):
        return False
    listed = rest[0]
    return isinstance(listed, (list, tuple, nn.ParameterList)) and all(
        isinstance(vectors, Tensor) and vectors.ndim == 2 for vectors in listed
    )


def encode(
    encoder: nn.Module,
    state: EncoderState,
    prompts: Any,
    tokenized: Tensor,
    rest: Sequence[Any],
    reading: Reading,
    kind: Hashable = None,
) -> Tensor:
    """Features [C, D], not normalised. kind: whose prompts these are, where a GPU is not asked for
    their values."""
    ends = state.ends(tokenized)
    device, length = prompts.device, prompts.shape[1]

    def encode_parts(parts: Parts, shared: int) -> Tensor:
        packing = state.packing(ends, length, shared=shared, images=parts.images, device=device)
        features = _run(encoder, state, packing, parts.rows(packing), tokenized, rest, reading)
        return features.unflatten(0, (parts.images, -1))

    if isinstance(prompts, ImagePrompts) and not rest and reading.share:
        batch = prompts.batch
        if shared := batch.parts.shared(ends.first):
            step = len(batch)
            if not torch.is_grad_enabled():
                # No more rows at a time than the codebase's own way has for one image.
                rows = shared + int((ends.positions + 1 - shared).sum())
                step = max(1, prompts.shape[0] * length // rows)
            key = (encoder, ends.key, *_mode(device))
            return batch.features(
                prompts.image, step, key, lambda parts: encode_parts(parts, shared)
            )
    if isinstance(prompts, LearnedPrompts) and reading.share:
        shared = prompts.parts.shared(ends.first)
        if shared:
            return encode_parts(prompts.parts, shared)[0]
    prompts = as_tensors(prompts)
    packing = state.packing_of(prompts, ends, reading, kind)
    flat = prompts.flatten(0, 1)
    rows = torch.cat([flat[: packing.shared], flat.index_select(0, packing.runs)])
    return _run(encoder, state, packing, rows, tokenized, rest, reading)


def _run(
    encoder: nn.Module,
    state: EncoderState,
    packing: Packing,
    rows: Tensor,
    tokenized: Tensor,
    rest: Sequence[Any],
    reading: Reading,
) -> Tensor:
    deep = deep_prompts(encoder.transformer.resblocks, rest, reading.half_deep)
    given = [rows, *(v for v in deep if v is not None)]
    # Replicas live for one call, and autograd reaches through them to the parameters.
    learns = is_replica(encoder) or any(
        t.requires_grad for tensors in (given, encoder.parameters()) for t in tensors
    )
    if learns and torch.is_grad_enabled():
        state.last.pop(rows.device, None)
        features, x, attended = _through(encoder, packing, rows, deep)
        autocast = _mode(rows.device)[1]
        state.last[rows.device] = TrainingCall(
            encoder, tokenized, packing, rows, x, attended, autocast
        )
        return features
    if is_replica(encoder):
        return _through(encoder, packing, rows, deep)[0]
    features = state.cache.get(
        encoder.modules(),
        lambda: _through(encoder, packing, rows, deep)[0],
        [packing.positions, packing.eot_rows, *given],
    )
    # A caller may write to what it gets, and keep it.
    return features.clone()


def _through(
    encoder: nn.Module, packing: Packing, rows: Tensor, deep: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of the packed rows, the last block's input and what its rows attended to."""
    dtype = getattr(encoder, "dtype", None)
    blocks = encoder.transformer.resblocks
    places = encoder.positional_embedding.index_select(0, packing.positions)
    x = rows + (places if dtype is None else places.type(dtype))
    for layer, block in enumerate(blocks):
        if deep[layer] is not None:
            where, which = packing.deep_rows(len(deep[layer]))
            x = x.index_copy(0, where, deep[layer].to(x.dtype).index_select(0, which))
        attended = prefix_attention(project_qkv(block.attn, block.ln_1(x)), packing.packed)
        if layer < len(blocks) - 1:
            x = finish_block(block, x, attended)

    features = final_states(encoder, x, attended, packing.eot_rows)
    projection = encoder.text_projection
    if isinstance(projection, nn.Module):
        features = projection(features)
    elif projection is not None:
        features = features @ projection
    return features, x, attended


def final_states(encoder: nn.Module, x: Tensor, attended: Tensor, where: Tensor) -> Tensor:
    """What the last block and the final layer norm make of the rows ``where``, int64 [N]: [N, d].

    x: [M, d], the last block's input. attended: [M, H, E].
    """
    dtype = getattr(encoder, "dtype", None)
    out = finish_block(encoder.transformer.resblocks[-1], x[where], attended[where])
    out = encoder.ln_final(out)
    return out if dtype is None else out.type(dtype)


def _mode(device: torch.device) -> tuple[bool, torch.dtype | None]:
    """What else decides a result: autograd and autocast."""
    autocast = torch.is_autocast_enabled(device.type)
    return torch.is_grad_enabled(), torch.get_autocast_dtype(device.type) if autocast else None


@torch.no_grad()
def _common(prompts: Tensor, most: int) -> int:
    """How many positions, at most ``most``, hold the same in all classes."""
    same = (prompts[:, :most] == prompts[:1, :most]).all(-1).all(0)
    return int(same.long().cumprod(0).sum())


@torch.no_grad()
def _shares(prompts: Tensor, count: int) -> bool:
    return bool((prompts[:, :count] == prompts[:1, :count]).all())
