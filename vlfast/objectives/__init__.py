"""What is minimised. One file a kind; ``build_objectives`` makes them from their configs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vlfast.errors import VlfastError, unknown_name
from vlfast.objectives.base import Batch, Objective, Step, Task, Teacher
from vlfast.objectives.candidates import Candidates
from vlfast.objectives.features import Features
from vlfast.objectives.guidance import Guidance
from vlfast.objectives.labels import Labels
from vlfast.objectives.mixture import Mixture
from vlfast.objectives.perplexity import Perplexity
from vlfast.objectives.self_regulation import SelfRegulation
from vlfast.objectives.teacher import Distillation

KINDS: dict[str, type[Objective]] = {
    o.kind: o
    for o in (Labels, Perplexity, Distillation, Mixture, Guidance, SelfRegulation, Features)
}

__all__ = [
    "KINDS",
    "Batch",
    "Candidates",
    "Objective",
    "Step",
    "Task",
    "Teacher",
    "build_objectives",
    "complete",
]


def complete(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The config {kind, weight, ...} with every option of that kind filled in.

    Raises UnknownNameError for an unknown kind or option, VlfastError for a value of another type.
    """
    if not isinstance(spec, Mapping):
        raise VlfastError(f"objectives: expected a kind or {{kind, weight, ...}}, got {spec!r}")
    if "kind" not in spec:
        raise VlfastError(f"objectives: expected an entry with a kind, got {dict(spec)}")
    kind = spec["kind"]
    if kind not in KINDS:
        raise unknown_name("objective", kind, KINDS)
    init = KINDS[kind].__init__
    types = get_type_hints(init)
    options = {
        name: parameter.default
        for name, parameter in inspect.signature(init).parameters.items()
        if name != "self"
    }
    for name, value in spec.items():
        if name == "kind":
            continue
        if name not in options:
            raise unknown_name(f"option of the {kind} objective", name, options)
        options[name] = _as_type(types[name], value, f"objectives: {kind} {name}")
    return {"kind": kind, **options}


def build_objectives(specs: Sequence[Mapping[str, Any]]) -> list[Objective]:
    """Objectives from configs {kind, weight, ...}, in order."""
    if not specs:
        raise VlfastError("objectives: expected at least one, got none")
    built = []
    for spec in specs:
        options = complete(spec)
        built.append(KINDS[options.pop("kind")](**options))
    return built


def _as_type(wanted: Any, value: Any, what: str) -> Any:
    """``value`` if it is of the type ``wanted``, a class, a Literal or a union of them; an int
    serves for a float."""
    parts = get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)
    named = []
    for part in parts:
        if get_origin(part) is Literal:
            if value in get_args(part):
                return value
            named += map(repr, get_args(part))
        elif type(value) is part:
            return value
        else:
            named.append(part.__name__ if part is not type(None) else "None")
    if float in parts and type(value) is int:
        return float(value)
    raise VlfastError(f"{what}: expected {' or '.join(named)}, got {value!r}")
