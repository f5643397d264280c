"""The packed path through a causal text tower: the tokens that all classes share are encoded once,
the others behind them without padding, and after the last attention only what is read goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlfast.clip.text_model import TextModel
from vlfast.clip.text_output import Per, Position, TextOutput
from vlfast.clip.tokens import PromptTokens
from vlfast.ops import prefix_attention


def encode_packed(
    text: TextModel,
    context: Tensor | None,
    tokens: PromptTokens,
    *,
    per: Per,
    position: Position,
    deep: Sequence[Tensor] = (),
    max_memory: int | None = None,
) -> TextOutput:
    """See TextTower. The arguments have been checked.

    max_memory: bytes that may be taken at a time: images and classes are then encoded in chunks,
    each computed once more when its backward comes. None encodes everything at once.
    """
    prompts = _Prompts(text, tokens, context, per, position, tuple(deep))
    if max_memory is None:
        return prompts.encode()
    images, classes = prompts.chunks(max_memory)
    if len(images) == len(classes) == 1:
        return prompts.encode()
    outputs = [[prompts.part(i, c).encode_twice() for c in classes] for i in images]
    features = torch.cat([torch.cat([o.features for o in row], dim=-2) for row in outputs])
    if context is None:
        return TextOutput(features, None)
    if prompts.states_of_classes:
        return TextOutput(features, torch.cat([o.context_states for o in outputs[0]]))
    states = [row[0].context_states for row in outputs]
    return TextOutput(features, torch.cat(states) if per == "image" else states[0])


@dataclass(frozen=True)
class _Prompts:
    """Classes behind a context, or behind one context for each of several images."""

    text: TextModel
    tokens: PromptTokens
    context: Tensor | None
    per: Per
    position: Position
    deep: tuple[Tensor, ...]

    @property
    def n_ctx(self) -> int:
        return 0 if self.context is None else self.context.shape[-2]

    @property
    def images(self) -> int:
        return len(self.context) if self.per == "image" else 1

    @property
    def states_of_classes(self) -> bool:
        """Whether each class has context states of its own."""
        return self.per == "class" or self.position != "end"

    def encode(self) -> TextOutput:
        text, deep = self.text, self.deep
        layout = self.tokens.layout(self.n_ctx, self.per, self.position, self.images, text.device)
        x = text.token_embedding(layout.ids).to(text.dtype)
        if self.context is not None:
            vectors = layout.vectors(self.context.to(x.dtype))
            x = x.index_copy(0, layout.context_rows, vectors)
        x = x + text.positional_embedding.index_select(0, layout.positions).to(x.dtype)

        for layer in range(text.depth):
            if 1 <= layer <= len(deep):
                vectors = layout.vectors(deep[layer - 1].to(x.dtype))
                x = x.index_copy(0, layout.context_rows, vectors)
            attended = prefix_attention(text.qkv(layer, x), layout.runs)
            if layer < text.depth - 1:
                x = text.finish_block(layer, x, attended)

        def last_block(rows: Tensor) -> Tensor:
            return text.finish_block(
                text.depth - 1, x.index_select(0, rows), attended.index_select(0, rows)
            )

        features = text.pool(last_block(layout.eot_rows))
        if self.per == "image":
            features = features.unflatten(0, (self.images, len(self.tokens)))
        if self.context is None:
            return TextOutput(features, None)
        states = layout.states(text.ln_final(last_block(layout.state_rows)))
        if self.states_of_classes:
            return TextOutput(features, states.expand(len(self.tokens), -1, -1))
        return TextOutput(features, states if self.per == "image" else states[0])

    def encode_twice(self) -> TextOutput:
        """Keep nothing for the backward but the arguments, and encode again there."""
        if not torch.is_grad_enabled():
            return self.encode()
        # What is saved for a backward, autograd watches; what is used again there, we have to.
        vectors = [v for v in (self.context, *self.deep) if v is not None and not v.is_inference()]
        versions = [v._version for v in vectors]

        def encode() -> TextOutput:
            if [v._version for v in vectors] != versions:
                raise RuntimeError(
                    "context: it, or a deep prompt, was changed in place before the backward, "
                    "which with max_memory encodes again and needs it as it was"
                )
            return self.encode()

        return checkpoint(encode, use_reentrant=False, preserve_rng_state=False)

    def part(self, images: slice, classes: slice) -> _Prompts:
        context = self.context
        if self.per == "image":
            context = context[images]
        elif self.per == "class":
            context = context[classes]
        return replace(self, tokens=self.tokens.part(classes.start, classes.stop), context=context)

    def chunks(self, max_memory: int) -> tuple[list[slice], list[slice]]:
        """Slices of images and of classes, each pair of which takes at most ``max_memory`` bytes
        but holds at least one class."""
        budget = max(1, max_memory // self._bytes_of_row())
        prefix = 1 if self.per == "class" else 1 + self.n_ctx
        ends = self._rows_of_runs().cumsum(0)
        whole = prefix + int(ends[-1])
        if whole <= budget:
            step = budget // whole
            bounds = [*range(0, self.images, step), self.images]
            return _slices(bounds), [slice(0, len(self.tokens))]
        bounds = [0]
        while bounds[-1] < len(self.tokens):
            before = int(ends[bounds[-1] - 1]) if bounds[-1] else 0
            stop = int(torch.searchsorted(ends, before + budget - prefix, right=True))
            bounds.append(max(bounds[-1] + 1, stop))
        return _slices([*range(self.images + 1)]), _slices(bounds)

    def _rows_of_runs(self) -> Tensor:
        return self.tokens.lengths + (self.n_ctx if self.per == "class" else 0)

    def _bytes_of_row(self) -> int:
        """What a packed row takes while it is encoded, and keeps for the backward."""
        # The hidden layer of the MLP is the widest: four times the width before the activation and
        # after it, and again while its gradient comes; the rest is what stands beside it.
        passing = 20 * self.text.width * self.text.dtype.itemsize
        if not torch.is_grad_enabled():
            return passing
        device = self.text.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        learns = any(weight.requires_grad for weight in self.text.weights())
        how = (self.per, self.position, self.n_ctx, len(self.deep))
        key = (*how, self.text.dtype, autocast, learns)
        return passing + self.text.measured(key, self._bytes_kept)

    def _bytes_kept(self) -> int:
        """Measured on a few classes, since it depends on the model's own modules. Prompts that do
        not learn now may do so at the next call."""
        few = self.part(slice(0, 1), slice(0, min(8, len(self.tokens))))
        if self.context is not None:
            context, *deep = (v.detach().requires_grad_() for v in (few.context, *few.deep))
            few = replace(few, context=context, deep=tuple(deep))
        weights = {p.untyped_storage().data_ptr() for p in self.text.model.parameters()}
        kept: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            few.encode()
        prefix = 1 if self.per == "class" else 1 + self.n_ctx
        return sum(kept.values()) // (prefix + int(few._rows_of_runs().sum()))


def _slices(bounds: Sequence[int]) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(bounds)]
