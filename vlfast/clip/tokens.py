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
_BY_NUMBER: WeakValueDictionary[str, PromptTokens] = WeakValueDictionary()


class Tokenizer(Protocol):
    """What the text tower needs of a tokenizer; open_clip's SimpleTokenizer has it.

    sot_token_id: what every text begins with, None for nothing. eot_token_id: what it ends with. A
    ``pad_token_id`` beside them says what fills up a sequence, which is 0 without one.
    """

    sot_token_id: int | None
    eot_token_id: int

    def encode(self, text: str) -> list[int]:
        """The tokens between start and end. A space in front says that other text precedes."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


def as_tokenizer(tokenizer: Any) -> Tokenizer:
    """A tokenizer of open_clip (SimpleTokenizer, HFTokenizer, SigLipTokenizer) or of transformers,
    or one that is a Tokenizer already.

    Raises TypeError for anything else, ValueError for one that frames texts with more than a start
    token and an end token.
    """
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    if hasattr(inner, "convert_ids_to_tokens"):
        return HuggingFaceTokenizer(tokenizer, inner)
    if hasattr(tokenizer, "eot_token_id"):
        return tokenizer
    raise TypeError(
        f"tokenizer: expected one of open_clip or of transformers, got {type(tokenizer).__name__}"
    )


class HuggingFaceTokenizer:
    """A tokenizer of transformers, alone or in open_clip's wrapper, which cleans texts.

    The special tokens are those it puts around a text itself.
    """

    def __init__(self, wrapper: Any, inner: Any) -> None:
        if getattr(wrapper, "tokenizer_mode", ""):
            raise ValueError(
                f"tokenizer: its mode {wrapper.tokenizer_mode!r}, with a class token behind the "
                "padding, is not supported"
            )
        self._inner = inner
        self._clean = _cleaning(wrapper)
        plain = inner.encode("a", add_special_tokens=False)
        framed = inner.encode("a", add_special_tokens=True)
        starts = range(len(framed) - len(plain) + 1)
        start = next((i for i in starts if framed[i : i + len(plain)] == plain), 0)
        before, after = framed[:start], framed[start + len(plain) :]
        if len(before) > 1 or len(after) != 1:
            raise ValueError(
                "tokenizer: expected at most one token before a text and one after it, got "
                f"{inner.convert_ids_to_tokens(before)} and {inner.convert_ids_to_tokens(after)}"
            )
        self.sot_token_id: int | None = before[0] if before else None
        self.eot_token_id: int = after[0]
        if getattr(wrapper, "strip_sep_token", False) and self.eot_token_id == inner.sep_token_id:
            self.eot_token_id = 0
        self.pad_token_id: int = 0 if inner.pad_token_id is None else inner.pad_token_id

    @property
    def vocab_size(self) -> int:
        return len(self._inner)

    def encode(self, text: str) -> list[int]:
        clean = self._clean(text)
        # Some vocabularies have a word with the space before it and without one.
        if text[:1].isspace():
            clean = " " + clean.lstrip()
        return list(self._inner.encode(clean, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        return self._inner.decode(list(ids))


def _cleaning(wrapper: Any) -> Callable[[str], str]:
    """What a wrapper of open_clip does to a text first."""
    if hasattr(wrapper, "clean_fn"):
        return wrapper.clean_fn
    if type(wrapper).__name__ == "SigLipTokenizer":
        from open_clip.tokenizer import get_clean_fn

        return get_clean_fn("canonicalize")
    return str.strip


@dataclass(frozen=True, eq=False)
class PromptTokens:
    """What follows the context, one run a class.

    template: as given to ``tokenize_names``. suffix: int64 [C, S], the tokens after the context up
    to and including EOT, padded with 0. lengths: int64 [C], how many of them count.
    name_lengths: int64 [C], tokens of the name itself. between: how many tokens at the front of
    every run stand between the context and the name ("of a" in IVLP and MaPLe). sot, eot: the ids
    of the first token, None where texts begin without one, and of the last. pad: the id that fills
    up whole sequences. pools: which of open_clip's ways to find the token that is read find EOT:
    "argmax" where no id is as large, "eos" where none is the same. has_context: whether the
    template names a context. separable: whether every text can be split behind as many tokens as
    its name has by itself, as CoOp splits it: where the tokenizer joins the name's last sign to
    what follows, as ")" and ".", that goes with the name. longest: the class name with the most
    tokens, and how many its run has. They stay on the CPU, and what is asked at every step are
    Python values: to read either stalls no GPU.
    """

    template: str
    suffix: Tensor
    lengths: Tensor
    name_lengths: Tensor
    between: int
    sot: int | None
    eot: int
    pad: int
    pools: frozenset[str]
    has_context: bool
    separable: bool
    longest: tuple[str, int]
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)
    _number: str = field(default_factory=lambda: str(next(_NUMBERS)), init=False, repr=False)

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
        # Formatted, since torch.compile makes a symbol of a number that changes between calls.
        _make_layout(f"{self._number}", *key)
        return self._made[key]

    def part(self, start: int, stop: int) -> PromptTokens:
        """The classes from ``start`` to ``stop``."""
        if (start, stop) == (0, len(self)):
            return self
        return self.once(("part", start, stop), lambda: self.select(torch.arange(start, stop)))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` made of these tokens when first asked for ``key``."""
        if key not in self._made:
            # Tensors of inference mode could not be used in training later on.
            with torch.inference_mode(False):
                self._made[key] = make()
        return self._made[key]

    def check_fits(self, n_ctx: int, context_length: int) -> None:
        """Raise ValueError, naming the longest class, if SOS + n_ctx + its tokens do not fit."""
        name, length = self.longest
        most = context_length - (self.sot is not None) - length
        if n_ctx > most:
            needed = n_ctx + context_length - most
            hint = f"the most that fits is n_ctx={most}" if most >= 0 else "shorten the name"
            raise ValueError(
                f"n_ctx: {n_ctx} context tokens and the class {name!r} need {needed} "
                f"tokens, but the text tower has {context_length}; {hint}"
            )


def _make_layout(
    number: str, n_ctx: int, per: Per, position: Position, images: int, device: str
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


def tokenize_names(tokenizer: Any, names: Sequence[str], template: str) -> PromptTokens:
    """Lay out class names for ``template``.

    tokenizer: any that ``as_tokenizer`` takes. template: ``"{ctx} {name}."`` for a learned context,
    with frozen words allowed between the two; ``"a photo of a {name}."`` (no ``{ctx}``) for a hard
    prompt. Underscores in names become spaces, and blanks around a name go.
    Raises ValueError for an empty list, an empty name or a template of another form, TypeError for
    a name that is not a string.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"names: expected a non-empty sequence of class names, got {names!r}")
    if template.count("{name}") != 1 or template.count("{ctx}") > 1:
        raise ValueError(
            f"template: expected one {{name}} and at most one {{ctx}}, got {template!r}"
        )
    tokenizer = as_tokenizer(tokenizer)
    has_context = "{ctx}" in template
    if has_context and not template.startswith("{ctx}"):
        raise ValueError(
            f"template: {{ctx}} stands directly after the start of the text, got {template!r}"
        )
    words = template.removeprefix("{ctx}") if has_context else template.lstrip()
    before, after = words.split("{name}")
    between = tokenizer.encode(before.rstrip()) if before.strip() else []
    gap = " " if before[-1:].isspace() else ""

    runs, name_lengths, separable = [], [], True
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"names: expected strings, got {name!r} at position {len(runs)}")
        clean = name.replace("_", " ").strip()
        if not clean:
            raise ValueError(f"names: an empty class name at position {len(runs)}")
        run = tokenizer.encode(f"{before}{clean}{after}".rstrip())
        runs.append([*run, tokenizer.eot_token_id])
        name_ids = tokenizer.encode(f"{gap}{clean}")
        if not name_ids:
            raise ValueError(
                f"names: {name!r} at position {len(runs) - 1} has no token, its signs are dropped"
            )
        name_lengths.append(len(name_ids))
        separable &= len(between) + len(name_ids) < len(runs[-1])

    sot, eot = tokenizer.sot_token_id, tokenizer.eot_token_id
    others = {sot, *(token for run in runs for token in run[:-1])} - {None}
    finds_end = {"argmax": max(others, default=-1) < eot, "eos": eot not in others}

    suffix = torch.zeros(len(runs), max(map(len, runs)), dtype=torch.int64)
    for row, run in zip(suffix, runs, strict=True):
        row[: len(run)] = torch.tensor(run)
    return PromptTokens(
        template=template,
        suffix=suffix,
        lengths=torch.tensor([len(run) for run in runs]),
        name_lengths=torch.tensor(name_lengths),
        between=len(between),
        sot=sot,
        eot=eot,
        pad=getattr(tokenizer, "pad_token_id", 0),
        pools=frozenset(pool for pool, finds in finds_end.items() if finds),
        has_context=has_context,
        separable=separable,
        longest=max(zip(names, map(len, runs), strict=True), key=lambda pair: pair[1]),
    )
