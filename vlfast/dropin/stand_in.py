"""Standing for a tensor that nobody has built yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_OPERATORS = (
    *("add", "sub", "mul", "truediv", "matmul", "pow"),
    *("radd", "rsub", "rmul", "rtruediv", "rmatmul"),
    *("neg", "eq", "ne", "lt", "le", "gt", "ge"),
)
_CONVERSIONS = ("to", "cuda", "cpu", "type", "half", "float", "double", "bfloat16", "contiguous")


class StandIn:
    """Stands for the tensor ``tensor()``. Who asks more of it than its shape, dtype and device gets
    that tensor, as the argument of torch's functions, too."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def build(self) -> Tensor:
        raise NotImplementedError

    def tensor(self) -> Tensor:
        """Always the same one, with a graph or without."""
        built = self.__dict__.setdefault("_built", {})
        mode = torch.is_grad_enabled()
        if mode not in built:
            built[mode] = self.build()
        return built[mode]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        return self.tensor()[key]

    def __iter__(self) -> Any:
        return iter(self.tensor())

    def __bool__(self) -> bool:
        return bool(self.tensor())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function(*as_tensors(args), **as_tensors(kwargs or {}))

    __hash__ = object.__hash__


def as_tensors(value: Any) -> Any:
    """``value`` with the tensors in place of what stands for them."""
    if isinstance(value, StandIn):
        return value.tensor()
    if type(value) in (list, tuple):
        return type(value)(map(as_tensors, value))
    if type(value) is dict:
        return {k: as_tensors(v) for k, v in value.items()}
    return value


def _operator(name: str) -> Callable[..., Any]:
    def method(self: StandIn, *others: Any) -> Any:
        return getattr(self.tensor(), name)(*as_tensors(others))

    return method


def _conversion(name: str) -> Callable[..., Any]:
    def method(self: StandIn, *args: Any, **kwargs: Any) -> Any:
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        found = getattr(empty, name)(*args, **kwargs)
        same = isinstance(found, Tensor) and (found.dtype, found.device) == (
            self.dtype,
            self.device,
        )
        return self if same else getattr(self.tensor(), name)(*args, **kwargs)

    return method


for _name in _OPERATORS:
    setattr(StandIn, f"__{_name}__", _operator(f"__{_name}__"))
for _name in _CONVERSIONS:
    setattr(StandIn, _name, _conversion(_name))
