"""Runs a text encoder the fast way where that gives the same, else the codebase's own."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef

from vlfast.dropin.deep_prompts import deep_prompts
from vlfast.dropin.swap import (
    STATE,
    Swapped,
    is_replica,
    is_swapped,
    original_class,
    original_forward,
    parameter_names,
    unswap,
)
from vlfast.dropin.text_encoder import EncoderState, Reading, encode, is_watched, why_original
from vlfast.dropin.verify import difference, few_classes, graph_of, in_fp32

_KEPT = 16


class AcceleratedTextEncoder(Swapped):
    """In front of a codebase's TextEncoder."""

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        guard: Guard = self.__dict__[STATE]
        for name in parameter_names(self)[len(arguments) :]:
            if name not in keywords:
                break
            arguments = (*arguments, keywords.pop(name))
        if keywords or len(arguments) < 2:
            guard.say("took the codebase's own way, since it is called with other arguments")
            guard.encoder.last.clear()
            return original_forward(self, *arguments, **keywords)
        return guard.run(self, *arguments[:2], arguments[2:])


class Kind(NamedTuple):
    """What a check holds for: prompts of a form and precision, the leaves that learn there, and the
    names of the operations that led from them to the prompts."""

    form: Hashable
    leaves: frozenset[WeakIdRef]
    operations: frozenset[str]


@dataclass
class Guard:
    """What stands between a text encoder and its calls.

    verify: whether to compare with the original. said: what a user should know of its checks, in
    order. off: why the codebase's own way is taken from now on.
    """

    name: str
    encoder: EncoderState
    said: list[str]
    verify: bool = True
    off: str | None = None
    checked: set[Kind] = field(default_factory=set)
    lock: Any = field(default_factory=threading.RLock)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("checked", "lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, checked=set(), lock=threading.RLock())

    def run(
        self, module: nn.Module, prompts: Tensor, tokenized: Tensor, rest: Sequence[Any]
    ) -> Tensor:
        if self.off is None:
            if why := why_original(module, self.encoder, prompts, tokenized, rest):
                self.say(f"took the codebase's own way, since {why}")
                self.encoder.last.clear()
                return original_forward(module, prompts, tokenized, *rest)
            given = _given(module, prompts, rest) if torch.is_grad_enabled() else []
            leaves, operations = graph_of(given)
            kind = Kind(_form(prompts), frozenset(map(WeakIdRef, leaves)), operations)
            if not self.verify or self._is_checked(kind):
                return encode(module, self.encoder, prompts, tokenized, rest, self.reading, kind)
            # Replicas of nn.DataParallel come in threads at once; the first one checks for all.
            with self.lock:
                if self.off is None and not self._is_checked(kind):
                    self.check(module, prompts, tokenized, rest, kind)
            return self.run(module, prompts, tokenized, rest)
        if is_swapped(module) and not is_replica(module):
            unswap(module)
        return original_forward(module, prompts, tokenized, *rest)

    @property
    def reading(self) -> Reading:
        return self.encoder.reading

    def check(
        self,
        module: nn.Module,
        prompts: Tensor,
        tokenized: Tensor,
        rest: Sequence[Any],
        kind: Kind,
    ) -> None:
        """Compare both ways on a few classes; where they differ, try the other readings of the
        codebase, and give up with a warning if none agrees."""
        index = few_classes(tokenized)
        tokenized = tokenized[index.to(tokenized.device)]
        device = prompts.device
        autocast = torch.is_autocast_enabled(device.type)
        # What a checkpoint counts must be the same when it runs the call again.
        unseen = torch.autograd.graph.saved_tensors_hooks(_itself, _itself)
        with unseen, torch.random.fork_rng([device] if device.type == "cuda" else []):
            few = prompts[index.to(device)]
            if is_watched(prompts):
                # What looks at them shall not see the check.
                few = few.detach().requires_grad_()
            theirs = original_forward(module, few, tokenized, *rest)

            def exact() -> Tensor:
                with torch.autocast(device.type, enabled=False):
                    twin = in_fp32(module, original_class(module))
                    return type(twin).forward(twin, few.float(), tokenized, *rest)

            now, found = self.reading, None
            shares = (True, False) if now.share else (False,)
            halves = (now.half_deep, not now.half_deep) if _is_deep(module, rest) else (True,)
            for share, half in product(shares, halves):
                reading = Reading(share, half)
                said = difference(
                    lambda reading=reading: encode(
                        module, self.encoder, few, tokenized, rest, reading, "check"
                    ),
                    theirs,
                    exact,
                    autocast,
                )
                if said is None:
                    break
                found = found or said
        if said is not None:
            self._give_up(module, found)
            return
        if reading != now:
            # What was found right under another reading has to be looked at again.
            self.checked.clear()
            self.encoder.cache.clear()
            self.encoder.reading = reading
        if len(self.checked) >= _KEPT:
            self.checked.clear()
        self.checked.add(kind)
        what = "features and gradients" if theirs.requires_grad else "features"
        how = "" if reading.share else "; classes share no context, which has gradients of its own"
        self.say(f"checked, {what} are the same{how}")

    def _give_up(self, module: nn.Module, why: str) -> None:
        self.off = why
        self.encoder.last.clear()
        self.encoder.cache.clear()
        if not is_replica(module):
            unswap(module)
        self.say(f"restored, since {why}")
        warnings.warn(f"vlfast: {self.name} was restored, since {why}", stacklevel=2)

    def _is_checked(self, kind: Kind) -> bool:
        # Whoever learns, features are the same, and without leaves nobody learns.
        return kind in self.checked or (
            not kind.leaves and any(kind.form == checked.form for checked in self.checked)
        )

    def say(self, what: str) -> None:
        if what not in self.said:
            self.said.append(what)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _given(module: nn.Module, prompts: Tensor, rest: Sequence[Any]) -> list[Any]:
    """The tensors that an encoder is called with."""
    return [prompts, *deep_prompts(module.transformer.resblocks, rest, False)]


def _form(prompts: Tensor) -> Hashable:
    device = prompts.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return prompts.dtype, device, autocast, is_watched(prompts)


def _is_deep(module: nn.Module, rest: Sequence[Any]) -> bool:
    return any(v is not None for v in deep_prompts(module.transformer.resblocks, rest, False))
