"""One image's prompts among those of many: CoCoOp's loop, as the text encoder sees it."""

from __future__ import annotations

from torch import Tensor, nn

from vlfast.dropin.swap import parameter_names


def is_conditional(learner: nn.Module | None) -> bool:
    """As [CoOp] trainers/cocoop.py: a context for each image. [KgCoOp] has a meta_net, too, that it
    never asks."""
    if not hasattr(learner, "meta_net"):
        return False
    return "im_features" in parameter_names(learner)[:1]


def image_batch(prompts: Tensor) -> tuple[Tensor, int] | None:
    """The prompts [B, C, L, d] of several images that ``prompts`` [C, L, d] is a view of, as a loop
    over them gives it, and which of them it is; None where it is none."""
    batch = None if prompts.is_inference() else prompts._base
    if batch is None or batch.ndim != 4 or len(batch) == 1 or not batch.is_contiguous():
        return None
    if prompts.requires_grad != batch.requires_grad or prompts.dtype != batch.dtype:
        return None
    if prompts.shape != batch.shape[1:] or prompts.stride() != batch.stride()[1:]:
        return None
    image, inside = divmod(prompts.storage_offset() - batch.storage_offset(), batch.stride(0))
    return None if inside else (batch, image)
