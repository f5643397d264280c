"""Where the context vectors of a call stand among its packed rows."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vlfast.clip.prompt_layout import vectors_before_name
from vlfast.dropin.packed_prompts import Packing
from vlfast.dropin.text_encoder import TrainingCall


@dataclass(frozen=True, eq=False)
class ContextRows:
    """Each context vector once for every state that predicts it.

    vectors, states: int64 [N], rows of the vectors and of what stands before them. weights: fp64
    [N], the share of each in the mean over classes, images and vectors; None where all are equal.
    """

    vectors: Tensor
    states: Tensor
    weights: Tensor | None

    @classmethod
    def of(cls, packing: Packing, ends: Tensor, places: Tensor) -> ContextRows:
        """ends: int64 [C], the positions of EOT. places: int64 [C, n], those of the vectors; a
        vector stands in the prefix for all classes or for none."""
        shared, images = packing.shared, packing.images
        sizes = ends + 1 - shared
        starts = (sizes.cumsum(0) - sizes)[:, None] - shared
        image = torch.arange(images)[:, None, None]

        def rows(of: Tensor, starts: Tensor) -> Tensor:
            in_run = images * shared + image * int(sizes.sum()) + starts + of
            return torch.where(of < shared, image * shared + of, in_run).flatten()

        common = (places < shared).all(0)
        # A prefix row serves all classes.
        once, each = places[:1, common], places[:, ~common]
        vectors = torch.cat([rows(once, starts[:1]), rows(each, starts)])
        states = torch.cat([rows(once - 1, starts[:1]), rows(each - 1, starts)])
        weights = None
        if once.numel() and each.numel():
            weights = torch.ones(len(vectors), dtype=torch.float64)
            weights[: images * once.numel()] = len(places)
            weights = (weights / weights.sum()).to(packing.runs.device)
        device = packing.runs.device
        return cls(vectors.to(device), states.to(device), weights)


_made: WeakKeyDictionary[Packing, dict[Hashable, ContextRows]] = WeakKeyDictionary()


def context_rows(learner: nn.Module | None, call: TrainingCall) -> ContextRows:
    """Of a call whose prompts ``learner`` assembled. Raises ValueError where it has no context
    vectors, or where they stand can't be told."""
    if not isinstance(getattr(learner, "ctx", None), Tensor):
        raise ValueError("perplexity: the prompt learner has no context vectors, ctx")
    position = getattr(learner, "class_token_position", "end")
    key = None if position == "end" else tuple(_classes(learner, call.tokenized))
    made = _made.setdefault(call.packing, {})
    if key not in made:
        made[key] = next(_candidates(learner, call, position), None)
    if made[key] is None:
        raise ValueError(
            "perplexity: where the context vectors stand can't be told: the prompts hold the "
            f"learner's ctx neither at class_token_position {position!r} nor behind SOS"
        )
    return made[key]


def _candidates(learner: nn.Module, call: TrainingCall, position: str) -> Iterator[ContextRows]:
    """KgCoOp and MoPD keep a position that they do not ask: the values tell."""
    ends = call.tokenized.argmax(dim=-1).cpu()
    n_ctx = learner.ctx.shape[-2]
    vector = torch.arange(1, 1 + n_ctx)
    behind_start = vector.expand(len(ends), -1)
    if position == "end":
        yield ContextRows.of(call.packing, ends, behind_start)
        return
    classes = torch.tensor(_classes(learner, call.tokenized))
    lengths = torch.as_tensor(learner.name_lens)[classes]
    moved = vector > vectors_before_name(n_ctx, position)
    for places in (behind_start + lengths[:, None] * moved, behind_start):
        if not (places < ends[:, None]).all():
            continue
        rows = ContextRows.of(call.packing, ends, places)
        if torch.equal(call.rows[rows.vectors], _expected(learner, call, classes, places)):
            yield rows


def _expected(learner: nn.Module, call: TrainingCall, classes: Tensor, places: Tensor) -> Tensor:
    """The vectors that ``ContextRows.vectors`` name, [N, d], of one image."""
    context = learner.ctx.detach().to(call.rows)
    each = context[classes] if context.ndim == 3 else context.expand(len(classes), -1, -1)
    common = (places < call.packing.shared).all(0)
    return torch.cat([each[0, common], each[:, ~common].flatten(0, 1)])


def _classes(learner: nn.Module, tokenized: Tensor) -> list[int]:
    """Which of the learner's classes stand in the rows of ``tokenized``: KDPL draws some."""
    known = learner.tokenized_prompts
    if tokenized is known:
        return list(range(len(known)))
    number = {row.numpy().tobytes(): i for i, row in enumerate(known.cpu())}
    try:
        return [number[row.numpy().tobytes()] for row in tokenized.cpu()]
    except KeyError:
        raise ValueError(
            "perplexity: the text encoder was called with tokens of classes that the prompt "
            "learner does not have"
        ) from None
