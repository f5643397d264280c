"""`vlfast.accelerate(model)`: an existing CoOp-family model, made fast in place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlfast.dropin.guard import AcceleratedTextEncoder, Guard
from vlfast.dropin.image_batch import is_conditional
from vlfast.dropin.swap import is_replica, is_swapped, parameter_names, swap, unswap
from vlfast.dropin.text_encoder import EncoderState, Reading

_PARTS = ("transformer", "positional_embedding", "ln_final", "text_projection")
# Where Dassl's trainers keep their models.
_OF_TRAINERS = ("model", "student_model", "teacher_model", "model_teacher")


@dataclass
class Report:
    """What ``accelerate`` did. Printing it shows what became of the checks, too.

    changed: what was exchanged, by the module's name. left: what was left alone, and why. checks:
    what the calls found since then.
    """

    changed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    checks: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name or 'model'}: {what}" for name, what in self.changed.items()]
        for name, what in self.left.items():
            lines.append(f"{name or 'model'}: left as it is, {what}")
        for name, said in self.checks.items():
            lines += [f"{name or 'model'}: {one}" for one in said or ["not called yet"]]
        return "\n".join(lines) or "nothing to accelerate"


def accelerate(model: Any, *, verify: bool = True) -> Report:
    """Make the text encoder of a CoOp-family model fast, in place.

    What all classes share, SOS and their common context, is computed once, and the rest of each
    class up to EOT, instead of all 77 tokens of every class; class features of a frozen learner
    are computed once. Parameters, their names and the optimiser stay as they are, and ``restore``
    undoes it.

        model: the object that holds ``prompt_learner`` and ``text_encoder`` (CoOp, CoCoOp, KgCoOp,
    ProGrad, IVLP, MaPLe, PromptSRC, KDPL's student, MoPD, PromptKD's teacher), plain or in
    nn.DataParallel; or a trainer that keeps such objects as ``model``, ``student_model``,
    ``teacher_model`` or ``model_teacher``. verify: compare features and gradients of at most 8
    classes with the codebase's own way at the first call, and again when other tensors learn or the
    precision changes, and restore it, with a warning, where they differ.

    Returns a Report. A model that is not understood is left as it is, with the reason in it.
    Raises TypeError for what neither is a module nor holds one.
    """
    report = Report()
    for prefix, part in _models(model):
        for name, module in list(part.named_modules()):
            if _looks_like_text_encoder(module):
                _accelerate_encoder(part, prefix, name, verify, report)
    if not report.changed and not report.left:
        report.left[""] = (
            "there is no text encoder in it: a module with "
            f"{', '.join(_PARTS)}, called with prompts and tokens"
        )
    return report


def restore(model: Any) -> list[str]:
    """Undo ``accelerate``; the names of the modules that are their own again. Raises as it does."""
    names = []
    for prefix, part in _models(model):
        for name, module in list(part.named_modules()):
            if is_swapped(module):
                unswap(module)
                names.append(prefix + name)
    return names


def _models(model: Any) -> list[tuple[str, nn.Module]]:
    """The modules in question, each with what goes before the names in it."""
    if isinstance(model, nn.Module):
        return [("", model)]
    found = [(f"{name}.", getattr(model, name, None)) for name in _OF_TRAINERS]
    found = [(name, part) for name, part in found if isinstance(part, nn.Module)]
    if not found:
        raise TypeError(
            "model: expected an nn.Module that holds prompt_learner and text_encoder, or a "
            f"trainer with one as {', '.join(_OF_TRAINERS)}; got {type(model).__name__}"
        )
    return found


def _accelerate_encoder(
    model: nn.Module, prefix: str, name: str, verify: bool, report: Report
) -> None:
    module = model.get_submodule(name)
    holders = [m for m in model.modules() if any(c is module for c in m._modules.values())]
    learners = [h.prompt_learner for h in holders if _is_module(h, "prompt_learner")]
    if is_swapped(module):
        report.left[prefix + name] = "it is accelerated already"
    elif why := _why_not(module, holders):
        report.left[prefix + name] = why
    else:
        learner = learners[0] if learners else None
        reading = Reading(share=verify or _has_one_context(learners))
        said: list[str] = []
        guard = Guard(name or type(module).__name__, EncoderState(learner, reading), said, verify)
        swap(module, AcceleratedTextEncoder, guard)
        together = ", of all images together" if is_conditional(learner) else ""
        report.changed[prefix + name] = (
            f"what all classes share is encoded once, the rest up to EOT{together}"
        )
        report.checks[prefix + name] = said


def _is_module(holder: nn.Module, name: str) -> bool:
    return isinstance(getattr(holder, name, None), nn.Module)


def _has_one_context(learners: list[nn.Module]) -> bool:
    contexts = [getattr(learner, "ctx", None) for learner in learners]
    return bool(contexts) and all(isinstance(c, Tensor) and c.ndim == 2 for c in contexts)


def _looks_like_text_encoder(module: nn.Module) -> bool:
    return all(hasattr(module, part) for part in _PARTS) and not hasattr(module, "token_embedding")


def _why_not(module: nn.Module, holders: list[nn.Module]) -> str | None:
    if is_replica(module):
        return "it is a replica of nn.DataParallel, which lives for one call"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a ScriptModule"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    if hasattr(module, "clip_model"):
        return "it hands texts to a CLIP of its own"
    parameters = parameter_names(module)
    if len(parameters) < 2:
        return f"its forward takes {', '.join(parameters) or 'nothing'}, not prompts and tokens"
    if not getattr(module.transformer, "resblocks", None):
        return "its transformer has no resblocks"
    if any(hasattr(getattr(h, "embeddings", None), "fixed_embeddings") for h in holders):
        return "it is never asked: the class features are constants there already"
    return None
