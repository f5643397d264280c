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
from torch.utils.weak import WeakTensorKeyDictionary

from vlfast.clip.block import finish_block, interference, project_qkv, why_block_whole
from vlfast.clip.feature_cache import FeatureCache
from vlfast.dropin.causal_mask import MaskReader
from vlfast.dropin.deep_prompts import deep_prompts
from vlfast.dropin.image_batch import image_batch, is_conditional
from vlfast.dropin.packed_prompts import Packing
from vlfast.dropin.swap import is_replica
from vlfast.ops import prefix_attention

_KEPT_PACKINGS = 16
_OF_BLOCKS = ("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2")


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
    for the perplexity. batches: features of the images that prompts were made for together, as long
    as those live.
    """

    learner: nn.Module | None
    reading: Reading = field(default_factory=Reading)
    last: dict[torch.device, TrainingCall] = field(default_factory=dict)
    cache: FeatureCache = field(default_factory=FeatureCache)
    masks: MaskReader = field(default_factory=MaskReader)
    packings: OrderedDict[tuple[Any, ...], Packing] = field(default_factory=OrderedDict)
    batches: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
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
        self._keep(key, found)
        return found

    def _keep(self, key: tuple[Any, ...], packing: Packing) -> None:
        self.packings[key] = packing
        while len(self.packings) > _KEPT_PACKINGS:
            try:
                self.packings.popitem(last=False)
            except KeyError:
                # Another replica's thread was first.
                break

    def packing_of(
        self, prompts: Tensor, ends: Ends, reading: Reading, kind: Hashable, whole: bool = False
    ) -> Packing:
        """For prompts [B, C, L, d] of B images, of which only the values are known. whole: whether
        each class's rows have to have their own gradients."""
        images, _, length, _ = prompts.shape
        if whole:
            return self.packing(ends, length, shared=0, images=images, device=prompts.device)
        key = (kind, ends.key, images, length, reading.share, prompts.device)
        known = self.packings.get(key)
        # Values are compared at every call on a CPU; a GPU would have to be waited for, in training
        # for nothing: there the gradients have shown what is shared.
        trusted = prompts.is_cuda and prompts.requires_grad and torch.is_grad_enabled()
        if known is not None and (trusted or _shares(prompts, known.shared)):
            return known
        most = min(ends.first, self._most_shared() if reading.share else 1)
        found = self.packing(
            ends, length, shared=_common(prompts, most), images=images, device=prompts.device
        )
        self._keep(key, found)
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
    if not isinstance(prompts, Tensor) or prompts.ndim != 3:
        return "its prompts are no tensor [classes, tokens, width]"
    if not isinstance(tokenized, Tensor) or tuple(tokenized.shape) != tuple(prompts.shape[:2]):
        return "its tokens are no tensor [classes, tokens]"
    if 0 in tokenized.shape:
        return "it is called without classes"
    blocks = encoder.transformer.resblocks
    if found := _more_parameters(encoder):
        return f"it holds {found}, which CLIP's text encoder has not"
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


def _more_parameters(encoder: nn.Module) -> str | None:
    """What a check may not see, since adapters often begin as nothing."""
    blocks = list(encoder.transformer.resblocks)
    known = {encoder, encoder.ln_final, encoder.text_projection, *blocks}
    for block in blocks:
        for name in _OF_BLOCKS:
            part = block._modules.get(name)
            known.update(() if part is None else part.modules())
    for name, module in encoder.named_modules():
        own = [k for k, v in module._parameters.items() if v is not None]
        if module is encoder:
            own = [k for k in own if k not in ("positional_embedding", "text_projection")]
        elif module in blocks:
            own = [k for k in own if k != "VPT_shallow"]
        elif module in known:
            continue
        if own:
            return ".".join(filter(None, (name, own[0])))
    return None


def _are_deep_prompts(blocks: Sequence[nn.Module], rest: Sequence[Any]) -> bool:
    if len(rest) != 1 or not all(hasattr(block, "compound_prompt_nctx") for block in blocks):
        return False
    listed = rest[0]
    return isinstance(listed, (list, tuple, nn.ParameterList)) and all(
        isinstance(vectors, Tensor) and vectors.ndim == 2 for vectors in listed
    )


def is_watched(prompts: Tensor) -> bool:
    """Whether gradients to the prompts themselves are looked at: where classes share, the first one
    gets those of all."""
    if not (prompts.requires_grad and torch.is_grad_enabled()):
        return False
    return bool(prompts.is_leaf or prompts.retains_grad or prompts._backward_hooks)


def encode(
    encoder: nn.Module,
    state: EncoderState,
    prompts: Tensor,
    tokenized: Tensor,
    rest: Sequence[Any],
    reading: Reading,
    kind: Hashable = None,
) -> Tensor:
    """Features [C, D], not normalised. kind: whose prompts these are, where a GPU is not asked for
    their values."""

    ends = state.ends(tokenized)
    whole = is_watched(prompts)

    def of_images(prompts: Tensor) -> Tensor:
        packing = state.packing_of(prompts, ends, reading, kind, whole)
        shared = prompts[:, 0, : packing.shared].flatten(0, 1)
        runs = prompts.flatten(1, 2).index_select(1, packing.runs).flatten(0, 1)
        rows = torch.cat([shared, runs])
        features = _run(encoder, state, packing, rows, tokenized, rest, reading)
        return features.unflatten(0, (len(prompts), -1))

    found = None
    if not (rest or whole) and reading.share and is_conditional(state.learner):
        found = image_batch(prompts)
    if found is None:
        return of_images(prompts.unsqueeze(0))[0]

    batch, image = found
    step = len(batch)
    if not torch.is_grad_enabled():
        # No more rows at a time than the codebase's own way has for one image.
        one = state.packing_of(prompts.unsqueeze(0), ends, reading, kind)
        step = max(1, tokenized.numel() // len(one.positions))
    start = image - image % step
    key = (encoder, ends.key, batch._version, start, step, _mode(prompts.device))
    made = state.batches.setdefault(batch, {})
    if key not in made:
        made[key] = of_images(batch[start : start + step]).unbind(0)
    # A caller may write to what it gets.
    return made[key][image - start].clone()


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
    """How many positions, at most ``most``, hold the same in all classes of each image."""
    same = (prompts[:, :, :most] == prompts[:, :1, :most]).all(-1).flatten(0, 1).all(0)
    return int(same.long().cumprod(0).sum())


@torch.no_grad()
def _shares(prompts: Tensor, count: int) -> bool:
    return bool((prompts[:, :, :count] == prompts[:, :1, :count]).all())
