"""The first calls, computed both ways on a few classes: features and gradients must be the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Of the largest magnitude: of features, and of the gradient to each learnable tensor.
FEATURES = 1e-5
GRADIENTS = 1e-4
CLASSES = 8

_HALF = (torch.float16, torch.bfloat16)


def few_classes(tokenized: Tensor) -> Tensor:
    """At most 8 class numbers, int64 on the CPU, the shortest and the longest names among them."""
    order = tokenized.argmax(dim=-1).cpu().argsort(stable=True)
    places = torch.linspace(0, len(order) - 1, min(CLASSES, len(order))).round().long()
    return order[places]


def graph_of(tensors: Iterable[Any]) -> tuple[list[Tensor], frozenset[str]]:
    """The leaf tensors that gradients of ``tensors`` reach, each once, and the names of the
    operations in between."""
    tensors = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]
    found = {id(t): t for t in tensors if t.grad_fn is None}
    nodes = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return list(found.values()), frozenset(node.name() for node in seen)


def difference(
    ours: Callable[[], Any], theirs: Any, exact: Callable[[], Tensor], autocast: bool
) -> str | None:
    """What differs between ``ours()`` and the codebase's own result ``theirs``, or None.

    Where theirs has a graph, the gradients of all leaves that it reaches are compared, too. In half
    precision and under autocast both are compared with ``exact()``, the codebase's own way in fp32:
    ours may be no further from it than a few times the original.
    """
    if not isinstance(theirs, Tensor):
        return f"its text encoder returns a {type(theirs).__name__}, not features"
    try:
        found = ours()
    except Exception as error:
        return f"the shared way fails on it ({_first_line(error)})"
    if found.shape != theirs.shape or found.dtype != theirs.dtype:
        return (
            f"features {tuple(theirs.shape)} {theirs.dtype} became "
            f"{tuple(found.shape)} {found.dtype}"
        )
    rounded = autocast or theirs.dtype in _HALF
    right = exact() if rounded else theirs
    slack = _slack(theirs.dtype, autocast)
    if said := _far("features differ", found, theirs, right, max(FEATURES, slack), 2):
        return said
    leaves, _ = graph_of([theirs])
    if not leaves:
        return "features have a graph on one side" if found.requires_grad else None
    if not found.requires_grad:
        return "features lost their graph"
    return _gradient_difference(found, theirs, right if rounded else None, leaves, slack)


def _gradient_difference(
    ours: Tensor, theirs: Tensor, exact: Tensor | None, leaves: Sequence[Tensor], slack: float
) -> str | None:
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(theirs.shape, generator=generator).to(theirs.device)

    def gradients(features: Tensor, scale: float = 1.0) -> tuple[Tensor | None, ...]:
        given = (scale * upstream).to(features.dtype)
        found = torch.autograd.grad(features, leaves, given, retain_graph=True, allow_unused=True)
        return tuple(None if g is None else g.double() / scale for g in found)

    # A gradient is linear in what comes from above, but for rounding: what the original's own
    # rounding does (MaPLe's deep prompts go through fp16 in fp32 models, too) shows at another
    # scale.
    of_ours, of_theirs = gradients(ours), gradients(theirs)
    right = gradients(theirs, 1.37) if exact is None else gradients(exact)
    for leaf, mine, other, true in zip(leaves, of_ours, of_theirs, right, strict=True):
        what = f"the gradient to a tensor {tuple(leaf.shape)}"
        if other is None and mine is None:
            continue
        if other is None or mine is None:
            given = mine if other is None else other
            if bool(given.any()):
                return f"{what} is missing on one side"
            continue
        true = other if true is None else true
        if said := _far(f"{what} differs", mine, other, true, max(GRADIENTS, slack), 3):
            return said
    return None


@torch.no_grad()
def _far(
    what: str, ours: Tensor, theirs: Tensor, right: Tensor, limit: float, times: float
) -> str | None:
    """Whether ours is further from what is right than theirs is ``times`` over, and ``limit``."""
    right, theirs, ours = right.double(), theirs.double(), ours.double()
    largest = max(float(right.abs().max()), torch.finfo(torch.float32).tiny)
    limit += times * float((theirs - right).abs().max()) / largest
    error = float((ours - right).abs().max()) / largest
    if error <= limit:
        return None
    return f"{what} by {error:.1e} of the largest, more than {limit:.1e}"


def _slack(dtype: torch.dtype, autocast: bool) -> float:
    if dtype in _HALF:
        return 2 * torch.finfo(dtype).eps
    return 2 * torch.finfo(torch.bfloat16).eps if autocast else 0.0


def in_fp32(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """A copy of class ``cls`` that computes in fp32 with the weights of ``module``, through which
    autograd reaches them. Like a replica of nn.DataParallel it has no parameters of its own."""
    twins: dict[nn.Module, nn.Module] = {}

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype in _HALF:
            return value.float()
        return torch.float32 if isinstance(value, torch.dtype) and value in _HALF else value

    def twin(part: nn.Module, cls: type[nn.Module]) -> nn.Module:
        if part not in twins:
            new = twins[part] = cls.__new__(cls)
            own = {k: widen(v) for k, v in part.__dict__.items()}
            tensors = {**part._parameters, **part._buffers}
            own |= {k: widen(v) for k, v in tensors.items()}
            own |= {"_parameters": {}, "_buffers": {}}
            new.__dict__ = own
            children = part._modules.items()
            new.__dict__["_modules"] = {
                k: None if child is None else twin(child, type(child)) for k, child in children
            }
        return twins[part]

    return twin(module, cls)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
