"""Exchanging a module's class for one that computes the same faster, and back.

The class is exchanged, not the instance's forward: the replicas of nn.DataParallel are made from
the class and must see their own weights. Copies and pickles are accelerated as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import nn

STATE = "_vlfast"


class Swapped:
    """Mixin of classes that stand in for a codebase's own. ``original_class`` is that one."""

    original_class: type[nn.Module]

    def __reduce_ex__(self, protocol: int) -> Any:
        mixin = type(self).__bases__[0]
        get_state = getattr(super(), "__getstate__", None)
        state = dict(self.__dict__) if get_state is None else get_state()
        return _blank, (mixin, self.original_class), state


def swap(module: nn.Module, mixin: type[Swapped], state: Any) -> None:
    """Let ``module`` be of its class with ``mixin`` in front."""
    module.__dict__[STATE] = state
    module.__class__ = swapped_class(mixin, type(module))


def unswap(module: nn.Module) -> None:
    """Undo ``swap``."""
    module.__class__ = type(module).original_class
    module.__dict__.pop(STATE, None)


def is_swapped(module: Any) -> bool:
    return isinstance(module, Swapped)


def is_replica(module: nn.Module) -> bool:
    """Whether nn.DataParallel made it for one forward: its weights are plain attributes."""
    return getattr(module, "_is_replica", False)


def original_class(module: nn.Module) -> type[nn.Module]:
    return type(module).original_class if is_swapped(module) else type(module)


def original_forward(module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
    """What the codebase's own class computes."""
    return original_class(module).forward(module, *arguments, **keywords)


@cache
def swapped_class(mixin: type[Swapped], original: type[nn.Module]) -> type[nn.Module]:
    """The class of ``original`` with ``mixin`` in front; it goes by the original's name."""
    attributes = {
        "original_class": original,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (mixin, original), attributes)


def parameter_names(module: nn.Module) -> Sequence[str]:
    """Of the arguments that the codebase's own forward takes by position, but for ``self``."""
    return _parameter_names(original_class(module).forward)


@cache
def _parameter_names(function: Callable[..., Any]) -> Sequence[str]:
    parameters = inspect.signature(function).parameters.values()
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in by_position][1:]


def _blank(mixin: type[Swapped], original: type[nn.Module]) -> nn.Module:
    cls = swapped_class(mixin, original)
    return cls.__new__(cls)
