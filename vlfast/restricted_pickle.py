"""Reading pickles that others made without running what they say: only admitted names are built."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from vlfast.errors import VlfastError

Admit = Callable[[str, str], Any]


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that builds only what ``admit`` gives.

    admit: (module, name) to the object that stands for it, or None to refuse. what: the file, for
    messages. Raises VlfastError naming whatever is refused.
    """

    def __init__(self, file: BinaryIO, admit: Admit, what: str, **options: Any) -> None:
        super().__init__(file, **options)
        self._admit = admit
        self._what = what

    def find_class(self, module: str, name: str) -> Any:
        found = self._admit(module, name)
        if found is None:
            raise VlfastError(
                f"{self._what} asks for {module}.{name}, which has no place in such a file; "
                "nothing of it was run"
            )
        return found

    def load(self) -> Any:
        """The object. Raises VlfastError for a file that is truncated or is no pickle."""
        try:
            return super().load()
        except VlfastError:
            raise
        except Exception as error:
            raise VlfastError(f"{self._what} is damaged or is no pickle ({error})") from error


def admit_only(names: Mapping[tuple[str, str], Any]) -> Admit:
    """Admit these (module, name) pairs, as the objects that they map to."""
    return lambda module, name: names.get((module, name))
