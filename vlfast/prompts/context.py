"""Context vectors in the text tower's input: shared by all classes (CoOp), or one set a class."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from vlfast.clip.models import ClipModel
from vlfast.clip.text_tower import Position, TextOutput
from vlfast.clip.tokens import PromptTokens
from vlfast.clip.words import check_vocabulary
from vlfast.prompts.base import Prompts

INIT_STD = 0.02  # CoOp's normal initialisation
PADDED = "template:"  # before words that zeros fill up to n_ctx


def initial_context(clip: ClipModel, n_ctx: int | None, init: str | None) -> Tensor:
    """The vectors a context starts from, fp32 [n_ctx, d].

    init: words whose token embeddings are taken (the first n_ctx of them; n_ctx None means all),
    or None for N(0, 0.02) from torch's global generator. Words behind "template:" all stand at the
    end of the context, zeros before them (ProGrad). Raises ValueError where n_ctx does not fit.
    """
    if init is None:
        check_count("n_ctx", n_ctx)
        return torch.randn(n_ctx, clip.text_tower.width) * INIT_STD
    padded, init = init.startswith(PADDED), init.removeprefix(PADDED)
    check_vocabulary(clip, [init], "init")
    words = clip.text_tower.embed_words(init).float().cpu()
    n_ctx = len(words) if n_ctx is None else n_ctx
    if padded:
        if n_ctx < len(words):
            raise ValueError(
                f"n_ctx: expected at least {len(words)}, the tokens of the template's words "
                f"{init.strip()!r}, got {n_ctx}"
            )
        return torch.cat([words.new_zeros(n_ctx - len(words), words.shape[1]), words])
    check_count(
        "n_ctx",
        n_ctx,
        len(words),
        f"the tokens of init={init!r}",
        "; without init the context is drawn at random, of any length",
    )
    return words[:n_ctx].clone()


def init_of_template(template: str) -> str:
    """``init`` for the words of a dataset's template before the class name, as ProGrad starts
    ([Kg] trainers/prograd.py:78-95, which counts words where this counts tokens, and so drops the
    last word of templates with a comma). ValueError where the template begins with the name."""
    words = template.partition("{}")[0].strip()
    if not words:
        raise ValueError(
            f"init: the template {template!r} has no words before the class name to start from; "
            "give words of your own (--prompts.init), or none for a random start"
        )
    return f"{PADDED} {words}"


def words_behind(clip: ClipModel, n_ctx: int, init: str | None) -> str:
    """The words of ``init`` behind its first ``n_ctx`` tokens, which stay as they are: of "a photo
    of a", "of a" for 2 ([MaPLe] trainers/maple.py). None of a template's, which are all learned.
    ValueError where they can't be told apart."""
    if init is None or init.startswith(PADDED):
        return ""
    tokenizer = clip.tokenizer
    rest = tokenizer.encode(init)[n_ctx:]
    words = tokenizer.decode(rest).strip() if rest else ""
    # With a space in front, since other words precede.
    if (tokenizer.encode(f" {words}") if words else []) != list(rest):
        raise ValueError(
            f"n_ctx: expected a count that parts init={init!r} between words, got {n_ctx}"
        )
    return words


def check_count(
    name: str, value: object, most: int | None = None, what: str = "", hint: str = ""
) -> None:
    """Raise ValueError unless ``value`` is an integer from 1 to ``most``, which is ``what``."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 1 or (most is not None and value > most):
        wanted = "at least 1" if most is None else f"1 to {most}, {what}"
        raise ValueError(f"{name}: expected {wanted}, got {value}{hint}")


class SharedContext(Prompts):
    """One context for all classes: CoOp (arXiv 2109.01134), section 3.2, unified context.

    context: fp32 [n_ctx, d].
    """

    kind = "shared"

    def __init__(
        self,
        clip: ClipModel,
        *,
        n_ctx: int | None = 16,
        init: str | None = None,
        position: Position = "end",
    ) -> None:
        super().__init__()
        self.position: Position = position
        self.context = nn.Parameter(initial_context(clip, n_ctx, init))

    def encode(
        self,
        clip: ClipModel,
        tokens: PromptTokens,
        index: Tensor | None = None,
        images: Tensor | None = None,
    ) -> TextOutput:
        return clip.text_tower(self.context, tokens, per="all", position=self.position, index=index)

    def context_vectors(self, images: Tensor | None = None) -> Tensor:
        return self.context


class ClassContext(Prompts):
    """A context of its own for each class: CoOp (arXiv 2109.01134), section 3.2, class-specific.

    context: fp32 [C, n_ctx, d]. It knows only the classes it was made for.
    """

    kind = "class_specific"
    class_bound = True

    def __init__(
        self,
        clip: ClipModel,
        *,
        num_classes: int,
        n_ctx: int | None = 16,
        init: str | None = None,
        position: Position = "end",
    ) -> None:
        super().__init__()
        if init is not None:
            warnings.warn(
                "init: CoOp draws class-specific contexts at random; every class now starts from "
                f"the words {init!r}",
                stacklevel=2,
            )
        self.position: Position = position
        self.context = nn.Parameter(
            torch.stack([initial_context(clip, n_ctx, init) for _ in range(num_classes)])
        )

    def encode(
        self,
        clip: ClipModel,
        tokens: PromptTokens,
        index: Tensor | None = None,
        images: Tensor | None = None,
    ) -> TextOutput:
        return clip.text_tower(
            self.context, tokens, per="class", position=self.position, index=index
        )

    def context_vectors(self, images: Tensor | None = None) -> Tensor:
        return self.context
