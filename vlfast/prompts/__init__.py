"""Where learnable tokens live. One file a kind; ``build_prompts`` makes one by its name."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature

from vlfast.clip.models import ClipModel
from vlfast.clip.text_tower import Position
from vlfast.errors import unknown_name
from vlfast.prompts.base import Prompts
from vlfast.prompts.conditional import ConditionalContext
from vlfast.prompts.context import ClassContext, SharedContext
from vlfast.prompts.coupled import CoupledPrompts
from vlfast.prompts.depth import tower_blocks
from vlfast.prompts.ensemble import EnsemblePrompt
from vlfast.prompts.finetune import FineTunedImages
from vlfast.prompts.hard import HardPrompt
from vlfast.prompts.independent import IndependentPrompts
from vlfast.prompts.visual import VisualPrompts

__all__ = [
    "KINDS",
    "ClassContext",
    "ConditionalContext",
    "CoupledPrompts",
    "EnsemblePrompt",
    "FineTunedImages",
    "HardPrompt",
    "IndependentPrompts",
    "Prompts",
    "SharedContext",
    "VisualPrompts",
    "build_prompts",
    "tower_blocks",
]

KINDS: dict[str, type[Prompts]] = {
    kind.kind: kind
    for kind in (
        HardPrompt,
        EnsemblePrompt,
        SharedContext,
        ClassContext,
        ConditionalContext,
        VisualPrompts,
        IndependentPrompts,
        CoupledPrompts,
        FineTunedImages,
    )
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
    """Prompts of this kind for ``num_classes`` classes; the options are those of PromptsConfig.

    Options that a kind has no use for are ignored: ``position`` is for shared and class_specific
    contexts (other contexts have the name at the end, and refuse another), ``depth`` for
    independent and coupled prompts, ``n_visual`` and ``visual_depth`` for visual and independent
    ones. Raises UnknownNameError for an unknown kind, ValueError for options that do not fit, or
    that the model's towers are not deep enough for (see ``tower_blocks``).
    """
    if kind not in KINDS:
        raise unknown_name("prompts", kind, KINDS)
    if kind in ("conditional", "independent", "coupled") and position != "end":
        raise ValueError(
            f"position: {kind} prompts need the class name at the end, got {position!r}"
        )
    offered = {
        "num_classes": num_classes,
        "n_ctx": n_ctx,
        "init": init,
        "position": position,
        "depth": depth,
        "n_visual": n_visual,
        "visual_depth": visual_depth,
    }
    if kind == HardPrompt.kind:
        return HardPrompt()
    if kind == EnsemblePrompt.kind:
        return EnsemblePrompt() if templates is None else EnsemblePrompt(templates)
    taken = signature(KINDS[kind].__init__).parameters
    return KINDS[kind](clip, **{name: value for name, value in offered.items() if name in taken})
