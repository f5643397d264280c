"""One run of a protocol: where it lies, what it was asked to be, and how far it is."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from vlfast.data.catalog import load_dataset
from vlfast.data.dataset import Dataset
from vlfast.errors import VlfastError
from vlfast.protocols.results import CELL, evaluation_file, read_cell, read_json
from vlfast.trainers.config import Config
from vlfast.trainers.files import replacing
from vlfast.trainers.run_folder import RunFolder

try:
    import fcntl
except ImportError:  # Windows has none: nothing keeps two sweeps apart there
    fcntl = None

# Of Lustre without -o flock, for one.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

OPTIONS = "options.yaml"  # what `vlfast train --config` gets
LOG = "log.txt"
State = Literal["done", "begun", "to do"]

# Where and how fast a run computes, not what: these may differ when it goes on.
NOT_COMPARED = frozenset(("model.device", "data.workers", "data.test_features"))
# Both train the same run on their source: its tests tell them apart.
SHARE_SOURCE = frozenset(("cross-dataset", "domain-generalization"))


@dataclass(frozen=True)
class Target:
    """Another dataset that a run is tested on. root, classnames: as ``load_dataset`` takes them."""

    name: str
    root: str | None = None
    classnames: str | None = None

    def load(self) -> Dataset:
        return load_dataset(self.name, self.root, self.classnames)


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a protocol.

    number: in the grid, from 1 on. source: what the protocol trains on; dataset: what this run
    trains on. shots: 0 is all images. given: its whole options, nested, as ``vlfast train`` takes
    them. config: what these resolve to. targets: what it is tested on besides its own dataset.
    """

    number: int
    folder: Path
    protocol: str
    method: str
    source: str
    dataset: str
    shots: int
    seed: int
    given: Mapping[str, Any]
    config: Config
    targets: tuple[Target, ...] = ()

    @property
    def trains(self) -> bool:
        return self.config.recipe.epochs > 0

    @property
    def data(self) -> Target:
        """Its own dataset."""
        return Target(self.dataset, self.config.data.root, self.config.data.classnames)

    def __str__(self) -> str:
        """Its folder below the output: "oxford_pets/coop-16shots-seed1"."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    def untested(self) -> list[Target]:
        """The targets without an evaluation that counts for this protocol."""
        return [t for t in self.targets if not self._tested_on(t)]

    def _tested_on(self, target: Target) -> bool:
        file = evaluation_file(self.folder, target.name)
        return file.is_file() and self.protocol in read_json(file)["protocols"]

    def state(self) -> State:
        run = RunFolder(self.folder)
        if run.finished and not self.untested() and self._listed():
            return "done"
        return "begun" if run.started else "to do"

    def _listed(self) -> bool:
        """Whether cell.yaml says that it serves this protocol."""
        found = read_cell(self.folder)
        return self.protocol in (found.get("protocol"), *found.get("also", []))

    def check(self) -> None:
        """Raise VlfastError where its folder holds a run with other options, naming the first."""
        if not RunFolder(self.folder).started:
            return
        if not (self.folder / CELL).is_file():
            raise VlfastError(
                f"--output: {self.folder} holds a run that no protocol made; choose another folder"
            )
        found = read_cell(self.folder)
        before, now = flat(found.get("given", {})), flat(self.given)
        was = found.get("protocol")
        if not (was == self.protocol or {was, self.protocol} <= SHARE_SOURCE):
            raise VlfastError(
                f"--output: {self.folder} belongs to the protocol {was}, not to {self.protocol}; "
                "choose another folder"
            )
        for name in sorted((before.keys() | now.keys()) - NOT_COMPARED):
            if before.get(name) != now.get(name):
                raise VlfastError(
                    f"--{name}: {self.folder} was begun {_shown(before, name)}, this is "
                    f"{_shown(now, name)}; go on with the same options, choose another --output, "
                    "or delete that folder"
                )

    def write(self) -> None:
        """cell.yaml, and the options for ``vlfast train``; of a run that another protocol began,
        that it serves this one, too."""
        found = read_cell(self.folder) if RunFolder(self.folder).started else {}
        first = found.get("protocol", self.protocol)
        also = sorted({*found.get("also", []), self.protocol} - {first})
        if found and also == found.get("also", []):
            return
        about = {
            "protocol": first,
            "also": also,
            "method": self.method,
            "source": self.source,
            "dataset": self.dataset,
            "shots": self.shots,
            "seed": self.seed,
            "given": found.get("given", dict(self.given)),
        }
        for name, values in ((OPTIONS, about["given"]), (CELL, about)):
            with replacing(self.folder / name) as path:
                path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")

    @contextmanager
    def locked(self) -> Iterator[int | None]:
        """Hold the cell: the lock's file descriptor, for processes that work at it to inherit, so
        that it is held until the last of them ends. None where another holds it. File systems
        without locks, as some clusters have, keep nothing apart."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "ab") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield None
                    return
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        raise
            yield file.fileno()


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"recipe": {"lr": 1}} as {"recipe.lr": 1}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _shown(options: Mapping[str, Any], name: str) -> str:
    return f"with {options[name]!r}" if name in options else "without it"
