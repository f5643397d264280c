"""One contest: the sides agree with the exact result, then take turns; memory is measured apart.

A case of an op makes its :class:`Problem` anew wherever it is needed, also in another process.
"""

from __future__ import annotations

import inspect
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OURS, EAGER = "vlfast", "eager"
MODES = ("forward", "forward+backward")
TRAINING_STEP = "training step"  # forward, backward, and the optimizer's step
ROUNDS = 9
SECONDS_OF_ROUND = 0.06  # of each side, in each round
SECONDS_OF_SLOW = 1.0  # a call that takes longer gains little from one to warm up
# Between two calls on a GPU so much is written, so that each reads its inputs from memory.
COLD_BYTES = 256 * 2**20
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Problem:
    """What the sides compute: each returns a 0-d loss of the same ``leaves``.

    A side that can't hold the graph of the whole loss yields its terms, which go back one by one.
    """

    sides: Mapping[str, Callable[[], Tensor | Iterator[Tensor]]]
    leaves: Sequence[Tensor]
    # The loss and its gradients to the leaves, in fp64.
    exact: Callable[[], Sequence[Tensor]]
    flop: float = 0.0  # of forward and backward
    bytes_read: float = 0.0  # by the least that forward and backward can do
    optimizer: torch.optim.Optimizer | None = None  # of a training step
    tolerance: float = math.inf  # for the error of the other sides; lower precision has none


@dataclass(frozen=True)
class Case:
    """A size of an op. ``full``: only with --full.

    baselines: the sides whose error and memory are reported beside ours. alone: those that need
    too much memory to take turns on a CPU; they are called once, in a process of its own.
    slow: some sides take seconds a call, and nothing is compiled, so that no call of theirs is
    spent on warming up. seconds: that the rounds may take, but there are three of them at least.
    over: where it stands in a plot over sizes, as ("classes", 100).
    """

    name: str
    make: Callable[[str], Problem]
    full: bool = False
    modes: Sequence[str] = MODES
    baselines: Sequence[str] = (EAGER,)
    alone: Sequence[str] = ()
    slow: bool = False
    seconds: float = 20.0
    over: tuple[str, int] | None = None

    def __str__(self) -> str:
        return self.name


@dataclass
class Result:
    """What a contest found; times in microseconds, errors relative to the largest number."""

    op: str
    case: str
    mode: str
    baselines: Sequence[str] = (EAGER,)
    over: tuple[str, int] | None = None
    times: dict[str, float] = field(default_factory=dict)  # the best call
    medians: dict[str, float] = field(default_factory=dict)  # of the medians of the rounds
    ratios: dict[str, float] = field(default_factory=dict)  # median over the rounds
    errors: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)  # rise of peak memory, MB
    device_times: dict[str, float] = field(default_factory=dict)  # of the kernels on a GPU, cold
    alone: list[str] = field(default_factory=list)  # sides of one call
    gflops: float | None = None
    gbytes_per_s: float | None = None


@dataclass(frozen=True)
class Call:
    """One call of a side: the loss and its gradients, seconds, and by how many MB memory rose."""

    outputs: Sequence[Tensor]
    seconds: float
    rise: float = 0.0


def step(problem: Problem, side: str, mode: str) -> Callable[[], Any]:
    """One call. "forward" is without gradients, as in validation."""
    loss, leaves = problem.sides[side], list(problem.leaves)
    if mode == TRAINING_STEP:
        return lambda: training_step(problem, side)
    if inspect.isgeneratorfunction(loss):
        return lambda: outputs(problem, side, mode)
    if mode == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return loss()

        return forward
    return lambda: torch.autograd.grad(loss(), leaves)


def training_step(problem: Problem, side: str) -> None:
    _, *gradients = outputs(problem, side, TRAINING_STEP)
    for leaf, gradient in zip(problem.leaves, gradients, strict=True):
        leaf.grad = gradient
    problem.optimizer.step()


def outputs(problem: Problem, side: str, mode: str) -> list[Tensor]:
    """The loss and, but for "forward", its gradients to the leaves."""
    leaves = list(problem.leaves)
    sums: list[Tensor] = []
    with torch.set_grad_enabled(mode != "forward"):
        loss = problem.sides[side]()
        for term in [loss] if isinstance(loss, Tensor) else loss:
            gradients = torch.autograd.grad(term, leaves) if mode != "forward" else ()
            values = [term.detach(), *gradients]
            sums = [a + b for a, b in zip(sums, values, strict=True)] if sums else values
    return sums


def run_contest(op: str, module: str, case: Case, mode: str, device: str) -> Result:
    """Raises AssertionError, before any time is taken, where a side is wrong."""
    torch.compiler.reset()  # else the limit on recompilations of one function is met
    problem = case.make(device)
    alone = [side for side in case.alone if device == "cpu"]
    result = Result(op, case.name, mode, case.baselines, case.over, alone=alone)
    calls = {
        side: call_apart(module, case.name, side, mode, warm=False)
        if side in alone
        else first_call(problem, side, mode)
        for side in problem.sides
    }
    result.errors = errors(problem, calls)
    check_parity(result.errors, problem.tolerance)
    steps = {side: step(problem, side, mode) for side in problem.sides if side not in alone}
    slow = []
    if case.slow and device == "cpu":
        slow = [side for side, call in calls.items() if call.seconds > SECONDS_OF_SLOW]
    take_turns(steps, result, case.seconds, slow)
    for side in alone:
        result.times[side] = result.medians[side] = calls[side].seconds * 1e6
        result.ratios[side] = result.medians[side] / result.medians[OURS]
    if device == "cuda":
        result.device_times = {side: device_time(function) for side, function in steps.items()}
    best = (result.device_times or result.times)[OURS]
    if mode != "forward":
        if problem.flop:
            result.gflops = problem.flop / best / 1e3
        if problem.bytes_read and device == "cuda":
            result.gbytes_per_s = problem.bytes_read / best / 1e3
        for side in (OURS, *case.baselines):
            if side in alone:
                result.peaks[side] = calls[side].rise
            elif side in problem.sides:
                warm = side not in slow
                result.peaks[side] = peak_rise(module, case.name, side, mode, device, warm)
    return result


def first_call(problem: Problem, side: str, mode: str) -> Call:
    """The optimizer's step is left out: it would move the leaves from under the next side."""
    start = time.perf_counter()
    return Call(outputs(problem, side, mode), time.perf_counter() - start)


def errors(problem: Problem, calls: Mapping[str, Call]) -> dict[str, float]:
    """The largest error of each side, over the loss and the gradients."""
    exact = problem.exact()
    found = {}
    for side, call in calls.items():
        relative = [
            (x.double() - e).abs().max() / e.abs().max().clamp_min(1e-30)
            for x, e in zip(call.outputs, exact, strict=False)
        ]
        found[side] = torch.stack(relative).max().item()  # NaN if any is
    return found


def check_parity(found: Mapping[str, float], tolerance: float = math.inf) -> None:
    others = [error for side, error in found.items() if side != OURS]
    assert all(error <= tolerance for error in others), f"a side computes another thing: {found}"
    plain = min(others, default=0.0)
    assert found[OURS] <= 1.5 * plain + 1e-5, f"red parity, so no time is taken: {found}"


def take_turns(
    steps: Mapping[str, Callable[[], Any]],
    result: Result,
    seconds_of_contest: float,
    slow: Sequence[str] = (),
) -> None:
    """Rounds in which each side runs for a while: what disturbs one disturbs all."""
    calls = dict.fromkeys(steps, 1)
    for side, function in steps.items():
        if side in slow:
            continue
        function()
        once = seconds(function)
        calls[side] = max(1, min(200, int(SECONDS_OF_ROUND / once)))
    best: dict[str, list[float]] = {side: [] for side in steps}
    medians: dict[str, list[float]] = {side: [] for side in steps}
    ends = time.perf_counter() + seconds_of_contest
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


def peak_rise(
    module: str, case: str, side: str, mode: str, device: str, warm: bool = True
) -> float:
    """MB by which one call raises the peak of memory, in a process of its own on a CPU.

    warm: not counting what only the first call takes.
    """
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
    return call_apart(module, case, side, mode, warm).rise


def call_apart(module: str, case: str, side: str, mode: str, warm: bool) -> Call:
    """One call in a process of its own, on the CPU."""
    with _forks().Pool(1) as pool:
        threads = torch.get_num_threads()
        found, *rest = pool.apply(_call_here, (module, case, side, mode, threads, warm))
    return Call([torch.from_numpy(x) for x in found], *rest)


def _forks() -> multiprocessing.context.BaseContext:
    """Processes forked from one that has loaded torch and open_clip and run nothing.

    With a fixed threshold freed blocks go back to the system, so that the first call, which loads
    code, may be left out of the measurement.
    """
    os.environ.update(MALLOC)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "open_clip", "vlfast", "vlfast.ops"])
    return context


def _call_here(
    module: str, case: str, side: str, mode: str, threads: int, warm: bool
) -> tuple[list[Any], float, float]:
    torch.set_num_threads(threads)
    problem = _case(module, case).make("cpu")
    if warm:
        outputs(problem, side, mode)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    before = _peak()
    call = first_call(problem, side, mode)
    return [x.double().numpy() for x in call.outputs], call.seconds, (_peak() - before) / 1e6


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _case(module: str, name: str) -> Case:
    import importlib

    (case,) = (case for case in importlib.import_module(module).CASES if case.name == name)
    return case
