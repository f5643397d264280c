"""Where learnable tokens live. One file a kind; ``build_prompts`` makes one by its name."""

from __future__ import annotations

from collections.abc import Sequence

from vlfast.clip.models import ClipModel
from vlfast.clip.text_tower import Position
from vlfast.errors import unknown_name
from vlfast.prompts.base import Prompts
from vlfast.prompts.context import ClassContext, SharedContext
from vlfast.prompts.ensemble import EnsemblePrompt
from vlfast.prompts.hard import HardPrompt

__all__ = [
    "KINDS",
    "ClassContext",
    "EnsemblePrompt",
    "HardPrompt",
    "Prompts",
    "SharedContext",
    "build_prompts",
]

KINDS: dict[str, type[Prompts]] = {
    p.kind: p for p in (HardPrompt, EnsemblePrompt, SharedContext, ClassContext)
}


def build_prompts(
    kind: str,
    clip: ClipModel,
    *,
    num_classes: int,
    n_ctx: int | None = 16,
    init: str | None = None,
    position: Position = "end",
    depth: int = 1,
    n_visual: int | None = None,
    visual_depth: int | None = None,
    templates: Sequence[str] | None = None,
) -> Prompts:
    """Prompts of this kind for ``num_classes`` classes. Options that a kind has no use for are
    ignored. Raises UnknownNameError for an unknown kind, ValueError for options that do not fit."""
    if kind == HardPrompt.kind:
        return HardPrompt()
    if kind == EnsemblePrompt.kind:
        return EnsemblePrompt() if templates is None else EnsemblePrompt(templates)
    if kind == SharedContext.kind:
        return SharedContext(clip, n_ctx=n_ctx, init=init, position=position)
    if kind == ClassContext.kind:
        return ClassContext(
            clip, num_classes=num_classes, n_ctx=n_ctx, init=init, position=position
        )
    raise unknown_name("prompts", kind, KINDS)
