"""Prompt learners that hand over the parts of their prompts instead of building them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vlfast.dropin.assembled import BatchPrompts, LearnedPrompts, Parts, class_numbers
from vlfast.dropin.swap import STATE, Swapped, original_class, original_forward, parameter_names
from vlfast.dropin.verify import CLASSES, difference

_PARTS = ("ctx", "token_prefix", "token_suffix")
_SCALARS = (bool, int, float, str, type(None))


class AcceleratedLearner(Swapped):
    """In front of a codebase's PromptLearner."""

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        made = None if keywords else self.__dict__[STATE].prompts(self, arguments)
        return original_forward(self, *arguments, **keywords) if made is None else made


@dataclass
class LearnerState:
    """Whether a learner's prompts are what they seem, SOS, context and the rest of each class.

    checked: what was found for each state that it was in: how its result is read ("tensor", or
    "tuple" where more comes with the prompts), or None where it goes its own way.
    read: what ``common`` found last.
    """

    checked: dict[Any, str | None] = field(default_factory=dict)
    read: tuple[Any, ...] | None = None
    lock: Any = field(default_factory=threading.RLock)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()

    def prompts(self, learner: nn.Module, arguments: Sequence[Any]) -> Any:
        """What stands for the result of ``forward(*arguments)``, or None."""
        read = _read_call(learner, arguments)
        if read is None:
            return None
        images, index = read
        state = _state(learner, images is None, index is None)
        if state not in self.checked:
            with self.lock:
                if state not in self.checked:
                    if len(self.checked) > 64:
                        self.checked.clear()
                    self.checked[state] = self._check(learner, images, arguments, index)
        kind = self.checked[state]
        if kind is None:
            return None
        whole = _stand_in(learner, images)
        prompts = whole if index is None else _pick(whole, index)
        if kind == "tensor":
            return prompts
        return (prompts, *_few(learner, images, index, [0])[1:])

    def common(self, prefix: Tensor, suffix: Tensor) -> int | None:
        """How many positions of ``suffix`` hold the same in all classes; None where SOS does not.
        Compared once for as long as nobody writes to them."""
        parts = (prefix, suffix)
        versions = None if any(t.is_inference() for t in parts) else [t._version for t in parts]
        if self.read is not None:
            references, before, found = self.read
            same = all(ref() is t for ref, t in zip(references, parts, strict=True))
            if same and versions == before is not None:
                return found
        found = _common(prefix, suffix)
        self.read = ([weakref.ref(t) for t in parts], versions, found)
        return found

    def _check(
        self, learner: nn.Module, images: Tensor | None, arguments: Sequence[Any], index: Any
    ) -> str | None:
        """Let the learner build prompts of a few classes, or of all, for one image, and compare."""
        device = learner.token_prefix.device
        one = None if images is None else images[:1]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for compare in (_compare_few, _compare_all):
                try:
                    return compare(learner, one, arguments, index)
                except Exception:
                    # Some can't do with fewer classes; if it is more than that, theirs will raise.
                    continue
        return None


def _compare_few(
    learner: nn.Module, image: Tensor | None, arguments: Sequence[Any], index: Any
) -> str | None:
    classes = len(learner.token_prefix)
    # Another number than there are: what else is held for every class then does not fit.
    count = CLASSES + (classes == CLASSES)
    few = torch.linspace(0, classes - 1, count).round().long().tolist()
    theirs, kind = _few(learner, image, index, few), "tensor"
    if isinstance(theirs, tuple):
        kind, (theirs, *rest) = "tuple", theirs
        if image is not None or not _alike(rest, list(_few(learner, image, index, [0])[1:])):
            return None
    picks = few if index is None else few[::-1]
    return kind if _same(_pick(_stand_in(learner, image), torch.tensor(picks)), theirs) else None


def _compare_all(
    learner: nn.Module, image: Tensor | None, arguments: Sequence[Any], index: Any
) -> str | None:
    if image is not None:
        arguments = (image, *arguments[1:])
    ours, theirs = _stand_in(learner, image), original_forward(learner, *arguments)
    if index is not None:
        ours = _pick(ours, index)
    return "tensor" if isinstance(theirs, Tensor) and _same(ours, theirs) else None


def _same(ours: LearnedPrompts | BatchPrompts, theirs: Tensor) -> bool:
    """Equal numbers, and the same gradients of what learns."""
    with torch.no_grad():
        if ours.shape != theirs.shape or not torch.equal(ours.tensor(), theirs):
            return False
    autocast = torch.is_autocast_enabled(theirs.device.type)
    return difference(ours.tensor, theirs, lambda: theirs, autocast) is None


@torch.no_grad()
def _common(prefix: Tensor, suffix: Tensor) -> int | None:
    if not bool((prefix == prefix[:1]).all()):
        return None
    for place in range(suffix.shape[1]):
        if not bool((suffix[:, place] == suffix[:1, place]).all()):
            return place
    return suffix.shape[1]


def may_hand_over(learner: nn.Module | None) -> bool:
    """Whether it is worth a try."""
    if learner is None or not all(isinstance(getattr(learner, p, None), Tensor) for p in _PARTS):
        return False
    if "forward" in learner.__dict__ or any(isinstance(m, _BatchNorm) for m in learner.modules()):
        return False
    context, prefix, suffix = (getattr(learner, part) for part in _PARTS)
    width = context.shape[-1]
    return (
        context.ndim in (2, 3)
        and prefix.ndim == suffix.ndim == 3
        and prefix.shape == (len(suffix), 1, width)
        and suffix.shape[2] == width
        and (context.ndim == 2 or len(context) == len(prefix))
        and len(prefix) > 0
        and not (prefix.requires_grad or suffix.requires_grad)
    )


def is_conditional(learner: nn.Module) -> bool:
    """As [CoOp] trainers/cocoop.py: a context for each image. [KgCoOp] has a meta_net, too, that it
    never asks."""
    return hasattr(learner, "meta_net") and "im_features" in parameter_names(learner)[:1]


def _read_call(learner: nn.Module, arguments: Sequence[Any]) -> tuple[Tensor | None, Any] | None:
    """The image features (None if not conditional) and the classes asked for (None for all)."""
    if not may_hand_over(learner):
        return None
    images = None
    if is_conditional(learner):
        images, arguments = (arguments[0], arguments[1:]) if arguments else (None, ())
        if not isinstance(images, Tensor) or images.ndim != 2 or learner.ctx.ndim != 2:
            return None
        if len(images) == 0:
            return None
    if len(arguments) > 1:
        return None
    index = arguments[0] if arguments else None
    if index is not None and class_numbers(index, len(learner.token_prefix)) is None:
        return None
    return images, index


def _stand_in(learner: nn.Module, images: Tensor | None) -> LearnedPrompts | BatchPrompts:
    context, prefix, suffix = (getattr(learner, part) for part in _PARTS)
    specific = context.ndim == 3
    common = None if specific else learner.__dict__[STATE].common(prefix, suffix)
    if images is not None:
        context = context.unsqueeze(0) + learner.meta_net(images).unsqueeze(1)
        return BatchPrompts(Parts(context, prefix, suffix, common=common))
    context = context if specific else context.unsqueeze(0)
    return LearnedPrompts(Parts(context, prefix, suffix, None, common, specific))


def _pick(prompts: LearnedPrompts | BatchPrompts, index: Any) -> LearnedPrompts | BatchPrompts:
    parts = prompts.parts
    return type(prompts)(parts.select(class_numbers(index, parts.shape[0])))


def _few(learner: nn.Module, images: Tensor | None, index: Any, classes: Sequence[int]) -> Any:
    """What the codebase's own forward returns for these classes alone, in reverse order where it is
    asked for an ``index``."""
    arguments = [] if images is None else [images]
    if index is not None:
        arguments.append(_like(index, list(range(len(classes)))[::-1]))
    return _narrowed(learner, classes).forward(*arguments)


def _narrowed(learner: nn.Module, classes: Sequence[int]) -> nn.Module:
    """A copy of its own class with fewer classes, through which autograd reaches the parameters,
    as in a replica of nn.DataParallel."""
    cls = original_class(learner)
    twin = cls.__new__(cls)
    tensors = {k: v for k, v in (*learner._parameters.items(), *learner._buffers.items())}
    twin.__dict__ = {**learner.__dict__, **tensors, "_parameters": {}, "_buffers": {}}
    where = torch.tensor(classes, device=learner.token_prefix.device)
    for name in ("token_prefix", "token_suffix", *(("ctx",) if learner.ctx.ndim == 3 else ())):
        twin.__dict__[name] = getattr(learner, name).index_select(0, where)
    twin.__dict__["n_cls"] = len(classes)
    lengths = getattr(learner, "name_lens", None)
    if isinstance(lengths, (list, tuple)):
        twin.__dict__["name_lens"] = [lengths[c] for c in classes]
    return twin


def _like(index: Any, numbers: list[int]) -> Any:
    """``numbers`` in the form that ``index`` has."""
    if isinstance(index, Tensor):
        return torch.tensor(numbers, dtype=index.dtype, device=index.device)
    return np.array(numbers, dtype=index.dtype) if isinstance(index, np.ndarray) else numbers


def _alike(one: Any, other: Any) -> bool:
    """Whether what a learner returns beside its prompts is the same for other classes."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    return one is other


def _state(learner: nn.Module, *call: bool) -> Any:
    """What decides how a learner assembles its prompts, beside the parts themselves: options, and
    tensors that may act on them."""
    found: list[Any] = [*call, torch.is_grad_enabled(), learner.training]
    found += [(k, v) for k, v in learner.__dict__.items() if isinstance(v, _SCALARS)]
    for name, tensor in (*learner.named_parameters(), *learner.named_buffers()):
        frozen = None if tensor.requires_grad or tensor.is_inference() else tensor._version
        # The parts are read anew at every call.
        found.append((name, tensor.requires_grad, None if name in _PARTS else frozen))
    autocast = torch.is_autocast_enabled(learner.token_prefix.device.type)
    return *found, learner.ctx.dtype, learner.ctx.ndim, autocast
