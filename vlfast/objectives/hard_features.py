"""Class features of the frozen CLIP's own text tower, from hard prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vlfast.clip.models import ClipModel
from vlfast.clip.words import check_vocabulary

NAMES_AT_ONCE = 2048


@torch.no_grad()
def hard_features(clip: ClipModel, classnames: Sequence[str], template: str) -> Tensor:
    """Class features [C, D] of the names in ``template``, which holds one ``{}``; not normalised.
    Names go in parts, so that a dictionary fits into memory."""
    tower, parts = clip.text_tower, []
    for start in range(0, len(classnames), NAMES_AT_ONCE):
        names = classnames[start : start + NAMES_AT_ONCE]
        tokens = tower.tokenize(names, template.format("{name}"))
        parts.append(tower(None, tokens).features.float())
    return torch.cat(parts)


def pool_features(
    clip: ClipModel, classnames: Sequence[str], templates: Sequence[str], what: str
) -> Iterator[Tensor]:
    """``hard_features`` of each template in turn. ``what`` names the pool in a warning about words
    that the model never trained."""
    check_vocabulary(clip, [template.replace("{}", " ") for template in templates], what)
    for template in templates:
        yield hard_features(clip, classnames, template)
