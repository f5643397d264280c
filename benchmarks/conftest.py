"""What every benchmark shares: the sides take turns, and what they ran on stands by the numbers.

``pytest benchmarks --benchmark-only --results`` writes results/<device>-<op>.json and .md, where
<device> is the kind of machine, such as cpu-2threads.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from operator import truediv
from pathlib import Path
from typing import Any

import pytest
import torch

from vlfast import __version__
from vlfast._extension import extension

RESULTS = Path(__file__).parent / "results"
OURS = "vlfast"
Contest = Callable[[Mapping[str, Callable[[], Any]]], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results", action="store_true", help="write the tables of benchmarks/results"
    )


@pytest.fixture
def contest(benchmark: Any) -> Contest:
    """Times functions by name, one of them OURS, in turns: what disturbs one disturbs all.

    Times, and their ratios to OURS, go into the benchmark's extra_info: of the best turns, which a
    busy machine disturbs least, and medians.
    """

    def run(sides: Mapping[str, Callable[[], Any]]) -> None:
        benchmark(sides[OURS])
        if not benchmark.enabled:
            return
        for side in sides.values():
            for _ in range(3):
                side()
        times: dict[str, list[float]] = {name: [] for name in sides}
        ends = time.perf_counter() + 6
        while time.perf_counter() < ends and len(times[OURS]) < 2000:
            for name, side in sides.items():
                times[name].append(seconds(side))
        for name, its in times.items():
            benchmark.extra_info[name] = {
                "best_us": round(min(its) * 1e6, 1),
                "median_us": round(statistics.median(its) * 1e6, 1),
                "best_ratio": round(min(its) / min(times[OURS]), 2),
                "median_ratio": round(statistics.median(map(truediv, its, times[OURS])), 2),
            }

    return run


def seconds(function: Callable[[], Any]) -> float:
    synchronise()
    start = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - start


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    built = extension()
    return {
        "device": device_kind(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "vlfast": __version__,
        "compiler": built.build_config()["compiler"] if built else None,
    }


def device_kind() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{torch.get_num_threads()}thread{'s' * (torch.get_num_threads() > 1)}"


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.clear()
    machine_info.update(machine())


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.config.getoption("--results"):
        return
    by_file: dict[str, dict[str, Any]] = {}
    for benchmark in session.config._benchmarksession.benchmarks:
        if benchmark.extra_info:
            op = Path(benchmark.fullname.split("::")[0]).stem.removeprefix("bench_")
            by_file.setdefault(op, {})[benchmark.param or benchmark.name] = benchmark.extra_info
    for op, rows in by_file.items():
        path = RESULTS / f"{device_kind()}-{op}"
        path.with_suffix(".json").write_text(
            json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n"
        )
        path.with_suffix(".md").write_text(table(op, rows))


def table(op: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Microseconds of every side, and how many times OURS each took."""
    sides = list(next(iter(rows.values())))
    lines = [
        f"# {op} on {device_kind()}",
        "",
        "Microseconds of the best of many turns, and how many times vlfast's it is: of the best "
        "turns; median over all turns.",
        "",
        "| | " + " | ".join(sides) + " |",
        "|---" * (len(sides) + 1) + "|",
    ]
    for name, results in rows.items():
        cells = [cell(side, results[side]) for side in sides]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- {name}: {value}" for name, value in machine().items())]
    return "\n".join(lines) + "\n"


def cell(side: str, result: Mapping[str, float]) -> str:
    time = f"{result['best_us']:.0f}"
    if side == OURS:
        return time
    return f"{time} ({result['best_ratio']:.1f}x; {result['median_ratio']:.1f}x)"
