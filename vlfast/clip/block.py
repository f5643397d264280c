"""A CLIP block taken apart, so that only the rows that are read go through each part of it; and
when it can't be."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn import functional

NEEDS_WHOLE = "which needs whole sequences"


def project_qkv(attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Queries, keys and values of normalised rows [..., d]: [..., 3, H, E]."""
    return _project(attn, x, slice(None)).unflatten(-1, (3, attn.num_heads, -1))


def project_queries(attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Queries alone, [..., H, E]."""
    return _project(attn, x, slice(None, attn.embed_dim)).unflatten(-1, (attn.num_heads, -1))


def project_keys_values(attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Keys and values alone, [..., 2, H, E]."""
    rows = _project(attn, x, slice(attn.embed_dim, None))
    return rows.unflatten(-1, (2, attn.num_heads, -1))


def _project(attn: nn.MultiheadAttention, x: Tensor, which: slice) -> Tensor:
    bias = attn.in_proj_bias
    return functional.linear(x, attn.in_proj_weight[which], None if bias is None else bias[which])


def finish_block(block: nn.Module, x: Tensor, attended: Tensor) -> Tensor:
    """What a block makes of rows x [..., d] that attended to [..., H, E]: [..., d]."""
    # nn.MultiheadAttention reads the parameters of its out_proj and never calls it.
    out = block.attn.out_proj
    attended = functional.linear(attended.flatten(-2), out.weight, out.bias)
    scale_1, scale_2 = block._modules.get("ls_1"), block._modules.get("ls_2")
    x = x + (attended if scale_1 is None else scale_1(attended))
    hidden = block.mlp(block.ln_2(x))
    return x + (hidden if scale_2 is None else scale_2(hidden))


def why_block_whole(block: nn.Module) -> str | None:
    """What of a block, in its present state, rules out running it on packed rows."""
    if found := interference(block):
        return f" {found}"
    modules = block._modules
    attn, mlp = modules.get("attn"), modules.get("mlp")
    if type(attn).forward is not nn.MultiheadAttention.forward:
        return f".attn is {type(attn).__name__}, not nn.MultiheadAttention"
    if found := interference(attn):
        return f".attn {found}"
    if not attn._qkv_same_embed_dim:
        return ".attn has separate weights for queries, keys and values"
    if attn.bias_k is not None or attn.add_zero_attn:
        return ".attn attends to a bias or to zeros beside the tokens"
    if mlp is None or "ln_1" not in modules or "ln_2" not in modules:
        return f" is {type(block).__name__}, which is not made of ln_1, attn, ln_2 and mlp"
    training = attn.training or block.training or mlp.training
    if training or any(module.training for module in mlp._modules.values()):
        if attn.training and attn.dropout > 0:
            return ".attn has dropout in training mode"
        if any(_drops(module) for module in block.modules()):
            return " has dropout in training mode"
    return None


def interference(module: nn.Module) -> str | None:
    """What is done around a module when it is called, which taking it apart would skip."""
    state = module.__dict__
    if state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return f"has a forward hook, {NEEDS_WHOLE}"
    if state["_backward_hooks"] or state["_backward_pre_hooks"]:
        return f"has a backward hook, {NEEDS_WHOLE}"
    if "forward" in state or "attention" in state:
        return f"has methods replaced in this instance, {NEEDS_WHOLE}"
    return None


def _drops(module: nn.Module) -> bool:
    """Whether it is a dropout (of units or of paths) that is at work."""
    if not module.training or "Drop" not in type(module).__name__:
        return False
    return (getattr(module, "p", None) or getattr(module, "drop_prob", None) or 0) > 0


def is_read(module: nn.Module, known: Collection[str]) -> bool:
    """Whether its class, by its full name, is one of those known."""
    return f"{type(module).__module__}.{type(module).__qualname__}" in known


def block_kind(block: nn.Module) -> tuple[object, ...]:
    """Equal for blocks that were built alike: forks give blocks of one class different tasks."""
    plain = (bool, int, float, str, type(None))
    options = {k: v for k, v in vars(block).items() if k != "training" and isinstance(v, plain)}
    parts = [name for name, _ in block.named_parameters()]
    return type(block), tuple(sorted(options.items())), tuple(parts)


@torch.no_grad()
def differ(
    ours: Callable[[], Tensor],
    theirs: Callable[[], Tensor],
    *,
    slack: float,
    device: torch.device,
    what: str,
) -> str | None:
    """``what``, unless both give the same but for rounding."""
    try:
        with torch.autocast(device.type, enabled=False):
            expected, found = theirs(), ours()
        # Matrix products may round to TF32 where the dtype is fp32.
        tolerance = max(16 * torch.finfo(expected.dtype).eps, 2e-3)
        expected, found = expected.double(), found.double()
        limit = tolerance * float(expected.abs().max()) + slack
        same = expected.shape == found.shape and float((found - expected).abs().max()) <= limit
    except Exception as error:
        return f"{what} (tried on random input: {_first_line(error)})"
    return None if same else what


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
