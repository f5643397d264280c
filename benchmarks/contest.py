"""One contest: the sides agree with the exact result, then take turns; memory is measured apart.

A case of an op makes its :class:`Problem` anew wherever it is needed, also in another process.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OURS, EAGER = "vlfast", "eager"
MODES = ("forward", "forward+backward")
ROUNDS = 9
SECONDS_OF_ROUND = 0.06  # of each side, in each round
SECONDS_OF_CONTEST = 20.0
# Between two calls on a GPU so much is written, so that each reads its inputs from memory.
COLD_BYTES = 256 * 2**20
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Problem:
    """What the sides compute: each returns a 0-d loss of the same ``leaves``."""

    sides: Mapping[str, Callable[[], Tensor]]
    leaves: Sequence[Tensor]
    # The loss and its gradients to the leaves, in fp64.
    exact: Callable[[], Sequence[Tensor]]
    flop: float = 0.0  # of forward and backward
    bytes_read: float = 0.0  # by the least that forward and backward can do


@dataclass(frozen=True)
class Case:
    """A size of an op. ``full``: only with --full."""

    name: str
    make: Callable[[str], Problem]
    full: bool = False
    modes: Sequence[str] = MODES

    def __str__(self) -> str:
        return self.name


@dataclass
class Result:
    """What a contest found; times in microseconds, errors relative to the largest number."""

    op: str
    case: str
    mode: str
    times: dict[str, float] = field(default_factory=dict)  # the best call
    medians: dict[str, float] = field(default_factory=dict)  # of the medians of the rounds
    ratios: dict[str, float] = field(default_factory=dict)  # median over the rounds
    errors: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)  # rise of peak memory, MB
    device_times: dict[str, float] = field(default_factory=dict)  # of the kernels on a GPU, cold
    gflops: float | None = None
    gbytes_per_s: float | None = None


def step(problem: Problem, side: str, mode: str) -> Callable[[], Any]:
    """One call. "forward" is without gradients, as in validation."""
    loss, leaves = problem.sides[side], list(problem.leaves)
    if mode == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return loss()

        return forward
    return lambda: torch.autograd.grad(loss(), leaves)


def run_contest(op: str, module: str, case: Case, mode: str, device: str) -> Result:
    """Raises AssertionError, before any time is taken, where a side is wrong."""
    torch.compiler.reset()  # else the limit on recompilations of one function is met
    problem = case.make(device)
    result = Result(op, case.name, mode)
    result.errors = errors(problem, mode)
    check_parity(result.errors)
    steps = {side: step(problem, side, mode) for side in problem.sides}
    take_turns(steps, result)
    if device == "cuda":
        result.device_times = {side: device_time(function) for side, function in steps.items()}
    best = (result.device_times or result.times)[OURS]
    if mode == "forward+backward":
        if problem.flop:
            result.gflops = problem.flop / best / 1e3
        if problem.bytes_read and device == "cuda":
            result.gbytes_per_s = problem.bytes_read / best / 1e3
        result.peaks = {
            side: peak_rise(module, case.name, side, mode, device) for side in (OURS, EAGER)
        }
    return result


def errors(problem: Problem, mode: str) -> dict[str, float]:
    """The largest error of each side, over the loss and the gradients."""
    exact = problem.exact()
    found = {}
    for side, loss in problem.sides.items():
        value = loss()
        outputs = [value]
        if mode != "forward":
            outputs += torch.autograd.grad(value, list(problem.leaves))
        found[side] = max(
            ((x.detach().double() - e).abs().max() / e.abs().max().clamp_min(1e-30)).item()
            for x, e in zip(outputs, exact, strict=False)
        )
    return found


def check_parity(found: Mapping[str, float]) -> None:
    plain = min(error for side, error in found.items() if side != OURS)
    assert found[OURS] <= 1.5 * plain + 1e-5, f"red parity, so no time is taken: {found}"


def take_turns(steps: Mapping[str, Callable[[], Any]], result: Result) -> None:
    """Rounds in which each side runs for a while: what disturbs one disturbs all."""
    calls = {}
    for side, function in steps.items():
        function()
        once = seconds(function)
        calls[side] = max(1, min(200, int(SECONDS_OF_ROUND / once)))
    best: dict[str, list[float]] = {side: [] for side in steps}
    medians: dict[str, list[float]] = {side: [] for side in steps}
    ends = time.perf_counter() + SECONDS_OF_CONTEST
    for round_number in range(ROUNDS):
        if round_number >= 3 and time.perf_counter() > ends:
            break
        for side, function in steps.items():
            times = [seconds(function) * 1e6 for _ in range(calls[side])]
            best[side].append(min(times))
            medians[side].append(statistics.median(times))
    for side in steps:
        result.times[side] = min(best[side])
        result.medians[side] = statistics.median(medians[side])
        result.ratios[side] = statistics.median(
            its / ours for its, ours in zip(medians[side], medians[OURS], strict=True)
        )


def seconds(function: Callable[[], Any]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    chill()
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


_cold: list[Tensor] = []


def chill() -> None:
    """Overwrite the L2 cache of the GPU."""
    if not _cold:
        _cold.append(torch.empty(COLD_BYTES, dtype=torch.uint8, device="cuda"))
    _cold[0].zero_()


def device_time(function: Callable[[], Any], calls: int = 20) -> float:
    """Microseconds that the kernels of one call take on the GPU, its inputs not in the cache."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            chill()
            function()
        torch.cuda.synchronize()
    # What chills is a memset or a fill of bytes, which no side has.
    kernels = [
        event
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not any(x in event.key for x in ("Sync", "Memset", "FillFunctor<unsigned char>"))
    ]
    total = sum(event.self_device_time_total for event in kernels)
    assert total > 0, "the profiler saw no kernel"
    return total / calls


def copy_bandwidth() -> float:
    """GB/s of a copy on the GPU, reads and writes together."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return 2 * source.numel() / best / 1e9


def gemm_rate() -> float:
    """GFLOP/s of a large matrix product, fp32, on the CPU."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return 2 * 2048**3 / min(seconds(lambda: a @ b) for _ in range(7)) / 1e9


def peak_rise(module: str, case: str, side: str, mode: str, device: str) -> float:
    """MB by which one call raises the peak of memory, in a process of its own on a CPU."""
    if device == "cuda":
        problem = _case(module, case).make(device)
        function = step(problem, side, mode)
        function()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with _forks().Pool(1) as pool:
        return pool.apply(_peak_rise_here, (module, case, side, mode, torch.get_num_threads()))


def _forks() -> multiprocessing.context.BaseContext:
    """Processes forked from one that has loaded torch and run nothing.

    With a fixed threshold freed blocks go back to the system, so that the first call, which loads
    code, may be left out of the measurement.
    """
    os.environ.update(MALLOC)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "vlfast", "vlfast.ops"])
    return context


def _peak_rise_here(module: str, case: str, side: str, mode: str, threads: int) -> float:
    torch.set_num_threads(threads)
    function = step(_case(module, case).make("cpu"), side, mode)
    function()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    before = _peak()
    function()
    return (_peak() - before) / 1e6


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _case(module: str, name: str) -> Case:
    import importlib

    (case,) = (case for case in importlib.import_module(module).CASES if case.name == name)
    return case
