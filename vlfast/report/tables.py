"""The papers' tables of a sweep."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlfast.data.coop.layouts import ELEVEN, IMAGENET_DOMAINS
from vlfast.evaluation.calibration import calibration
from vlfast.evaluation.metrics import harmonic_mean
from vlfast.report.published import Published, backbone_of, published_for
from vlfast.report.sweeps import TRANSFER, Method, Sweep, domain_tests, title_of
from vlfast.report.table import Cell, Column, Row, Table, mark_best

MARK = "†"
_METRICS = {"accuracy": "Accuracy", "macro_f1": "Macro-F1"}
HARMONIC = "HM"
_TRANSDUCTIVE = "transductive"

# Whose average a published one is.
_AVERAGED = {
    "base-to-new": ELEVEN,
    "cross-dataset": ELEVEN[1:],
    "domain-generalization": IMAGENET_DOMAINS,
}


@dataclass(frozen=True)
class _Spot:
    """What a column shows: a test set or, for None, the average; a part, or the harmonic mean."""

    test: str | None
    part: str


def sweep_table(sweep: Sweep, metric: str = "accuracy", published: bool = False) -> Table:
    """The table of the sweep's protocol.

    base-to-new: base, new and their harmonic mean on each dataset, and averaged; few-shot: each
    dataset, by shots; cross-dataset and domain-generalization: the source, each target, and the
    average over the targets alone. metric: "accuracy" or "macro_f1" (without harmonic means).
    published: with the papers' accuracies below ours.
    """
    spots = _spots(sweep, metric)
    tests = _averaged_tests(sweep)
    unlike = _unlike_tests(sweep)
    columns = [
        Column(
            _column_name(sweep, spot),
            _column_group(sweep, spot),
            fair=not (unlike.keys() & ({spot.test} if spot.test else set(tests))),
        )
        for spot in spots
    ]
    few_shot = sweep.protocol == "few-shot"
    several = len({m.shots for m in sweep.methods() if m.shots is not None}) > 1
    methods = sweep.methods()
    if few_shot:
        methods = sorted(methods, key=lambda m: -1 if m.shots is None else m.shots or np.inf)
    rows: list[Row] = []
    footnotes: list[str] = []
    for number, method in enumerate(methods):
        shots = method.shots_text
        labels = (shots, method.name) if few_shot else (method.name, shots)
        cells = tuple(_cell(sweep, method, spot, tests, metric) for spot in spots)
        section = shots if few_shot else _TRANSDUCTIVE if _on_targets(sweep, method) else ""
        rows.append(Row(labels if few_shot or several else labels[:1], cells, section))
        last = all(other.name != method.name for other in methods[number + 1 :])
        if published and metric == "accuracy" and last:
            width = 2 if several or few_shot else 1
            more, said = _published_rows(sweep, method, spots, tests, width)
            rows += [replace(row, section=section) for row in more]
            footnotes += [note for note in said if note not in footnotes]
    label_names = ("shots", "method") if few_shot else ("method", "shots")
    table = Table(
        name=table_name(sweep) + ("" if metric == "accuracy" else "-macro-f1"),
        title=table_title(sweep) + ("" if metric == "accuracy" else ", macro-F1"),
        caption=_caption(sweep, metric),
        label_names=label_names if few_shot or several else label_names[:1],
        columns=tuple(columns),
        rows=tuple(rows),
    )
    notes = [*_missing_notes(sweep, tests), *_unlike_notes(unlike), *_other_notes(sweep)]
    if any(cell.mark for row in rows for cell in row.cells):
        notes.insert(
            0,
            f"{MARK} over fewer seeds or fewer datasets than others of its column: not to be "
            "compared with them, and never marked as the best.",
        )
    if published and metric == "accuracy":
        footnotes = footnotes or ["There are no published numbers for these methods and datasets."]
        notes += footnotes
    return mark_best(_with_notes(table, notes))


def ece_table(sweep: Sweep) -> Table | None:
    """Expected calibration error in percent, the mean over seeds; None without predictions."""
    found: dict[tuple[Method, str, str], dict[int, float]] = defaultdict(dict)
    for run in sweep.runs:
        for test, by_part in run.result.predictions().items():
            for part, predictions in by_part.items():
                if (run.method, test, part) in sweep.scores and len(predictions.labels):
                    value = calibration(predictions).ece
                    found[run.method, test, part][run.result.seed] = value
    if not found:
        return None
    spots = sorted(
        {_Spot(test, part) for _, test, part in found},
        key=lambda spot: (sweep_tests(sweep).index(spot.test), spot.part),
    )
    rows = []
    for method in sweep.methods():
        cells = tuple(
            _mean_cell(sweep, method, found.get((method, spot.test, spot.part), {}))
            for spot in spots
        )
        rows.append(Row((method.name, method.shots_text), cells, section=method.shots_text))
    if sweep.protocol == "few-shot":
        rows.sort(key=lambda row: [m.shots_text for m in _by_shots(sweep)].index(row.section))
    else:
        rows = [Row(row.labels, row.cells) for row in rows]
    table = Table(
        name=f"{table_name(sweep)}-ece",
        title=f"{table_title(sweep)}, calibration",
        caption="Expected calibration error, % (15 bins of equal width, Guo et al. 2017): lower is "
        "better. Mean and population standard deviation over seeds.",
        label_names=("method", "shots"),
        columns=tuple(
            Column(_column_name(sweep, spot), _column_group(sweep, spot)) for spot in spots
        ),
        rows=tuple(rows),
        better="lowest",
    )
    return mark_best(table)


def table_name(sweep: Sweep) -> str:
    """For files: letters, digits and dashes."""
    parts = [sweep.protocol, sweep.source or "", sweep.model]
    text = "-".join(part for part in parts if part)
    return "-".join("".join(s if s.isalnum() else " " for s in text).split()).lower()


def table_title(sweep: Sweep) -> str:
    titles = {"few-shot": "Few-shot learning", "base-to-new": "Base-to-new generalisation"}
    titles |= {
        "cross-dataset": "Cross-dataset transfer",
        "domain-generalization": "Domain generalisation",
    }
    title = titles.get(sweep.protocol, sweep.protocol)
    return f"{title}, {sweep.model}"


def sweep_tests(sweep: Sweep) -> list[str]:
    """The source, where it was tested, and the targets."""
    first = [sweep.source] if any(t == sweep.source for _, t, _ in sweep.scores) else []
    return [*first, *sweep.targets()]


def average_cell(sweep: Sweep, method: Method, part: str, metric: str = "accuracy") -> Cell:
    """The average over datasets (without the source) of "test", "base", "new" or "HM", which is
    the harmonic mean of the averaged base and new."""
    return _cell(sweep, method, _Spot(None, part), _averaged_tests(sweep), metric)


def test_cell(sweep: Sweep, method: Method, test: str, part: str) -> Cell:
    """The accuracy on one test set."""
    return _cell(sweep, method, _Spot(test, part), (), "accuracy")


def _spots(sweep: Sweep, metric: str) -> list[_Spot]:
    parts = ("test",)
    if sweep.protocol == "base-to-new":
        parts = ("base", "new", HARMONIC) if metric == "accuracy" else ("base", "new")
    places: list[str | None] = list(sweep_tests(sweep))
    if len(_averaged_tests(sweep)) > 1:
        places.insert(0, None) if sweep.protocol == "base-to-new" else places.append(None)
    return [_Spot(place, part) for place in places for part in parts]


def _averaged_tests(sweep: Sweep) -> tuple[str, ...]:
    return tuple(sweep.targets())


def _column_name(sweep: Sweep, spot: _Spot) -> str:
    if spot.part != "test":
        return spot.part
    if spot.test is None:
        return "average"
    title = title_of(spot.test, sweep.source)
    return f"{title} (source)" if spot.test == sweep.source else title


def _column_group(sweep: Sweep, spot: _Spot) -> str:
    if spot.part != "test":
        return "average" if spot.test is None else title_of(spot.test)
    return ""


def _cell(sweep: Sweep, method: Method, spot: _Spot, averaged: Sequence[str], metric: str) -> Cell:
    tests = averaged if spot.test is None else (spot.test,)
    parts = ("base", "new") if spot.part == HARMONIC else (spot.part,)
    cells = []
    for part in parts:
        by_test = [sweep.by_seed(method, test, part, metric) for test in tests]
        there = [by_seed for by_seed in by_test if by_seed]
        if not there:
            return Cell()
        mean = float(np.mean([np.mean(list(by_seed.values())) for by_seed in there]))
        whole = len(there) == len(tests) and all(_all_seeds(sweep, method, b) for b in there)
        same = all(by_seed.keys() == there[0].keys() for by_seed in there)
        each = [float(np.mean([b[seed] for b in there])) for seed in there[0]] if same else []
        cells.append((mean, each, tuple(there[0]), whole))
    mark = "" if all(whole for *_, whole in cells) else MARK
    (mean, each, seeds, _), *rest = cells
    if rest:
        ((other, other_each, other_seeds, _),) = rest
        mean = harmonic_mean(mean, other)
        each = (
            [harmonic_mean(*pair) for pair in zip(each, other_each, strict=True)]
            if seeds == other_seeds and len(each) == len(other_each)
            else []
        )
    return Cell(mean, float(np.std(each)) if len(each) > 1 else None, mark)


def _mean_cell(sweep: Sweep, method: Method, by_seed: dict[int, float]) -> Cell:
    if not by_seed:
        return Cell()
    values = list(by_seed.values())
    mark = "" if _all_seeds(sweep, method, by_seed) else MARK
    return Cell(float(np.mean(values)), float(np.std(values)) if len(values) > 1 else None, mark)


def _all_seeds(sweep: Sweep, method: Method, by_seed: dict[int, float]) -> bool:
    """Nothing that was not trained depends on its seed."""
    return method.shots is None or set(by_seed) == set(sweep.seeds())


def _on_targets(sweep: Sweep, method: Method) -> bool:
    return all(run.on_target for run in sweep.runs_of(method))


def _by_shots(sweep: Sweep) -> list[Method]:
    return sorted(sweep.methods(), key=lambda m: -1 if m.shots is None else m.shots or np.inf)


def _caption(sweep: Sweep, metric: str) -> str:
    seeds = sweep.seeds()
    amounts = [m.learned_from for m in _by_shots(sweep) if m.shots is not None]
    parts = [f"{_METRICS[metric]}, %."]
    if sweep.source is not None:
        parts.append(f"Trained on {title_of(sweep.source)}; the average is over the targets alone.")
    if sweep.protocol != "few-shot" and amounts:
        parts.append(f"Learned from {' or '.join(dict.fromkeys(amounts))}.")
    if len(seeds) > 1:
        listed = ", ".join(map(str, seeds))
        parts.append(
            f"Mean and standard deviation over {len(seeds)} seeds ({listed}); the standard "
            "deviation is that of the population (divided by the number of seeds), as in CoOp's "
            "parse_test_res.py."
        )
    else:
        parts.append(f"One seed ({seeds[0]}).")
    if sweep.protocol == "base-to-new" and metric == "accuracy":
        parts.append(
            "HM is the harmonic mean of the base and new beside it; that of the average is the "
            "harmonic mean of the averages."
        )
    return " ".join(parts)


def _missing_notes(sweep: Sweep, tests: Sequence[str]) -> list[str]:
    """A line a method: which cells it lacks, and over how many datasets its average is."""
    notes = []
    parts = ("base", "new") if sweep.protocol == "base-to-new" else ("test",)
    seeds = set(sweep.seeds())
    for method in sweep.methods():
        missing: list[str] = []
        complete = 0
        for test in sweep_tests(sweep):
            if test == sweep.source and _on_targets(sweep, method):
                continue  # never trained on the source, so there is nothing to test
            lacking = [p for p in parts if not sweep.by_seed(method, test, p)]
            title = title_of(test, sweep.source)
            if lacking:
                which = f" ({', '.join(lacking)})" if len(lacking) < len(parts) else ""
                missing.append(title + which)
                continue
            complete += test in tests
            there = set(sweep.by_seed(method, test, parts[0]))
            if method.shots is not None and there != seeds:
                gone = ", ".join(map(str, sorted(seeds - there)))
                missing.append(f"{title} (seed {gone})")
        if missing:
            named = f"{method.name}{_of_shots(sweep, method)}"
            over = ""
            if complete < len(tests) and len(tests) > 1:
                over = f"; its average is over {complete} of {len(tests)} datasets"
            notes.append(f"{named} misses {', '.join(missing)}{over}.")
    if sweep.protocol == "few-shot":
        notes += _missing_shots(sweep)
    return notes


def _missing_shots(sweep: Sweep) -> list[str]:
    trained = [m for m in sweep.methods() if m.shots is not None]
    shots = sorted({m.shots for m in trained if m.shots})
    notes = []
    for name in dict.fromkeys(m.name for m in trained):
        has = {m.shots for m in trained if m.name == name}
        gone = [str(s) for s in shots if s not in has]
        if gone and has != {0}:
            notes.append(f"{name} misses {', '.join(gone)} shots.")
    return notes


def _of_shots(sweep: Sweep, method: Method) -> str:
    several = len({m.shots for m in sweep.methods() if m.shots is not None}) > 1
    if not several or method.shots is None:
        return ""
    return f" ({method.learned_from})"


def _unlike_tests(sweep: Sweep) -> dict[str, list[int]]:
    """Test sets that were not of equal size in all runs, with their numbers of images."""
    sizes: dict[tuple[str, str], set[int]] = defaultdict(set)
    for (_, test, part), by_seed in sweep.scores.items():
        sizes[test, part] |= {score["images"] for score in by_seed.values()}
    unlike: dict[str, set[int]] = defaultdict(set)
    for (test, _), of_test in sizes.items():
        if len(of_test) > 1:
            unlike[test] |= of_test
    return {test: sorted(of_test) for test, of_test in unlike.items()}


def _unlike_notes(unlike: dict[str, list[int]]) -> list[str]:
    return [
        f"{title_of(test)}: the runs were tested on different numbers of images "
        f"({', '.join(map(str, sizes))}), so none is marked as the best, there or on average."
        for test, sizes in unlike.items()
    ]


def _other_notes(sweep: Sweep) -> list[str]:
    notes = []
    if sweep.protocol in TRANSFER:
        names = [m.name for m in sweep.methods() if _on_targets(sweep, m)]
        if names:
            notes.append(
                f"{', '.join(dict.fromkeys(names))}: trained on unlabelled images of each "
                "target (transductive); the others never saw the targets, so the "
                "two kinds are not compared."
            )
    if sweep.protocol != "domain-generalization":
        domains = {title_of(test) for run in sweep.runs for test in domain_tests(run)}
        if domains:
            notes.append(
                f"The tests on domains ({', '.join(sorted(domains))}) are in results.csv alone."
            )
    return notes


def _published_rows(
    sweep: Sweep, method: Method, spots: Sequence[_Spot], tests: Sequence[str], labels: int
) -> tuple[list[Row], list[str]]:
    name = method.name.partition(" (")[0]
    rows, notes = [], []
    for published in published_for(sweep.protocol, name, sweep.model):
        computed = False
        cells = []
        for spot in spots:
            value, own = _published_value(published, sweep.protocol, spot, tests)
            computed = computed or own
            cells.append(Cell(value))
        if all(cell.mean is None for cell in cells):
            continue
        backbone = published.backbone or "backbone unknown"
        of = f", {published.variant}" if published.variant else ""
        label = f"{name}, published ({backbone}{of})"
        texts = (label, published.shots)[:labels]
        rows.append(Row(texts, tuple(cells), published=True))
        about = f" ({published.about})" if published.about else ""
        notes.append(f"{label}: {published.source}{about}.")
        if computed:
            notes.append(
                "Published averages are computed here, over the published numbers of the datasets "
                "that this table shows."
            )
        if published.backbone is None or backbone_of(sweep.model) != published.backbone:
            of_theirs = published.backbone or "an unknown backbone"
            notes.append(
                f"The published numbers of {of_theirs} are not comparable with {sweep.model}."
            )
        if method.shots_text != published.shots:
            notes.append(f"{label}: of other shots ({published.shots}) than ours, not comparable.")
    return rows, notes


def _published_value(
    published: Published, protocol: str, spot: _Spot, tests: Sequence[str]
) -> tuple[float | None, bool]:
    """The number, and whether it is an average that is computed here."""
    parts = ("base", "new", HARMONIC) if protocol == "base-to-new" else ("test",)
    place = parts.index(spot.part)
    if spot.test is not None:
        values = published.values.get(spot.test)
        return (None if values is None else values[place]), False
    if set(tests) == set(_AVERAGED[protocol]):
        return (None if published.average is None else published.average[place]), False
    values = [published.values.get(test) for test in tests]
    if any(v is None or v[0] is None for v in values):
        return None, False
    means = [float(np.mean([v[i] for v in values])) for i in range(min(2, len(parts)))]
    return (harmonic_mean(*means) if spot.part == HARMONIC else means[place]), True


def _with_notes(table: Table, notes: Sequence[str]) -> Table:
    return replace(table, notes=tuple(dict.fromkeys(notes)))
