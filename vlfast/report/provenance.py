"""What a sweep was made with, and where that differs between cells that are compared."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from vlfast.protocols.cells import flat
from vlfast.protocols.results import evaluation_file
from vlfast.report.sweeps import Method, Sweep, dataset_order, title_of

# Sections of a config on which nothing but a user's options makes seeds differ.
_OF_TRAINING = ("recipe", "prompts", "objectives")


@dataclass(frozen=True)
class Fingerprint:
    """The training images of one draw: equal fingerprints, equal images."""

    dataset: str
    shots: str
    seed: int
    values: tuple[str, ...]


@dataclass(frozen=True)
class Provenance:
    """facts: what was run, as names and texts. warnings: differences between cells of the sweep's
    table that make them not comparable. fingerprints: of every draw."""

    facts: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    fingerprints: tuple[Fingerprint, ...]


def provenance_of(sweep: Sweep) -> Provenance:
    """Read from the runs' config.yaml and result.json and from their tests on other datasets."""
    seeds, shots = sweep.seeds(), sorted({m.shots for m in sweep.methods() if m.shots})
    versions = _count(
        run.result.record.get("versions", {}).get("vlfast", "unknown") for run in sweep.runs
    )
    torches = _count(
        run.result.record.get("versions", {}).get("torch", "unknown") for run in sweep.runs
    )
    precisions = _count(
        run.result.options["model"].get("precision", "unknown") for run in sweep.runs
    )
    facts = [
        ("protocol", sweep.name),
        ("methods", ", ".join(dict.fromkeys(m.name for m in sweep.methods()))),
        ("datasets", ", ".join(title_of(t, sweep.source) for t in sweep.targets())),
        ("model", f"{sweep.model}, {' and '.join(precisions)}"),
        ("seeds", ", ".join(map(str, seeds))),
        ("shots", ", ".join(map(str, shots)) or "none"),
        ("runs", str(len(sweep.runs))),
        ("training time", _duration(sum(run.result.train_seconds for run in sweep.runs))),
        ("vlfast", ", ".join(versions)),
        ("torch", ", ".join(torches)),
        (
            "devices",
            ", ".join(_count(run.result.record.get("device", "unknown") for run in sweep.runs)),
        ),
    ]
    fingerprints = _fingerprints(sweep)
    warnings = [
        *_differ("versions of vlfast", versions),
        *_differ("precisions", precisions),
        *_options_differ(sweep),
        *(_draw_differs(draw) for draw in fingerprints if len(draw.values) > 1),
        *_tests_differ(sweep),
    ]
    return Provenance(tuple(facts), tuple(warnings), tuple(fingerprints))


def _count(values: Any) -> dict[str, int]:
    """How often each occurs, in the order of first occurrence."""
    counts: dict[str, int] = defaultdict(int)
    for value in values:
        counts[str(value)] += 1
    return dict(counts)


def _differ(what: str, counts: dict[str, int], runs: str = "The runs") -> list[str]:
    if len(counts) < 2:
        return []
    listed = ", ".join(f"{value} ({n} run{'s' if n > 1 else ''})" for value, n in counts.items())
    return [f"{runs} have different {what}: {listed}."]


def _options_differ(sweep: Sweep) -> list[str]:
    """Options of training that differ between the seeds of one mean."""
    found: dict[tuple[str, Method], list[dict[str, Any]]] = defaultdict(list)
    for run in sweep.runs:
        options = run.result.options
        ours = {section: options[section] for section in _OF_TRAINING if section in options}
        found[run.result.dataset, run.method].append(flat(ours))
    differences = []
    for (dataset, method), runs in found.items():
        for name in sorted(set().union(*runs)):
            counts = _count(options.get(name) for options in runs)
            runs_of = f"{method.name} on {title_of(dataset)}, {method.learned_from}: the runs"
            differences += _differ(name, counts, runs_of)
    return differences


def _fingerprints(sweep: Sweep) -> list[Fingerprint]:
    found: dict[tuple[Hashable, ...], dict[str, None]] = defaultdict(dict)
    for run in sweep.runs:
        value = run.result.record["data"].get("fingerprint")
        if value:
            key = (run.result.dataset, run.method.shots_text, run.result.seed)
            found[key][value] = None
    keys = sorted(found, key=lambda key: (dataset_order(key[0]), key[1].zfill(8), key[2]))
    return [Fingerprint(*key, tuple(found[key])) for key in keys]


def _draw_differs(draw: Fingerprint) -> str:
    shots = "without training" if draw.shots == "none" else f"{draw.shots} shots"
    return (
        f"{title_of(draw.dataset)}, {shots}, seed {draw.seed}: the runs had different images "
        f"(fingerprints {', '.join(draw.values)})."
    )


def _tests_differ(sweep: Sweep) -> list[str]:
    """Tests on other datasets whose images were not the same for all runs."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for run in sweep.runs:
        for test in run.result.scores:
            file = evaluation_file(run.result.folder, test)
            if file.is_file():
                data = json.loads(file.read_text(encoding="utf-8"))["data"]
                if data.get("fingerprint"):
                    found[test][data["fingerprint"]] = None
    return [
        f"{title_of(test, sweep.source)}: the runs were tested on different images (fingerprints "
        f"{', '.join(values)})."
        for test, values in sorted(found.items())
        if len(values) > 1
    ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
