"""The padded path: the model's own text tower on whole sequences, with our vectors in them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from vlfast.clip.prompt_layout import vectors_before_name
from vlfast.clip.text_model import TextModel
from vlfast.clip.text_output import Per, Position, TextOutput
from vlfast.clip.tokens import PromptTokens

# How many sequences go through the tower at a time where nothing is kept for a backward.
SLICE = 128


def why_padded(text: TextModel, tokens: PromptTokens) -> str | None:
    """Why these prompts need whole sequences in this model, or None where packed rows serve."""
    if (found := text.why_padded()) is not None:
        return found
    if tokens.sot is None:
        return "its tokenizer puts no start token before a text, so no prefix is shared"
    another_end = text.pool_type == "eos" and text.eos_id != tokens.eot
    if another_end or text.pool_type not in tokens.pools:
        return "it does not read its features where the tokenizer ends a text"
    return None


def encode_padded(
    text: TextModel,
    context: Tensor | None,
    tokens: PromptTokens,
    *,
    per: Per,
    position: Position,
    deep: Sequence[Tensor] = (),
) -> TextOutput:
    """See TextTower, whose checks the arguments have passed.

    The model encodes token ids as ever, so that positions, masks, pooling and hooks are its own;
    on the way, hooks of ours put the context into the output of its token embedding, and deep
    prompts into the input of its blocks. ``context_states`` is None, too, where the tower is not
    causal or has no state before the first vector. Without a gradient, slices bound the memory.

    Raises ValueError for deep prompts in a tower whose blocks can't be reached.
    """
    _check_deep(text, deep)
    n = 0 if context is None else context.shape[-2]
    images = len(context) if context is not None and per == "image" else 1
    length = text.context_length
    if not text.fixed_length:
        length = n + tokens.longest[1] + (tokens.sot is not None)
    placeholder = _placeholder(text, tokens)
    whole = tokens.once(
        ("whole", n, position, length, placeholder, str(text.device)),
        lambda: _WholeSequences.of(tokens, n, position, length, placeholder, text.device),
    )
    has_states = text.causal and tokens.sot is not None
    prompts = _Prompts(text, whole, context, per, tuple(deep), has_states)

    count = images * len(tokens)
    learned = any(vectors.requires_grad for vectors in (context, *deep) if vectors is not None)
    step = count if learned and torch.is_grad_enabled() else SLICE
    # The states are the same for every class where the name stands behind the context.
    every = 1 if per == "class" or position != "end" else len(tokens)
    parts = [prompts.encode(i, min(i + step, count), every) for i in range(0, count, step)]

    features = torch.cat([part.features for part in parts])
    if per == "image":
        features = features.unflatten(0, (images, len(tokens)))
    if any(part.context_states is None for part in parts):
        return TextOutput(features, None)
    states = torch.cat([part.context_states for part in parts])
    return TextOutput(features, states[0] if per == "all" and position == "end" else states)


@dataclass(frozen=True)
class _WholeSequences:
    """ids: int64 [C, L], padded, with a placeholder where a vector stands. places: int64 [C, n], of
    each vector."""

    ids: Tensor
    places: Tensor

    @classmethod
    def of(
        cls,
        tokens: PromptTokens,
        n: int,
        position: Position,
        length: int,
        placeholder: int,
        device: torch.device,
    ) -> _WholeSequences:
        suffix, lengths, name = tokens.suffix, tokens.lengths[:, None], tokens.name_lengths[:, None]
        start = 0 if tokens.sot is None else 1
        before = vectors_before_name(n, position)
        count = torch.arange(suffix.shape[1], device=suffix.device)
        in_name = (count < name) & (position != "end")
        vector = torch.arange(n, device=suffix.device).expand(len(tokens), n)

        ids = suffix.new_full((len(tokens), length), tokens.pad)
        if tokens.sot is not None:
            ids[:, 0] = tokens.sot
        ids.scatter_(
            1,
            torch.where(in_name, start + before + count, start + n + count),
            suffix.where(count < lengths, tokens.pad),
        )
        places = torch.where(vector < before, start + vector, start + vector + name)
        ids.scatter_(1, places, placeholder)
        return cls(ids.to(device), places.to(device))


@dataclass(frozen=True)
class _Prompts:
    """One context for every class, one for each, or one for every image, where image i and class c
    are sequence i * C + c."""

    text: TextModel
    whole: _WholeSequences
    context: Tensor | None
    per: Per
    deep: tuple[Tensor, ...]
    has_states: bool

    def encode(self, start: int, stop: int, every: int) -> TextOutput:
        """Sequences ``start`` to ``stop``: features [stop - start, D], and the context states of
        those whose number is a multiple of ``every``."""
        text, context = self.text, self.context
        classes = len(self.whole.ids)
        rows = torch.arange(start, stop, device=text.device) % classes
        ids, places = self.whole.ids[rows], self.whole.places[rows]
        with ExitStack() as hooks:
            if context is None:
                return TextOutput(text.encode(ids), None)
            embedding = _Vectors(self._vectors(start, stop), places)
            hooks.enter_context(text.token_embedding.register_forward_hook(embedding.in_output))
            replaced = [embedding]
            for block, vectors in zip(list(text.blocks)[1:], self.deep, strict=False):
                sequence = 1 if text.batch_first else 0
                deeper = _Vectors(vectors.expand(len(ids), -1, -1), places, sequence)
                hooks.enter_context(
                    block.register_forward_pre_hook(deeper.in_input, with_kwargs=True)
                )
                replaced.append(deeper)
            states = _StatesBefore(places, slice(-start % every, None, every))
            if self.has_states:
                hooks.enter_context(text.ln_final.register_forward_hook(states.keep))
            features = text.encode(ids)
        if not all(vectors.used for vectors in replaced):
            raise ValueError(
                f"context: {type(text.model).__name__} does not call its token embedding and its "
                "blocks as modules, so that vectors can't be put in"
            )
        return TextOutput(features, states.kept)

    def _vectors(self, start: int, stop: int) -> Tensor:
        """The context of each sequence, [stop - start, n, d]."""
        if self.per == "all":
            return self.context.expand(stop - start, -1, -1)
        if self.per == "class":
            return self.context[start:stop]
        # Expanded rather than indexed, so that gradients are summed in one order.
        classes = len(self.whole.ids)
        first, last = start // classes, -(-stop // classes)
        each = self.context[first:last, None].expand(-1, classes, -1, -1).flatten(0, 1)
        return each[start - first * classes : stop - first * classes]


class _Vectors:
    """Hooks that put vectors [N, n, d] at their places [N, n] of sequences, in the thread that made
    them alone: others may be in the same model."""

    def __init__(self, vectors: Tensor, places: Tensor, sequence: int = 1) -> None:
        self.vectors = vectors
        self.index = places[..., None].expand_as(vectors)
        if sequence == 0:
            self.vectors, self.index = self.vectors.transpose(0, 1), self.index.transpose(0, 1)
        self.sequence = sequence
        self.used = False
        self.thread = get_ident()

    def in_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if get_ident() != self.thread:
            return output
        self.used = True
        return output.scatter(self.sequence, self.index, self.vectors.to(output.dtype))

    def in_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(x, Tensor):
            raise ValueError(
                f"deep: {type(module).__name__} takes {type(x).__name__}, not a tensor"
            )
        x = self.in_output(module, args, x)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


class _StatesBefore:
    """A hook that keeps the states before the places of vectors, of some of the sequences."""

    def __init__(self, places: Tensor, which: slice) -> None:
        self.before = places[which] - 1
        self.which = which
        self.kept: Tensor | None = None
        self.thread = get_ident()

    def keep(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # Some towers normalise what they have read, [N, d].
        if output.ndim == 3 and get_ident() == self.thread:
            index = self.before[..., None].expand(-1, -1, output.shape[2])
            self.kept = output[self.which].gather(1, index)


def _placeholder(text: TextModel, tokens: PromptTokens) -> int:
    """An id that the tower takes for a word: small, since the largest is an end in CLIP's eyes."""
    taken = {tokens.sot, tokens.eot, tokens.pad, text.pad_id, text.eos_id}
    return next(i for i in range(len(taken) + 1) if i not in taken)


def _check_deep(text: TextModel, deep: Sequence[Tensor]) -> None:
    if not deep:
        return
    model = type(text.model).__name__
    if len(text.blocks) == 0:
        raise ValueError(f"deep: the blocks of the text tower of {model} can't be reached")
    transformer = getattr(text.tower, "transformer", None)
    checkpointed = getattr(transformer, "grad_checkpointing", False) or any(
        getattr(block, "gradient_checkpointing", False) and block.training for block in text.blocks
    )
    if checkpointed and torch.is_grad_enabled():
        raise ValueError(
            f"deep: {model} checkpoints its blocks, and would run them again in the backward "
            "without the deep prompts; turn its gradient checkpointing off"
        )
