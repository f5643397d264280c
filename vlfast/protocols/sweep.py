"""Carry out a protocol: its cells side by side, each in processes of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from vlfast.errors import VlfastError
from vlfast.protocols.cells import Cell
from vlfast.protocols.checks import check_cells
from vlfast.protocols.grids import SEEDS, Request, grid
from vlfast.protocols.summary import outcome_line
from vlfast.protocols.work import StoppedError, Workers, environment_for
from vlfast.trainers.config import merge_options
from vlfast.trainers.device import resolve_device

KEPT_FEATURES = ".features"  # below the output, for all cells


@dataclass
class Outcome:
    """What became of the cells that were asked for: finished, those that failed with the reason,
    those that others were working at, and the datasets that were left out as missing."""

    done: list[Cell] = field(default_factory=list)
    failed: dict[Cell, str] = field(default_factory=dict)
    busy: list[Cell] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def run_protocol(
    protocol: str,
    recipes: Sequence[str],
    datasets: Sequence[str] | None = None,
    *,
    output: str | Path,
    seeds: Sequence[int] = SEEDS,
    shots: Sequence[int] | None = None,
    source: str | None = None,
    options: Mapping[str, Any] | None = None,
    cells: Sequence[int] | None = None,
    jobs: int | None = None,
    devices: Sequence[str] = (),
    processes: int = 1,
    skip_missing: bool = False,
    report: Callable[[str], None] = print,
) -> Outcome:
    """Train and test every cell of a protocol; what is finished below ``output`` is not run again,
    what was begun goes on.

    protocol, recipes, datasets, seeds, shots, source, options: see ``grids.Request``. cells: only
    those with these numbers. jobs: cells at a time, each in a process of its own; by default one,
    or as many as there are devices for. devices: "cuda:N" or "cpu", given to the cells in turn.
    processes: that train one cell together. skip_missing: go on without datasets that can't be
    read. report: gets a line for every cell that ends.

    A failing cell does not stop the others. Raises VlfastError, or one of its kind, for what can be
    known before the first cell begins; KeyboardInterrupt after all processes have ended.
    """
    request = Request(
        protocol=protocol,
        recipes=recipes,
        output=Path(output),
        datasets=datasets,
        seeds=seeds,
        shots=shots,
        source=source,
        options=with_kept_features(options or {}, Path(output)),
    )
    groups = device_groups(devices, processes, request.options)
    if jobs is not None and jobs < 1:
        raise VlfastError(f"--jobs: expected at least 1, got {jobs}")
    jobs = jobs or len(groups) or 1
    # More jobs than devices share them.
    environments = [
        environment_for(groups[job % len(groups)] if groups else (), processes, jobs, os.environ)
        for job in range(jobs)
    ]
    chosen, missing = check_cells(choose(grid(request), cells), skip_missing=skip_missing)
    outcome = Outcome(missing=missing)
    waiting = []
    for cell in chosen:
        (outcome.done if cell.state() == "done" else waiting).append(cell)
    _carry_out(waiting, environments, Workers(processes), outcome, report)
    outcome.done.sort(key=lambda cell: cell.number)
    return outcome


def choose(cells: Sequence[Cell], numbers: Sequence[int] | None) -> list[Cell]:
    """The cells with these numbers, all for None. VlfastError for a number that none has."""
    if numbers is None:
        return list(cells)
    by_number = {cell.number: cell for cell in cells}
    if unknown := [number for number in numbers if number not in by_number]:
        raise VlfastError(f"--cell: expected 1 to {len(cells)}, got {unknown[0]}")
    return [by_number[number] for number in dict.fromkeys(numbers)]


def with_kept_features(options: Mapping[str, Any], output: Path) -> Mapping[str, Any]:
    """Where nothing else is said, all cells share the test images' features."""
    if "test_features" in options.get("data", {}):
        return options
    return merge_options(options, {"data": {"test_features": str(output / KEPT_FEATURES)}})


def device_groups(
    devices: Sequence[str], processes: int, options: Mapping[str, Any]
) -> list[tuple[str, ...]]:
    """The devices of each cell that runs at a time, one a process; none if no devices are given.

    Raises VlfastError for a device that is not there, or where they do not come out even.
    """
    if processes < 1:
        raise VlfastError(f"--processes: expected at least 1, got {processes}")
    if not devices:
        return []
    if "device" in options.get("model", {}):
        raise VlfastError("--devices: --model.device names one for all cells; give one of the two")
    for device in devices:
        if device in ("auto", "cuda"):
            raise VlfastError(f'--devices: expected "cuda:N" or "cpu", got {device!r}')
        resolve_device(device)
    if set(devices) == {"cpu"}:
        return [("cpu",) * processes]
    if "cpu" in devices:
        raise VlfastError("--devices: expected GPUs or cpu, got both")
    if len(devices) % processes:
        raise VlfastError(
            f"--devices: expected a multiple of the {processes} processes that train a cell "
            f"together, got {len(devices)}"
        )
    return [
        tuple(devices[start : start + processes]) for start in range(0, len(devices), processes)
    ]


def _carry_out(
    cells: Sequence[Cell],
    environments: Sequence[Mapping[str, str]],
    workers: Workers,
    outcome: Outcome,
    report: Callable[[str], None],
) -> None:
    free: SimpleQueue[Mapping[str, str]] = SimpleQueue()
    for environment in environments:
        free.put(environment)

    def work(cell: Cell) -> tuple[bool, float]:
        environment = free.get()
        start = time.monotonic()
        try:
            return workers.work_at(cell, environment), time.monotonic() - start
        finally:
            free.put(environment)

    with ThreadPoolExecutor(len(environments)) as pool:
        futures: dict[Future[tuple[bool, float]], Cell] = {}
        ended = 0
        try:
            for cell in cells:
                futures[pool.submit(work, cell)] = cell
            left = set(futures)
            while left:
                # A timeout lets Ctrl-C through on every platform.
                finished, left = wait(left, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in sorted(finished, key=lambda one: futures[one].number):
                    ended += 1
                    line = _settle(future, futures[future], outcome)
                    report(f"[{ended}/{len(cells)}] {futures[future]}: {line}")
        except BaseException:
            for future in futures:
                future.cancel()
            workers.stop()
            raise


def _settle(future: Future[tuple[bool, float]], cell: Cell, outcome: Outcome) -> str:
    """Note how a cell ended; what to say of it."""
    try:
        ours, seconds = future.result()
    except StoppedError:
        return "stopped"
    except (VlfastError, OSError) as error:
        outcome.failed[cell] = " ".join(str(error).split())
        return f"failed: {outcome.failed[cell]}"
    if not ours:
        outcome.busy.append(cell)
        return "another process works at it, so it is left to that one"
    outcome.done.append(cell)
    return f"{outcome_line(cell)}  ({seconds:.0f} s)"
