"""The text tower for prompts: class features as a function of learned context vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vlfast.clip.text_model import TextModel
from vlfast.clip.tokens import PromptTokens, Tokenizer, tokenize_names

Per = Literal["all", "class", "image"]
Position = Literal["end", "middle", "front"]


@dataclass(frozen=True)
class TextOutput:
    """features: [C, D], or [B, C, D] for ``per="image"``; not normalised.

    context_states: the states (after ``ln_final``, before the projection) that predict the context
    vectors, row i for vector i: [n, d] (per "all", position "end"), [B, n, d] (per "image"), else
    [C, n, d]. None without a context.
    """

    features: Tensor
    context_states: Tensor | None


class TextTower:
    """Encodes class names behind a learned context with the text tower of an open_clip CLIP.

    The model's own modules do the work: no weights are copied, and gradients reach the context.
    Freeze the model first (``model.requires_grad_(False)``), or its weights get gradients too.
    Every sequence is cut after the longest EOT, which changes nothing: the tower is causal and
    only EOT is read.

    model: an open_clip CLIP or CustomTextCLIP. tokenizer: with ``encode``, ``decode``,
    ``sot_token_id`` and ``eot_token_id``; open_clip's SimpleTokenizer by default. Raises
    ValueError, with the reason, for a model whose text tower can't serve.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer | None = None) -> None:
        if tokenizer is None:
            from open_clip.tokenizer import SimpleTokenizer

            tokenizer = SimpleTokenizer()
        self.text = TextModel.of(model)
        self.tokenizer = tokenizer

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
        return tokenize_names(self.tokenizer, names, template).to(self.text.device)

    def embed_words(self, words: str) -> Tensor:
        """The token embeddings of ``words``, [n, d]: what a context starts from."""
        ids = torch.tensor(self.tokenizer.encode(words), device=self.text.device)
        return self.text.token_embedding.weight.detach()[ids]

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
        it. deep: tensors [n, d]; entry l replaces positions 1..n at the input of block l + 1.
        index: int64 [K], encode only these classes (rows of a per-class context follow it).

        Gradients come back in the context's dtype. Raises ValueError or TypeError, naming the
        argument, for shapes that do not fit and for deep or conditional prompts with a position
        other than "end".
        """
        deep = list(deep or ())
        self._check(context, tokens, per, position, deep, index)
        if index is not None:
            tokens = tokens.select(index)
            if context is not None and per == "class":
                context = context[index.to(context.device)]
        n = 0 if context is None else context.shape[-2]
        images = context.shape[0] if context is not None and per == "image" else 1

        order = _token_order(tokens, n, position)
        embedded = self._embed(context, tokens, per, order)
        hidden = self._encode(embedded, [vectors.to(embedded.dtype) for vectors in deep])

        runs = torch.arange(len(hidden), device=hidden.device)
        eot = (n + tokens.lengths).repeat(images)
        features = self.text.project(hidden[runs, eot])
        if per == "image":
            features = features.view(images, len(tokens), -1)
        if context is None:
            return TextOutput(features, None)
        return TextOutput(features, _context_states(hidden, order, n, per, position, images))

    def _embed(
        self, context: Tensor | None, tokens: PromptTokens, per: Per, order: Tensor
    ) -> Tensor:
        """Token embeddings in reading order, positions added: [runs, L, d]."""
        text = self.text
        sot = torch.full_like(tokens.suffix[:, :1], tokens.sot)
        frozen = text.token_embedding(torch.cat([sot, tokens.suffix], dim=1)).to(text.dtype)
        if context is None:
            x = frozen
        else:
            vectors = context.to(text.dtype)
            if per == "all":
                vectors = vectors.expand(len(tokens), -1, -1)
            elif per == "image":
                images = len(vectors)
                vectors = vectors.repeat_interleave(len(tokens), dim=0)
                frozen = frozen.repeat(images, 1, 1)
                order = order.repeat(images, 1)
            x = torch.cat([frozen[:, :1], vectors, frozen[:, 1:]], dim=1)
            x = x.gather(1, order.unsqueeze(-1).expand_as(x))
        return x + text.positional_embedding[: x.shape[1]].to(text.dtype)

    def _encode(self, x: Tensor, deep: list[Tensor]) -> Tensor:
        """All blocks and the final layer norm on padded sequences: [runs, L, d]."""
        length = x.shape[1]
        mask = torch.full((length, length), float("-inf"), device=x.device, dtype=x.dtype).triu(1)
        for layer in range(len(self.text.blocks)):
            if 1 <= layer <= len(deep):
                vectors = deep[layer - 1].expand(len(x), -1, -1)
                x = torch.cat([x[:, :1], vectors, x[:, 1 + vectors.shape[1] :]], dim=1)
            x = self.text.run_block(layer, x, mask)
        return self.text.ln_final(x)

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
        if index is not None:
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
                f"so expected None, got a tensor {tuple(context.shape)}"
            )
        if not context.is_floating_point():
            raise TypeError(f"context: expected a floating-point tensor, got {context.dtype}")
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
        if len(deep) >= self.depth:
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


def _token_order(tokens: PromptTokens, n: int, position: Position) -> Tensor:
    """int64 [C, L]: which entry of [SOS | context | suffix] stands at each place."""
    length = 1 + n + tokens.suffix.shape[1]
    place = torch.arange(length, device=tokens.suffix.device).expand(len(tokens), -1)
    if position == "end":
        return place
    before = n // 2 if position == "middle" else 0
    name = tokens.name_lengths.unsqueeze(1)
    in_name = (place > before) & (place <= before + name)
    after_name = (place > before + name) & (place <= n + name)
    moved = torch.where(in_name, place + (n - before), place)
    return torch.where(after_name, place - name, moved)


def _context_states(
    hidden: Tensor, order: Tensor, n: int, per: Per, position: Position, images: int
) -> Tensor:
    """The state just before each context vector; see TextOutput.context_states."""
    if position == "end":
        states = hidden[:, :n]
        if per == "all":
            return states[0]
        return states.unflatten(0, (images, -1))[:, 0] if per == "image" else states
    places = order.argsort(dim=1)[:, 1 : 1 + n] - 1
    return hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
