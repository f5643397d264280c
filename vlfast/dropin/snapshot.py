"""The state that a training step starts from, to run it again."""

from __future__ import annotations

import copy
import gc
import random
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class Snapshot:
    """Parameters, buffers, random state, and of the optimisers of these parameters the state, with
    their schedulers' and with every gradient scaler's.

    optimizers: those that were found, wherever they are kept.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        found = [t for m in models for t in (*m.parameters(), *m.buffers())]
        known = {id(tensor) for tensor in found}
        # A step is a closure or a method of a trainer: optimisers may be anywhere.
        live = gc.get_objects()
        self.optimizers = [
            o
            for o in live
            if issubclass(type(o), Optimizer) and known & {id(p) for p in _parameters(o)}
        ]
        found += [p for o in self.optimizers for p in _parameters(o)]
        self._tensors = list({id(t): t for t in found}.values())
        self._copies = [t.detach().clone() for t in self._tensors]
        owners = [
            o
            for o in live
            if (
                issubclass(type(o), LRScheduler)
                and getattr(o, "optimizer", None) in self.optimizers
            )
            or issubclass(type(o), torch.amp.GradScaler)
        ]
        owners = [*self.optimizers, *owners]
        # The state of Dassl's warm-up scheduler holds the next one, and that one its optimiser.
        self._not_copied = {id(o): o for o in owners}
        self._states = [(o, self._copy(o.state_dict())) for o in owners]
        self._random = _random_state()

    @torch.no_grad()
    def restore(self) -> None:
        """All of it as it was, and no gradients. What was not written to is not written to now, so
        that what was computed from it is not computed again."""
        for tensor, kept in zip(self._tensors, self._copies, strict=True):
            if not torch.equal(tensor, kept):
                tensor.copy_(kept)
            tensor.grad = None
        for owner, state in self._states:
            owner.load_state_dict(self._copy(state))
        _set_random_state(self._random)

    def _copy(self, state: dict[str, Any]) -> dict[str, Any]:
        return copy.deepcopy(state, dict(self._not_copied))


def _parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        state["numpy"] = sys.modules["numpy"].random.get_state()
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        sys.modules["numpy"].random.set_state(state["numpy"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
