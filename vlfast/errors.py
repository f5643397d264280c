"""Errors that a user can act on, and the nearest-name suggestions they carry."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VlfastError(Exception):
    """Something the user can put right; the message is one line that says how."""


class UnknownNameError(VlfastError, ValueError):
    """A name that is not one of those known; the message lists the nearest."""


def unknown_name(what: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """The error for an unknown ``what`` (model, recipe, dataset, ...) called ``name``."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(repr(n) for n in near)}?"
    elif len(known) <= 30:
        hint = f"known: {', '.join(known)}"
    else:
        hint = f"{len(known)} are known, for example {', '.join(known[:5])}"
    return UnknownNameError(f"unknown {what} {name!r}; {hint}")
