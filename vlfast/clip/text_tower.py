"""The text tower for prompts: class features as a function of learned context vectors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vlfast.clip.feature_cache import FeatureCache
from vlfast.clip.packed import encode_packed
from vlfast.clip.padded import encode_padded, why_padded
from vlfast.clip.text_model import TextModel
from vlfast.clip.text_output import Per, Position, TextOutput
from vlfast.clip.tokens import PromptTokens, Tokenizer, as_tokenizer, tokenize_names


class TextTower:
    """Encodes class names behind a learned context with the text tower of a CLIP.

    What all classes share, SOS and their common context, is encoded once, and the rest of every
    class behind it, up to EOT, without padding: the tower is causal and only EOT is read, so that
    features and gradients are those of whole padded sequences. Towers of another kind get the
    whole sequences; ``explain()`` tells.

    The model's own modules do the work: no weights are copied, and gradients reach the context.
    Freeze the model first (``model.requires_grad_(False)``), or its weights get gradients too.

    model: an open_clip CLIP or CustomTextCLIP, an openai/CLIP, or a transformers CLIPModel.
    tokenizer: open_clip's SimpleTokenizer by default; see ``as_tokenizer`` for others. max_memory:
    what encoding may take at a time, bytes or "2GB". Images and classes then go in chunks, and what
    a chunk keeps for its backward is computed again; None, the default, takes all at once. It may
    be set later on, and holds for the packed path. Raises ValueError, with the reason, for a model
    without a text tower that prompts can be learned for.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | None = None,
        *,
        max_memory: int | str | None = None,
    ) -> None:
        if tokenizer is None:
            from open_clip.tokenizer import SimpleTokenizer

            tokenizer = SimpleTokenizer()
        self.text = TextModel.of(model)
        self.tokenizer = as_tokenizer(tokenizer)
        self.max_memory = max_memory
        self._hard_features: WeakKeyDictionary[PromptTokens, FeatureCache] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        # Weak references can't be copied or pickled; copies compute features of their own.
        return {k: v for k, v in self.__dict__.items() if k != "_hard_features"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _hard_features=WeakKeyDictionary())

    @property
    def max_memory(self) -> int | None:
        """Bytes that encoding may take at a time; None for no limit."""
        return self._max_memory

    @max_memory.setter
    def max_memory(self, value: int | str | None) -> None:
        self._max_memory = None if value is None else _bytes(value)

    def explain(self, tokens: PromptTokens | None = None) -> str:
        """Which path encodes prompts (these tokens) at this moment, and why."""
        reason = why_padded(self.text, self.tokenize(["a"]) if tokens is None else tokens)
        if reason is None:
            return (
                "packed: what all classes share is encoded once, and the rest of each without "
                "padding"
            )
        return f"padded: every class is a whole sequence of {self.context_length}, since {reason}"

    @property
    def width(self) -> int:
        """d, the width of context vectors."""
        return self.text.width

    @property
    def context_length(self) -> int:
        """How many tokens the tower has, SOS and EOT included."""
        return self.text.context_length

    @property
    def depth(self) -> int:
        """How many blocks the tower has."""
        return len(self.text.blocks)

    def tokenize(self, names: Sequence[str], template: str = "{ctx} {name}.") -> PromptTokens:
        """Lay out class names; see ``tokenize_names``. Do it once, outside the training loop."""
        return tokenize_names(self.tokenizer, names, template)

    def embed_words(self, words: str) -> Tensor:
        """The token embeddings of ``words``, [n, d]: what a context starts from."""
        ids = self.tokenizer.encode(words)
        ids = torch.tensor(ids, dtype=torch.int64, device=self.text.device)
        return self.text.token_embedding(ids).detach()

    def __call__(
        self,
        context: Tensor | None,
        tokens: PromptTokens,
        *,
        per: Per = "all",
        position: Position = "end",
        deep: Sequence[Tensor] | None = None,
        index: Tensor | None = None,
    ) -> TextOutput:
        """Class features.

        context: [n, d] shared by all classes (per "all"), [C, n, d] one a class (per "class"),
        [B, n, d] one an image (per "image"), or None for a hard prompt. tokens: from
        ``tokenize``. position: where the class name stands; "middle" puts n // 2 vectors before
        it. deep: tensors [n, d], or one [l, n, d]; entry l replaces positions 1..n at the input of
        block l + 1. index: int64 [K], encode only these classes (rows of a per-class context follow
        it). An index on the CPU costs no synchronisation with a GPU.

        A hard prompt's features are computed once for the same ``tokens``, for all its classes even
        where ``index`` asks for few, and again only where a weight or an option of a module has
        changed (a write by way of ``weight.data`` goes unseen: see ``forget``), or hooks are at
        work. ``torch.compile`` takes the call in as one graph, except with ``index`` or
        ``max_memory``, which break it, and encodes hard prompts each time.

        Gradients come back in the context's dtype. Raises ValueError or TypeError, naming the
        argument, for shapes that do not fit and for deep or conditional prompts with a position
        other than "end".
        """
        deep = [] if deep is None else list(deep)
        self._check(context, tokens, per, position, deep, index)
        if context is None and not (torch.compiler.is_compiling() or self._learns_weights()):
            features = self._features_of_hard_prompt(tokens)
            if index is not None:
                features = features[index.to(features.device, non_blocking=True)]
            return TextOutput(features, None)
        if index is not None:
            tokens = tokens.select(index)
            if per == "class":
                context = context[index.to(context.device, non_blocking=True)]
        return self._encode(context, tokens, per, position, deep)

    def forget(self) -> None:
        """Compute the features of hard prompts anew, after a write to weights by way of ``.data``,
        which nothing tells."""
        self._hard_features.clear()

    def _encode(
        self,
        context: Tensor | None,
        tokens: PromptTokens,
        per: Per = "all",
        position: Position = "end",
        deep: Sequence[Tensor] = (),
    ) -> TextOutput:
        how = {"per": per, "position": position, "deep": deep}
        if why_padded(self.text, tokens) is not None:
            return encode_padded(self.text, context, tokens, **how)
        return encode_packed(self.text, context, tokens, max_memory=self.max_memory, **how)

    def _learns_weights(self) -> bool:
        return torch.is_grad_enabled() and any(w.requires_grad for w in self.text.weights())

    def _features_of_hard_prompt(self, tokens: PromptTokens) -> Tensor:
        """Of all its classes, computed once for as long as the weights stay as they are."""
        cache = self._hard_features.setdefault(tokens, FeatureCache())
        return cache.get(self.text.modules(), lambda: self._encode(None, tokens).features)

    def _check(
        self,
        context: Tensor | None,
        tokens: PromptTokens,
        per: Per,
        position: Position,
        deep: list[Tensor],
        index: Tensor | None,
    ) -> None:
        if per not in get_args(Per):
            raise ValueError(f"per: expected 'all', 'class' or 'image', got {per!r}")
        if position not in get_args(Position):
            raise ValueError(f"position: expected 'end', 'middle' or 'front', got {position!r}")
        if position != "end" and (deep or per == "image"):
            what = "deep prompts" if deep else 'per="image"'
            raise ValueError(f"position: {what} need the class name at the end, got {position!r}")
        if not isinstance(tokens, PromptTokens):
            raise TypeError(f"tokens: expected what tokenize() gives, got {type(tokens).__name__}")
        if index is not None:
            if not isinstance(index, Tensor):
                raise TypeError(f"index: expected an int64 tensor, got {type(index).__name__}")
            if index.dtype != torch.int64 or index.ndim != 1 or len(index) == 0:
                raise ValueError(
                    "index: expected a non-empty int64 vector, "
                    f"got {index.dtype} {tuple(index.shape)}"
                )
            if index.device.type == "cpu" and not 0 <= index.min() <= index.max() < len(tokens):
                raise ValueError(
                    f"index: expected class numbers in 0..{len(tokens) - 1}, "
                    f"got {int(index.min())}..{int(index.max())}"
                )
        if context is None:
            if tokens.has_context:
                raise ValueError(
                    f"context: the template {tokens.template!r} asks for a context, got None"
                )
            if deep:
                raise ValueError("deep: deep prompts replace a context, but context is None")
            tokens.check_fits(0, self.context_length)
            return
        if not tokens.has_context:
            raise ValueError(
                f"context: the template {tokens.template!r} is a hard prompt (no {{ctx}}), "
                f"so expected None, got {type(context).__name__}"
            )
        vectors = [("context", context), *(("deep", vectors) for vectors in deep)]
        for name, tensor in vectors:
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
            if tensor.device != self.text.device:
                raise ValueError(
                    f"{name}: expected a tensor on {self.text.device}, where the model is, "
                    f"got one on {tensor.device}"
                )
        wanted = {
            "all": "[n, {d}]",
            "class": "[{c}, n, {d}]",
            "image": "[B, n, {d}]",
        }[per].format(d=self.width, c=len(tokens))
        fits = context.ndim == (2 if per == "all" else 3) and context.shape[-1] == self.width
        if per == "class":
            fits = fits and context.shape[0] == len(tokens)
        if not fits or (per == "image" and context.shape[0] == 0):
            raise ValueError(
                f"context: expected {wanted} for per={per!r}, got {tuple(context.shape)}"
            )
        n = context.shape[-2]
        if 0 < self.depth <= len(deep):
            raise ValueError(
                f"deep: a tower of {self.depth} blocks takes at most {self.depth - 1} "
                f"entries, got {len(deep)}"
            )
        for layer, vectors in enumerate(deep):
            if vectors.shape != (n, self.width):
                raise ValueError(
                    f"deep: expected entry {layer} of shape {(n, self.width)}, "
                    f"got {tuple(vectors.shape)}"
                )
        if position != "end":
            if tokens.between:
                raise ValueError(
                    f"position: {position!r} needs the name directly after {{ctx}} in the "
                    f"template, got {tokens.template!r}"
                )
            if not tokens.separable:
                raise ValueError(
                    f"position: {position!r} needs a space or punctuation after {{name}}, "
                    f"got {tokens.template!r}"
                )
        tokens.check_fits(n, self.context_length)


_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _bytes(value: int | str) -> int:
    if not isinstance(value, (int, str)) or isinstance(value, bool):
        raise TypeError(f'max_memory: expected bytes, a size such as "2GB" or None, got {value!r}')
    number, unit = value, ""
    if isinstance(value, str):
        number, unit = re.match(r"\s*([\d.]*)\s*(.*?)\s*$", value).groups()
    try:
        size = int(float(number) * _UNITS[unit.lower()])
    except (KeyError, ValueError):
        size = 0
    if size < 1:
        raise ValueError(
            f'max_memory: expected at least 1 byte, or a size such as "2GB", got {value!r}'
        )
    return size
