"""``pytest benchmarks --benchmark-only`` ends with a table of errors, ratios and peak memory.

It also writes results/<device>-<op>.{json,md,png}, unless --no-results is given. --full adds the
sweep of sizes. Each case is checked against fp64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.contest import (
    OURS,
    SECONDS_OF_SLOW,
    Case,
    Result,
    copy_bandwidth,
    gemm_rate,
    run_contest,
    seconds,
    step,
)
from benchmarks.machine import device_slug, device_type, machine

Contest = Callable[[Case, str], None]
RESULTS = pytest.StashKey[dict[str, list[Result]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the whole sweep of sizes")
    parser.addoption("--no-results", action="store_true", help="leave benchmarks/results as it is")


@pytest.fixture
def contest(benchmark: Any, request: pytest.FixtureRequest) -> Contest:
    """Runs one mode of a case: parity, times in turns, and memory."""
    module = request.module.__name__
    op = module.rpartition("bench_")[2]

    def run(case: Case, mode: str) -> None:
        if case.full and not request.config.getoption("--full"):
            pytest.skip("only with --full")
        if mode not in case.modes:
            pytest.skip("of no interest at this size")
        device = device_type()
        if not benchmark.enabled:
            step(case.make(device), OURS, mode)()
            return
        result = run_contest(op, module, case, mode, device)
        ours = step(case.make(device), OURS, mode)
        slow = result.times[OURS] > 1e6 * SECONDS_OF_SLOW
        rounds, warmup_rounds = (1, 0) if slow else (3, 1)
        benchmark.pedantic(lambda: seconds(ours), rounds=rounds, warmup_rounds=warmup_rounds)
        benchmark.extra_info["ratios"] = result.ratios
        request.config.stash.setdefault(RESULTS, {}).setdefault(op, []).append(result)

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.clear()
    machine_info.update(machine())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    by_op = config.stash.get(RESULTS, {})
    if not by_op:
        return
    if device_type() == "cuda":
        yardstick = f"copy bandwidth: {copy_bandwidth():.0f} GB/s, reads and writes together"
    else:
        yardstick = f"large fp32 matrix product: {gemm_rate():.0f} GFLOP/s"
    for op, results in by_op.items():
        terminalreporter.section(op)
        for line in report.table(results):
            terminalreporter.write_line(line)
        for note in report.notes(results):
            terminalreporter.write_line(note)
        if not config.getoption("--no-results"):
            report.write(op, results, device_slug(), machine(), yardstick)
    terminalreporter.section("how to read it")
    for line in report.explanation(machine(), yardstick):
        terminalreporter.write_line(line)
    if not config.getoption("--no-results"):
        where = report.RESULTS.relative_to(Path(__file__).parent.parent)
        terminalreporter.write_line(f"\nwritten to {where}/{device_slug()}-*")
