"""Class names as token ids, laid out for a context of learned vectors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from vlfast.clip.prompt_layout import PromptLayout
from vlfast.clip.text_output import Per, Position

T = TypeVar("T")

_NUMBERS = itertools.count()
_BY_NUMBER: WeakValueDictionary[int, PromptTokens] = WeakValueDictionary()


class Tokenizer(Protocol):
    """What the text tower needs of a tokenizer; open_clip's SimpleTokenizer has it."""

    sot_token_id: int
    eot_token_id: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, eq=False)
class PromptTokens:
    """What follows the context, one run a class.

    template: as given to ``tokenize_names``. suffix: int64 [C, S], the tokens after the context up
    to and including EOT, padded with 0. lengths: int64 [C], how many of them count.
    name_lengths: int64 [C], tokens of the name itself. between: how many tokens at the front of
    every run stand between the context and the name ("of a" in IVLP and MaPLe). sot: the id of
    the first token. has_context: whether the template names a context. separable: whether every
    name ends where a token ends (not in "{name}s"). longest: the class name with the most tokens,
    and how many its run has. What the tower asks at every step is kept as Python values, since
    reading it from a GPU would stall it.
    """

    template: str
    suffix: Tensor
    lengths: Tensor
    name_lengths: Tensor
    between: int
    sot: int
    has_context: bool
    separable: bool
    longest: tuple[str, int]
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)
    _number: int = field(default_factory=_NUMBERS.__next__, init=False, repr=False)

    def __post_init__(self) -> None:
        _BY_NUMBER[self._number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are other tokens, with a number of their own."""
        return type(self), tuple(getattr(self, f.name) for f in fields(self) if f.init)

    def __len__(self) -> int:
        return len(self.suffix)

    def select(self, index: Tensor) -> PromptTokens:
        """The classes at ``index`` (int64 [K]), in that order."""
        index = index.to(self.suffix.device)
        return replace(
            self,
            suffix=self.suffix[index],
            lengths=self.lengths[index],
            name_lengths=self.name_lengths[index],
        )

    def layout(
        self, n_ctx: int, per: Per, position: Position, images: int, device: torch.device
    ) -> PromptLayout:
        """The packed rows for a context of ``n_ctx`` vectors; made once for all steps."""
        key = (n_ctx, per, position, images, str(device))
        _make_layout(self._number, *key)
        return self._made[key]

    def part(self, start: int, stop: int) -> PromptTokens:
        """The classes from ``start`` to ``stop``."""
        if (start, stop) == (0, len(self)):
            return self
        return self.once(("part", start, stop), lambda: self.select(torch.arange(start, stop)))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` made of these tokens when first asked for ``key``."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def check_fits(self, n_ctx: int, context_length: int) -> None:
        """Raise ValueError, naming the longest class, if SOS + n_ctx + its tokens do not fit."""
        name, length = self.longest
        if 1 + n_ctx + length > context_length:
            most = context_length - 1 - length
            hint = f"the most that fits is n_ctx={most}" if most >= 0 else "shorten the name"
            raise ValueError(
                f"n_ctx: {n_ctx} context tokens and the class {name!r} need {1 + n_ctx + length} "
                f"tokens, but the text tower has {context_length}; {hint}"
            )


def _make_layout(
    number: int, n_ctx: int, per: Per, position: Position, images: int, device: str
) -> None:
    """Let the tokens with this number have this layout."""
    tokens = _BY_NUMBER[number]
    tokens.once(
        (n_ctx, per, position, images, device),
        lambda: PromptLayout.of(
            tokens.suffix,
            tokens.lengths,
            tokens.name_lengths,
            tokens.sot,
            n_ctx=n_ctx,
            per=per,
            position=position,
            images=images,
            device=device,
        ),
    )


# torch.compile can't trace how a layout is made. Of a function marked so it takes the arguments,
# hence a number for the tokens, runs it while it traces, and holds the result to be constant.
_make_layout._dynamo_marked_constant = True


def tokenize_names(tokenizer: Tokenizer, names: Sequence[str], template: str) -> PromptTokens:
    """Lay out class names for ``template``.

    template: ``"{ctx} {name}."`` for a learned context, with frozen words allowed between the two;
    ``"a photo of a {name}."`` (no ``{ctx}``) for a hard prompt. Underscores in names become spaces.
    Raises ValueError for an empty list, an empty name or a template of another form.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"names: expected a non-empty sequence of class names, got {names!r}")
    if template.count("{name}") != 1 or template.count("{ctx}") > 1:
        raise ValueError(
            f"template: expected one {{name}} and at most one {{ctx}}, got {template!r}"
        )
    has_context = "{ctx}" in template
    if has_context and not template.startswith("{ctx}"):
        raise ValueError(
            f"template: {{ctx}} stands directly after the start of the text, got {template!r}"
        )
    words = template.removeprefix("{ctx}")
    before, after = words.split("{name}")
    between = tokenizer.encode(before.strip()) if before.strip() else []

    runs, name_lengths, separable = [], [], True
    for name in names:
        clean = name.replace("_", " ").strip()
        if not clean:
            raise ValueError(f"names: an empty class name at position {len(runs)}")
        runs.append([*tokenizer.encode(f"{before}{clean}{after}".strip()), tokenizer.eot_token_id])
        name_ids = tokenizer.encode(clean)
        name_lengths.append(len(name_ids))
        separable &= runs[-1][len(between) : len(between) + len(name_ids)] == name_ids

    suffix = torch.zeros(len(runs), max(map(len, runs)), dtype=torch.int64)
    for row, run in zip(suffix, runs, strict=True):
        row[: len(run)] = torch.tensor(run)
    return PromptTokens(
        template=template,
        suffix=suffix,
        lengths=torch.tensor([len(run) for run in runs]),
        name_lengths=torch.tensor(name_lengths),
        between=len(between),
        sot=tokenizer.sot_token_id,
        has_context=has_context,
        separable=separable,
        longest=max(zip(names, map(len, runs), strict=True), key=lambda pair: pair[1]),
    )
