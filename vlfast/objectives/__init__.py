"""What is minimised. One file a kind; ``build_objectives`` makes them from their configs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from vlfast.errors import VlfastError, unknown_name
from vlfast.objectives.base import Objective, Step
from vlfast.objectives.labels import Labels
from vlfast.objectives.perplexity import Perplexity

KINDS: dict[str, type[Objective]] = {o.kind: o for o in (Labels, Perplexity)}

__all__ = ["KINDS", "Objective", "Step", "build_objectives", "complete"]


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
    options = {
        name: parameter.default
        for name, parameter in inspect.signature(KINDS[kind]).parameters.items()
    }
    for name, value in spec.items():
        if name == "kind":
            continue
        if name not in options:
            raise unknown_name(f"option of the {kind} objective", name, options)
        options[name] = _like(options[name], value, f"objectives: {kind} {name}")
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


def _like(default: Any, value: Any, what: str) -> Any:
    """``value`` as the type of ``default``; an int serves for a float."""
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise VlfastError(f"{what}: expected {type(default).__name__}, got {value!r}")
    return value
