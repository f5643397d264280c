"""What a protocol came to, in a line a cell and a short table. `vlfast report` has all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import mean

from vlfast.evaluation.metrics import harmonic_mean
from vlfast.evaluation.tables import text_table
from vlfast.protocols.cells import Cell
from vlfast.protocols.results import Result, read_result


def outcome_line(cell: Cell) -> str:
    """The accuracies of a finished cell."""
    result = read_result(cell.folder, cell.protocol)
    own = result.scores.get(result.dataset, {})
    if cell.protocol == "base-to-new":
        parts = [f"{part} {own[part]['accuracy']:.1f} %" for part in ("base", "new") if part in own]
        if "harmonic_mean" in own:
            parts.append(f"harmonic mean {own['harmonic_mean']:.1f}")
        return ", ".join(parts)
    parts = [f"{own['test']['accuracy']:.1f} %"] if "test" in own else []
    elsewhere = _elsewhere(result) if cell.protocol != "few-shot" else []
    if elsewhere:
        parts.append(f"mean of {len(elsewhere)} other test sets {mean(elsewhere):.1f} %")
    return ", ".join(parts)


def summary_table(protocol: str, cells: Iterable[Cell]) -> str:
    """A line a method: accuracies in percent, averaged over seeds and then over datasets.

    The harmonic mean is that of the averages, as in the papers' tables; the average of
    cross-dataset and domain-generalization leaves the source out.
    """
    results = [read_result(cell.folder, protocol) for cell in cells]
    if not results:
        return ""
    methods = list(dict.fromkeys(result.method for result in results))
    rows = {method: [r for r in results if r.method == method] for method in methods}
    if protocol == "few-shot":
        return _few_shot_table(rows)
    if protocol == "base-to-new":
        return _base_to_new_table(rows)
    return _transfer_table(rows)


def _few_shot_table(rows: dict[str, list[Result]]) -> str:
    shots = sorted({r.shots for results in rows.values() for r in results if r.epochs})
    header = ["accuracy, %", "datasets", "untrained", *(_shots(s) for s in shots)]
    lines = []
    for method, results in rows.items():
        cells = [_over_datasets([r for r in results if not r.epochs], _test)]
        cells += [
            _over_datasets([r for r in results if r.epochs and r.shots == s], _test) for s in shots
        ]
        lines.append([method, _datasets(results), *map(_number, cells)])
    return _without_empty_columns(header, lines)


def _base_to_new_table(rows: dict[str, list[Result]]) -> str:
    header = ["accuracy, %", "shots", "datasets", "base", "new", "harmonic mean"]
    lines = []
    for method, shots, results in _by_shots(rows):
        base, new = (
            _over_datasets(results, lambda r, part=part: _own(r, part)) for part in ("base", "new")
        )
        harmonic = None if base is None or new is None else harmonic_mean(base, new)
        lines.append([method, shots, _datasets(results), *map(_number, (base, new, harmonic))])
    return text_table(header, lines)


def _transfer_table(rows: dict[str, list[Result]]) -> str:
    results = [r for of_method in rows.values() for r in of_method]
    source = results[0].source
    tests = list(dict.fromkeys(name for r in results for name in _all_tests(r) if name != source))
    header = ["accuracy, %", "shots", source, *tests, "average"]
    lines = []
    for method, shots, of_method in _by_shots(rows):
        found = {
            name: _mean([a for r in of_method if (a := _all_tests(r).get(name)) is not None])
            for name in (source, *tests)
        }
        others = [found[name] for name in tests]
        average = None if None in others or not others else mean(others)
        lines.append([method, shots, *map(_number, (*found.values(), average))])
    return text_table(header, lines)


def _by_shots(rows: dict[str, list[Result]]) -> list[tuple[str, str, list[Result]]]:
    return [
        (method, _shots(s) if s is not None else "-", [r for r in results if _shots_of(r) == s])
        for method, results in rows.items()
        for s in dict.fromkeys(map(_shots_of, results))
    ]


def _shots_of(result: Result) -> int | None:
    return result.shots if result.epochs else None


def _shots(shots: int) -> str:
    return str(shots) if shots else "all"


def _own(result: Result, part: str) -> float | None:
    scores = result.scores.get(result.dataset, {})
    return scores[part]["accuracy"] if part in scores else None


def _test(result: Result) -> float | None:
    return _own(result, "test")


def _all_tests(result: Result) -> dict[str, float]:
    """Accuracy by test set."""
    return {name: s["test"]["accuracy"] for name, s in result.scores.items() if "test" in s}


def _elsewhere(result: Result) -> list[float]:
    return [a for name, a in _all_tests(result).items() if name != result.dataset]


def _over_datasets(
    results: Sequence[Result], accuracy: Callable[[Result], float | None]
) -> float | None:
    """The mean over datasets of the means over seeds."""
    by_dataset: dict[str, list[float]] = {}
    for result in results:
        found = accuracy(result)
        if found is not None:
            by_dataset.setdefault(result.dataset, []).append(found)
    return _mean([mean(values) for values in by_dataset.values()])


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def _datasets(results: Sequence[Result]) -> str:
    return str(len({result.dataset for result in results}))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _without_empty_columns(header: list[str], lines: list[list[str]]) -> str:
    kept = [i for i in range(len(header)) if any(line[i] != "-" for line in lines)]
    return text_table([header[i] for i in kept], [[line[i] for i in kept] for line in lines])
