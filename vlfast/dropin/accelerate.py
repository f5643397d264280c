"""`vlfast.accelerate(model)`: an existing CoOp-family model, made fast in place."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlfast.dropin.conditional import BatchPrompts, ImagePrompts
from vlfast.dropin.swap import STATE, Swapped, is_swapped, swap, unswap
from vlfast.dropin.text_encoder import EncoderState, encode, why_original
from vlfast.dropin.verify import difference

_PARTS = ("transformer", "positional_embedding", "ln_final", "text_projection")


@dataclass
class Report:
    """What ``accelerate`` did. Printing it shows what became of the checks, too.

    changed: what was exchanged, by the module's name. left: what was left alone, and why.
    """

    changed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    checks: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name or 'model'}: {what}" for name, what in self.changed.items()]
        for name, what in self.left.items():
            lines.append(f"{name or 'model'}: left as it is, {what}")
        for name, said in self.checks.items():
            lines += [f"{name}: {one}" for one in said]
        return "\n".join(lines) or "nothing to accelerate"


class AcceleratedTextEncoder(Swapped):
    """In front of a codebase's TextEncoder."""

    def forward(self, prompts: Any, tokenized_prompts: Tensor, *rest: Any) -> Tensor:
        state: Guard = self.__dict__[STATE]
        return state.run(self, prompts, tokenized_prompts, rest)


class AcceleratedConditionalLearner(Swapped):
    """In front of CoCoOp's PromptLearner: its prompts are not built for every image."""

    def forward(self, im_features: Tensor, *rest: Any) -> Any:
        if rest or len(im_features) < 2:
            return super().forward(im_features, *rest)
        context = self.ctx.unsqueeze(0) + self.meta_net(im_features).unsqueeze(1)
        return BatchPrompts(context, self.token_prefix, self.token_suffix)


@dataclass
class Guard:
    """Runs a text encoder the fast way where that gives the same, else the codebase's own.

    said: what a user should know of its checks, in order.
    """

    name: str
    encoder: EncoderState
    said: list[str]

    def run(
        self, module: nn.Module, prompts: Any, tokenized: Tensor, rest: Sequence[Any]
    ) -> Tensor:
        state = self.encoder
        if why := why_original(module, prompts, tokenized):
            self.say(f"took the codebase's own way, since {why}")
            state.last.clear()
            return original_forward(module, _plain(prompts), tokenized, rest)
        if state.unchecked and not self.check(module, prompts, tokenized, rest):
            return module(_plain(prompts), tokenized, *rest)
        features = encode(module, state, prompts, tokenized, rest)
        if features is None:
            self.say("took the codebase's own way, since deep prompts replace no shared context")
            state.last.clear()
            return original_forward(module, _plain(prompts), tokenized, rest)
        return features

    def check(
        self, module: nn.Module, prompts: Any, tokenized: Tensor, rest: Sequence[Any]
    ) -> bool:
        """Compare both ways; where they differ, try the other readings of the codebase, and
        give up with a warning if none agrees."""
        state = self.encoder
        learner = state.learner
        learned = [*(() if learner is None else learner.parameters()), *module.parameters()]
        learned = [t for t in learned if t.requires_grad and t.is_leaf]
        grads = torch.is_grad_enabled() and bool(learned)
        first = _plain(prompts)
        found = None
        for share, half in ((True, True), (True, False), (False, True), (False, False)):
            state.share, state.half_deep = share, half
            said = difference(
                module,
                original_forward,
                lambda m, p, t, r: encode(m, state, p, t, r),
                first,
                tokenized,
                rest,
                learned,
            )
            if said is None:
                state.unchecked -= {"features", *(("gradients",) if grads else ())}
                what = "features and gradients" if grads else "features"
                self.say(f"checked, {what} are the same")
                return True
            found = found or said
        state.last.clear()
        unswap(module)
        self.say(f"restored, since {found}")
        warnings.warn(f"vlfast: {self.name} was restored, since {found}", stacklevel=4)
        return False

    def say(self, what: str) -> None:
        if what not in self.said:
            self.said.append(what)


def original_forward(
    module: nn.Module, prompts: Tensor, tokenized: Tensor, rest: Sequence[Any]
) -> Tensor:
    cls = type(module).original_class if is_swapped(module) else type(module)
    return cls.forward(module, prompts, tokenized, *rest)


def accelerate(model: nn.Module, *, verify: bool = True) -> Report:
    """Make the text encoder of a CoOp-family model fast, in place.

    What all classes share, SOS and their common context, is computed once, and the rest of each
    class up to EOT, instead of all 77 tokens of every class; class features of a frozen learner
    are computed once. Parameters, their names and the optimiser stay as they are, and ``restore``
    undoes it.

        model: the object that holds ``prompt_learner`` and ``text_encoder`` (CoOp, CoCoOp, KgCoOp,
    ProGrad, IVLP, MaPLe, PromptSRC, KDPL's student, MoPD, PromptKD's teacher), plain or in
    nn.DataParallel. verify: compare features and gradients of at most 8 classes with the codebase's
    own way at the first call, and restore it, with a warning, where they differ.

    Returns a Report. A model that is not understood is left as it is, with the reason in it.
    Raises TypeError for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    report = Report()
    for name, module in list(model.named_modules()):
        if not _looks_like_text_encoder(module):
            continue
        if is_swapped(module):
            report.left[name] = "it is accelerated already"
            continue
        if why := _why_not(module):
            report.left[name] = why
            continue
        learner = _learner_beside(model, name)
        unchecked = {"features", "gradients"} if verify else set()
        said: list[str] = []
        guard = Guard(name or type(module).__name__, EncoderState(learner, unchecked), said)
        swap(module, AcceleratedTextEncoder, guard)
        report.changed[name] = "what all classes share is encoded once, the rest up to EOT"
        report.checks[name] = said
        if _is_conditional(learner) and not is_swapped(learner):
            swap(learner, AcceleratedConditionalLearner, None)
            place = next(n for n, m in model.named_modules() if m is learner)
            report.changed[place] = "contexts of all images are encoded together"
    if not report.changed and not report.left:
        report.left[""] = (
            "there is no text encoder in it: a module with "
            f"{', '.join(_PARTS)}, called with prompts and tokens"
        )
    return report


def restore(model: nn.Module) -> list[str]:
    """Undo ``accelerate``; the names of the modules that are their own again."""
    names = [name for name, module in model.named_modules() if is_swapped(module)]
    for module in list(model.modules()):
        if is_swapped(module):
            unswap(module)
    return names


def _looks_like_text_encoder(module: nn.Module) -> bool:
    return all(hasattr(module, part) for part in _PARTS) and not hasattr(module, "token_embedding")


def _why_not(module: nn.Module) -> str | None:
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    if len(parameters) < 2:
        return f"its forward takes {', '.join(parameters) or 'nothing'}, not prompts and tokens"
    if not getattr(module.transformer, "resblocks", None):
        return "its transformer has no resblocks"
    if hasattr(module, "clip_model"):
        return "it hands texts to a CLIP of its own"
    return None


def _learner_beside(model: nn.Module, name: str) -> nn.Module | None:
    parent = model.get_submodule(name.rpartition(".")[0])
    return getattr(parent, "prompt_learner", None)


def _is_conditional(learner: nn.Module | None) -> bool:
    parts = ("ctx", "meta_net", "token_prefix", "token_suffix")
    if learner is None or not all(hasattr(learner, part) for part in parts):
        return False
    # KgCoOp has a meta_net that it never asks.
    return "im_features" in inspect.signature(type(learner).forward).parameters


def _plain(prompts: Any) -> Any:
    return prompts.tensor() if isinstance(prompts, (BatchPrompts, ImagePrompts)) else prompts
