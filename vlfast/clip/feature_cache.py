"""Features that are computed once: they hold as long as nothing that they come from changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor, nn

# Which modules there are, where their parameters lie, and how often they were written in place.
Stamp = tuple[tuple[int, int], ...]


class FeatureCache:
    """Keeps what some modules computed until one of them is replaced, or one of their parameters
    moved, replaced or written to (not by way of ``.data``, whose writes PyTorch does not count).

    What it hands out is shared: where a caller writes to it, it is made anew for the next.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Stamp, Tensor, int]] = {}

    def get(self, modules: Iterable[nn.Module], make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` returns without autograd, in the autocast mode of now. It depends on
        ``modules`` alone, each with its own parameters."""
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return make()
        stamp, mode = _stamp(modules), _autocast_mode()
        if stamp is not None and mode in self._kept:
            made_from, features, version = self._kept[mode]
            if made_from == stamp and features._version == version:
                return features
        # Tensors of inference mode could not be used in training later on.
        with torch.inference_mode(False), torch.no_grad():
            features = make()
        if stamp is not None:
            self._kept[mode] = (stamp, features, features._version)
        return features


def _stamp(modules: Iterable[nn.Module]) -> Stamp | None:
    """None where nothing can be kept: in inference mode writes are not counted, and a hook may do
    anything."""
    stamp = []
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        stamp.append((id(module), module.training))
        for weight in module._parameters.values():
            if weight is None:
                continue
            if weight.is_inference():
                return None
            stamp.append((weight.data_ptr(), weight._version))
    return tuple(stamp)


def _autocast_mode() -> tuple[torch.dtype | None, ...]:
    return tuple(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for device in ("cpu", "cuda")
    )
