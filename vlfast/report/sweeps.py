"""Finished runs, sorted into what may stand in one table: one protocol, model and source."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlfast.data.coop.layouts import LAYOUTS
from vlfast.errors import VlfastError
from vlfast.protocols.results import Result, read_results
from vlfast.trainers.recipes import RECIPES
from vlfast.trainers.run_folder import RunFolder

PROTOCOLS = ("base-to-new", "few-shot", "cross-dataset", "domain-generalization")
# Protocols whose methods are trained on one source and tested elsewhere.
TRANSFER = ("cross-dataset", "domain-generalization")
PARTS = ("test", "base", "new")

# As the papers' tables name them, where the layout's title is longer.
_TITLES = {"dtd": "DTD"}


@dataclass(frozen=True)
class Method:
    """A row of a table. shots: None where nothing was trained, 0 where on all images."""

    name: str
    shots: int | None

    @property
    def shots_text(self) -> str:
        return {None: "none", 0: "all"}.get(self.shots, str(self.shots))

    @property
    def learned_from(self) -> str:
        """ "16 shots", "1 shot", "all images"."""
        if not self.shots:
            return f"{self.shots_text} images"
        return f"{self.shots} shot{'' if self.shots == 1 else 's'}"


@dataclass(frozen=True)
class Run:
    """A finished run, seen as part of a sweep."""

    result: Result

    @property
    def method(self) -> Method:
        return Method(self.result.method, self.result.shots if self.result.epochs else None)

    @property
    def model(self) -> str:
        """The model with its weights: equal ones may be compared."""
        weights = self.result.options["model"].get("pretrained")
        return self.result.model + (f" ({weights})" if weights else "")

    @property
    def on_target(self) -> bool:
        """Trained on the images of the target that it is tested on, instead of on the source's."""
        return bool(self.result.epochs) and self.result.dataset != self.result.source


@dataclass(frozen=True)
class Sweep:
    """Runs of one protocol with one model and, where there is one, one source."""

    protocol: str
    model: str
    source: str | None
    runs: tuple[Run, ...]
    scores: Mapping[tuple[Method, str, str], Mapping[int, Mapping[str, Any]]] = field(repr=False)

    @property
    def name(self) -> str:
        return self.protocol if self.source is None else f"{self.protocol} from {self.source}"

    def methods(self) -> list[Method]:
        """Zero-shot first, then in the recipes' order; fewer shots first, all images last."""
        return sorted({run.method for run in self.runs}, key=_method_order)

    def targets(self) -> list[str]:
        """The datasets tested on, in the papers' order, without the source."""
        names = {test for _, test, _ in self.scores} - {self.source}
        return sorted(names, key=dataset_order)

    def seeds(self) -> list[int]:
        """Those of the trained runs; if none was trained, all."""
        trained = {run.result.seed for run in self.runs if run.result.epochs}
        return sorted(trained or {run.result.seed for run in self.runs})

    def by_seed(
        self, method: Method, test: str, part: str, metric: str = "accuracy"
    ) -> dict[int, float]:
        """Percent by seed; empty where there is no run."""
        found = self.scores.get((method, test, part), {})
        return {seed: score[metric] for seed, score in sorted(found.items())}

    def strongest(self, untrained: bool = False) -> list[Method]:
        """Of each trained method the one with the most shots, all images being the most."""
        best: dict[str, Method] = {}
        for method in self.methods():
            if method.shots is not None or untrained:
                best[method.name] = method
        return list(best.values())

    def label(self, method: Method) -> str:
        """The method's name, with its shots where trained methods differ in them."""
        shots = {other.shots for other in self.methods() if other.shots is not None}
        if method.shots is None or len(shots) < 2:
            return method.name
        return f"{method.name}, {method.learned_from}"

    def runs_of(self, method: Method) -> list[Run]:
        return [run for run in self.runs if run.method == method]


@dataclass(frozen=True)
class Collection:
    """All sweeps below the folders. unfinished: runs that were begun and have no result. notes:
    what a reader must know about how they were sorted."""

    sweeps: tuple[Sweep, ...]
    unfinished: tuple[Path, ...]
    notes: tuple[str, ...]


def collect_sweeps(roots: Sequence[Path], protocol: str | None = None) -> Collection:
    """The runs below ``roots`` as sweeps, of one protocol only or of all.

    Where the same cell (protocol, model, source, dataset, method, shots, seed) lies below several
    roots, the methods of each are named after their root too. Of several in one root the first path
    counts, and a note says so. Raises FileNotFoundError for a missing folder, VlfastError if there
    is no finished run.
    """
    found: dict[Path, list[Run]] = {}
    unfinished: set[Path] = set()
    seen: set[Path] = set()
    for root in dict.fromkeys(roots):
        fresh = [r for r in read_results(root) if r.folder.resolve() not in seen]
        seen |= {result.folder.resolve() for result in fresh}
        found[root] = [Run(result) for result in fresh]
        unfinished |= {
            file.parent for file in root.rglob("config.yaml") if not RunFolder(file.parent).finished
        }
    if not any(found.values()):
        _raise_nothing(roots, unfinished)
    runs, notes = _tell_apart(found)
    if protocol is not None:
        there = sorted({run.result.protocol for run in runs})
        runs = [run for run in runs if run.result.protocol == protocol]
        if not runs:
            raise VlfastError(
                f"--protocol: no finished run of {protocol}; there are runs of {', '.join(there)}"
            )
    groups: dict[tuple[str, str, str | None], list[Run]] = defaultdict(list)
    for run in runs:
        source = run.result.source if run.result.protocol in TRANSFER else None
        groups[run.result.protocol, run.model, source].append(run)
    keys = sorted(groups, key=lambda key: (_index(PROTOCOLS, key[0]), key[1], key[2] or ""))
    sweeps = [_sweep(*key, groups[key]) for key in keys]
    return Collection(tuple(sweeps), tuple(sorted(unfinished)), tuple(notes))


def domain_tests(run: Run) -> list[str]:
    """The tests on domains of the run's own dataset."""
    own = f"{run.result.dataset}/"
    return [test for test in run.result.scores if test.startswith(own)]


def dataset_order(name: str) -> tuple[int, str]:
    """Sorts dataset names as the papers do, others after them."""
    return _index(tuple(LAYOUTS), name), name


def title_of(test: str, source: str | None = None) -> str:
    """A dataset's name for a heading: DTD for dtd, remix for glyphs/tools/remix below its
    source."""
    if source is not None and test.startswith(f"{source}/"):
        return test.removeprefix(f"{source}/")
    return _TITLES.get(test) or (LAYOUTS[test].title if test in LAYOUTS else test)


def _raise_nothing(roots: Sequence[Path], unfinished: Iterable[Path]) -> None:
    where, begun = ", ".join(map(str, roots)), len(set(unfinished))
    if not begun:
        raise VlfastError(f"report: there is no run in {where}; `vlfast run` makes them")
    are = "1 run is" if begun == 1 else f"{begun} runs are"
    raise VlfastError(
        f"report: there is no finished run in {where}: {are} unfinished; go on with the command "
        "that began them"
    )


def _cell_of(run: Run) -> tuple[Any, ...]:
    result = run.result
    return (result.protocol, run.model, result.source, result.dataset, run.method, result.seed)


def _tell_apart(found: Mapping[Path, Sequence[Run]]) -> tuple[list[Run], list[str]]:
    notes: list[str] = []
    kept: dict[Path, list[Run]] = {}
    for root, runs in found.items():
        cells: dict[tuple[Any, ...], Run] = {}
        for run in runs:
            first = cells.setdefault(_cell_of(run), run)
            if first is not run:
                notes.append(
                    f"{run.result.folder} is left out: {first.result.folder} is the same method on "
                    "the same dataset with the same shots and seed"
                )
        kept[root] = list(cells.values())
    owners: dict[tuple[Any, ...], set[Path]] = defaultdict(set)
    for root, runs in kept.items():
        for run in runs:
            owners[_cell_of(run)].add(root)
    names = {
        (run.result.protocol, run.result.method)
        for runs in kept.values()
        for run in runs
        if len(owners[_cell_of(run)]) > 1
    }
    told = []
    for root, runs in kept.items():
        for run in runs:
            if (run.result.protocol, run.result.method) in names:
                method = f"{run.result.method} ({root})"
                run = replace(run, result=replace(run.result, method=method))
            told.append(run)
    return told, notes


def _sweep(protocol: str, model: str, source: str | None, runs: Sequence[Run]) -> Sweep:
    scores: dict[tuple[Method, str, str], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for run in runs:
        domains = set() if protocol == "domain-generalization" else set(domain_tests(run))
        for test, of_test in run.result.scores.items():
            if test in domains or (source is None and test != run.result.dataset):
                continue
            for part in PARTS:
                if part in of_test:
                    scores[run.method, test, part][run.result.seed] = of_test[part]
    return Sweep(protocol, model, source, tuple(runs), dict(scores))


def _method_order(method: Method) -> tuple[Any, ...]:
    name = method.name.partition(" (")[0]
    recipes = tuple(RECIPES)
    known = [r for r in recipes if name == r or name.startswith(f"{r}-")]
    place = recipes.index(max(known, key=len)) if known else len(recipes)
    shots = -1 if method.shots is None else method.shots or float("inf")
    return place, method.name, shots


def _index(names: Sequence[str], name: str) -> int:
    return names.index(name) if name in names else len(names)
