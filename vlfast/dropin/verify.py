"""The first call, computed both ways on a few classes: features and gradients must be the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Of the largest magnitude: of features, and of the gradient to each learnable tensor.
FEATURES = 1e-5
GRADIENTS = 1e-4
CLASSES = 8

Forward = Callable[[nn.Module, Tensor, Tensor, Sequence[Any]], Tensor | None]


def few_classes(tokenized: Tensor) -> Tensor:
    """At most 8 class numbers, the shortest and the longest names among them."""
    order = tokenized.argmax(dim=-1).cpu().argsort(stable=True)
    places = torch.linspace(0, len(order) - 1, min(CLASSES, len(order))).round().long()
    return order[places].to(tokenized.device)


def difference(
    encoder: nn.Module,
    original: Forward,
    ours: Forward,
    prompts: Tensor,
    tokenized: Tensor,
    rest: Sequence[Any],
    learned: Sequence[Tensor],
) -> str | None:
    """What differs between the two ways on a few classes, or None.

    prompts: [C, L, d], with its graph to ``learned``, whose gradients are compared where autograd
    is on. In half precision and under autocast both are compared with fp32: ours may be no further
    from it than twice the original.
    """
    index = few_classes(tokenized)
    prompts, tokenized = prompts[index], tokenized[index.to(tokenized.device)]
    theirs = original(encoder, prompts, tokenized, rest)
    found = ours(encoder, prompts, tokenized, rest)
    if found is None:
        return "deep prompts do not replace the context of all classes"
    if said := _compare_features(
        found, theirs, lambda: _in_fp32(encoder, original, prompts, tokenized, rest)
    ):
        return said
    learned = [t for t in learned if t.requires_grad]
    if not (torch.is_grad_enabled() and learned and theirs.requires_grad):
        return None
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(theirs.shape, generator=generator).to(theirs.device)

    def gradients(features: Tensor, scale: float = 1.0) -> list[Tensor | None]:
        given = (scale * upstream).to(features.dtype)
        found = torch.autograd.grad(features, learned, given, retain_graph=True, allow_unused=True)
        return [None if g is None else g.double() / scale for g in found]

    # A gradient is linear in what comes from above, but for rounding: what the original's own
    # rounding does (MaPLe's deep prompts go through fp16 in fp32 models, too) shows at another
    # scale.
    of_theirs, scaled, of_ours = gradients(theirs), gradients(theirs, 1.37), gradients(found)
    for tensor, mine, other, again in zip(learned, of_ours, of_theirs, scaled, strict=True):
        name = f"the gradient to a tensor {tuple(tensor.shape)}"
        if (mine is None) != (other is None):
            return f"{name} is missing on one side"
        if mine is None:
            continue
        largest = max(float(other.abs().max()), torch.finfo(torch.float32).tiny)
        error = float((mine - other).abs().max()) / largest
        limit = max(GRADIENTS, 3 * float((again - other).abs().max()) / largest)
        if not error <= limit:
            return f"{name} differs by {error:.1e} of the largest, more than {limit:.1e}"
    return None


def _compare_features(ours: Tensor, theirs: Tensor, exact: Callable[[], Tensor]) -> str | None:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return (
            f"features {tuple(theirs.shape)} {theirs.dtype} became {tuple(ours.shape)} {ours.dtype}"
        )
    limit, right = FEATURES, theirs
    with torch.no_grad():
        if theirs.dtype in (torch.float16, torch.bfloat16):
            right = exact()
        right, theirs, ours = right.double(), theirs.double(), ours.double()
        largest = max(float(right.abs().max()), torch.finfo(torch.float32).tiny)
        limit = max(limit, 2 * float((theirs - right).abs().max()) / largest)
        error = float((ours - right).abs().max()) / largest
    if error <= limit:
        return None
    return f"features differ by {error:.1e} of the largest, more than {limit:.1e}"


def _in_fp32(
    encoder: nn.Module, original: Forward, prompts: Tensor, tokenized: Tensor, rest: Sequence[Any]
) -> Tensor:
    """The original's features by a copy in fp32."""
    twin = copy.deepcopy(encoder).float()
    if hasattr(twin, "dtype"):
        twin.dtype = torch.float32
    with torch.autocast(prompts.device.type, enabled=False):
        return original(twin, prompts.float(), tokenized, rest)
