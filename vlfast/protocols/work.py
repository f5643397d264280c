"""The processes that train and test a cell."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vlfast.errors import VlfastError
from vlfast.protocols.cells import LOG, OPTIONS, Cell
from vlfast.trainers.run_folder import RunFolder

GRACE = 20.0  # seconds that all have to stop in, before they are killed


class StoppedError(Exception):
    """The sweep was stopped while this cell was worked at."""


@dataclass
class Workers:
    """Processes that can be stopped together.

    processes: how many train a cell together (torchrun).
    """

    processes: int = 1
    _running: set[subprocess.Popen] = field(default_factory=set)
    _stopped: bool = False
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def work_at(self, cell: Cell, environment: Mapping[str, str]) -> bool:
        """Train and test a cell as far as that is not done; False where another works at it.

        environment: of its processes. Raises VlfastError with the reason where it fails,
        StoppedError after ``stop``.
        """
        with cell.locked() as lock:
            if lock is None:
                return False
            if cell.state() == "done":  # by another, since the sweep began
                return True
            cell.check()
            cell.write()
            if not RunFolder(cell.folder).finished:
                self._run(_train(cell, self.processes), cell, environment, lock)
            if cell.untested():
                self._run(_test(cell), cell, environment, lock)
            return True

    def stop(self) -> None:
        """End all processes: they get the time to end well, and none starts any more."""
        with self._guard:
            self._stopped = True
            running = list(self._running)
        # What a script starts in the background ignores Ctrl-C, and so do its children.
        deaf = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        for process in running:
            process.send_signal(signal.SIGTERM if deaf else signal.SIGINT)
        deadline = time.monotonic() + GRACE
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):  # it has ended since
                    os.killpg(process.pid, signal.SIGKILL)

    def _run(
        self, command: Sequence[str], cell: Cell, environment: Mapping[str, str], lock: int
    ) -> None:
        with open(cell.folder / LOG, "ab") as log:
            start = log.tell()
            with self._guard:
                if self._stopped:
                    raise StoppedError
                # A session of its own: Ctrl-C reaches the sweep alone, which stops the others.
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    pass_fds=(lock,),
                    start_new_session=True,
                )
                self._running.add(process)
            try:
                code = process.wait()
            finally:
                self._running.discard(process)
        if self._stopped:
            raise StoppedError
        if code:
            raise VlfastError(_reason(cell.folder / LOG, start, code))


def environment_for(
    devices: Sequence[str], processes: int, jobs: int, base: Mapping[str, str]
) -> dict[str, str]:
    """Of the processes of one cell: ``devices`` are all that they see, and cores are shared
    between ``jobs`` cells of ``processes`` each, unless OMP_NUM_THREADS says otherwise."""
    environment = dict(base)
    if devices:
        seen = base.get("CUDA_VISIBLE_DEVICES", "")
        names = [name.strip() for name in seen.split(",") if name.strip()]
        numbers = [int(device.partition(":")[2] or 0) for device in devices if device != "cpu"]
        if names and any(number >= len(names) for number in numbers):
            raise VlfastError(
                f"--devices: cuda:{max(numbers)} asked for, but CUDA_VISIBLE_DEVICES={seen} "
                f"leaves {len(names)}"
            )
        chosen = [names[number] if names else str(number) for number in numbers]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    if "OMP_NUM_THREADS" not in base and jobs * processes > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, _cores() // (jobs * processes)))
    return environment


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _train(cell: Cell, processes: int) -> list[str]:
    launcher = []
    if processes > 1:
        # standalone: a free port, so that several cells can train side by side.
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    command = [sys.executable, "-m", *launcher, "vlfast", "train"]
    if RunFolder(cell.folder).started:
        return [*command, "--resume", str(cell.folder)]
    return [*command, "--config", str(cell.folder / OPTIONS), "--output", str(cell.folder)]


def _test(cell: Cell) -> list[str]:
    targets = json.dumps([asdict(target) for target in cell.untested()])
    arguments = [str(cell.folder), cell.protocol, targets]
    return [sys.executable, "-m", "vlfast.protocols.targets", *arguments]


def _reason(log: Path, start: int, code: int) -> str:
    """Why a process failed, of what it wrote from ``start`` on: its last line of an error."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    with open(log, "rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith(("vlfast: ", "vlfast (process "))]
    last = (errors or lines or [f"exit status {code}"])[-1]
    return last.removeprefix("vlfast: ").strip()
