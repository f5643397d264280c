"""Several processes: the run of one, and what they refuse."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import vlfast
from tests.conftest import squares_dataset
from tests.trainers import shared_run
from vlfast.errors import VlfastError
from vlfast.trainers.distributed import SharedBatchNorm, check_batch, gather_shares, share_of
from vlfast.trainers.run_folder import RunFolder


def environment(**more):
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **more}


def start_two(*argv):
    """Two processes of ``python -m ...`` that know of each other, without a launcher."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = str(listening.getsockname()[1])
    started = []
    for rank in "01":
        found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", *map(str, argv)],
                env=environment(**found),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


@pytest.fixture(scope="module")
def runs(tiny_clip, tmp_path_factory):
    """(folder of one process, folder of two), everything in shared_run trained in both."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    for folder in (one, two):
        stopped_after_one_epoch(tiny_clip, folder / "stopped")
    processes = start_two("tests.trainers.shared_run", two)
    shared_run.train_all(tiny_clip, one)
    data = squares_dataset(val=21, test=43)
    vlfast.resume(one / "stopped", clip=tiny_clip, dataset=data, show_progress=False)
    ends = [(process.communicate(timeout=120)[1], process.returncode) for process in processes]
    assert [code for _, code in ends] == [0, 0], "\n".join(errors for errors, _ in ends)
    return one, two


def stopped_after_one_epoch(clip, folder):
    class Killed(BaseException):
        pass

    def killed(self, name, *args, write=RunFolder.write_tensors):
        if name == "state" and (self.path / "state.safetensors").is_file():
            raise Killed
        write(self, name, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, "write_tensors", killed)
        data = squares_dataset(val=21, test=43)
        vlfast.fit("plpp", model=clip, data=data, output=folder, **shared_run.OPTIONS)


@pytest.mark.parametrize("name", ["probe", "base", "stopped", "small"])
def test_two_processes_give_the_run_of_one(runs, name):
    """Sums are taken in another order, so the same up to rounding (of bf16 in "small")."""
    one, two = (RunFolder(folder / name) for folder in runs)
    close = {"atol": 2e-2, "rtol": 0.0} if name == "small" else {"atol": 2e-5, "rtol": 1e-4}
    for checkpoint in ("last", "best"):
        ours, theirs = two.read_tensors(checkpoint), one.read_tensors(checkpoint)
        assert ours[1] == theirs[1]
        torch.testing.assert_close(ours[0], theirs[0], **close)
    for theirs, ours in zip(one.read_metrics(), two.read_metrics(), strict=True):
        theirs["seconds"] = ours["seconds"]
        assert ours == pytest.approx(theirs, rel=1e-2 if name == "small" else 1e-4)
    assert two.read_result()["accuracy"] == one.read_result()["accuracy"]
    assert two.read_result()["best"] == one.read_result()["best"]


def test_parameters_of_objectives_learn_in_both(runs):
    for folder in runs:
        learned = RunFolder(folder / "probe").read_tensors("last")[0]
        assert not torch.equal(learned["objectives.probe.unread"], torch.zeros(3))
        start = torch.randn(32, generator=torch.Generator().manual_seed(5))
        assert not torch.allclose(learned["objectives.probe.direction"], start, atol=1e-3)
        assert int(learned["objectives.probe.norm.num_batches_tracked"]) == 15


def test_a_batch_that_can_not_be_shared_is_refused_by_all(runs):
    for rank in (0, 1):
        report = json.loads((runs[1] / f"report-{rank}.json").read_text())
        assert report["processes"] == 2
        assert "recipe.batch_size: expected a multiple of the 2 processes" in report["error"]
        assert "got 7" in report["error"]
    assert not (runs[1] / "odd").exists()


def test_shared_batches():
    check_batch(32, 8, 4)
    check_batch(32, 100, 4)
    with pytest.raises(VlfastError, match="got 10 .all the training images; asked: 32."):
        check_batch(32, 10, 4)


def test_shares_cover_a_split_in_order():
    class Rank:
        num_processes = 3

        def __init__(self, process_index):
            self.process_index = process_index

    split = squares_dataset(train=10).train
    parts = [share_of(split, Rank(rank)).indices for rank in range(3)]
    assert [len(part) for part in parts] == [4, 4, 4]
    together = torch.cat([torch.from_numpy(part) for part in parts])[: len(split)]
    assert together.tolist() == split.indices.tolist()
    assert len(share_of(split.at([3]), Rank(2))) == 1
    assert share_of(split, None) is split
    rows = torch.arange(4)
    assert gather_shares(rows, 4, None) is rows


def test_shared_batch_norm_is_batch_norm(monkeypatch):
    """With one process's share being the whole batch."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    torch.manual_seed(0)
    plain, shared = nn.BatchNorm1d(6).double(), SharedBatchNorm(6).double()
    for _ in range(3):
        x = torch.randn(5, 6, dtype=torch.float64) * 3 + 1
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for norm, given in zip((plain, shared), inputs, strict=True):
            (norm(given) * torch.arange(6.0)).sin().sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(shared.state_dict(), plain.state_dict(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(shared.weight.grad, plain.weight.grad, atol=1e-5, rtol=1e-5)


GLYPHS = (
    *("vlfast", "train", "--recipe", "coop", "--data", "glyphs/tools", "--data.classes", "base"),
    *("--data.shots", "4", "--recipe.batch_size", "16"),
)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers(tmp_path, launcher):
    start = {
        "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "-m"],
        # Its --cpu starts a single process, whatever --num_processes says.
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m"],
    }[launcher]
    train = [*GLYPHS, "--recipe.epochs", "3", "--output"]
    found = {}
    for name, words in (("one", []), ("two", start)):
        command = [sys.executable, "-m", *words, *train, str(tmp_path / name)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[name] = RunFolder(tmp_path / name)
        assert done.stdout.count("harmonic mean") == 1
    contexts = [f.read_tensors("last")[0]["context"] for f in found.values()]
    torch.testing.assert_close(contexts[1], contexts[0], atol=1e-6, rtol=1e-4)
    odd = [*start, *train, str(tmp_path / "odd"), "--recipe.batch_size", "15"]
    command = [sys.executable, "-m", *odd]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode != 0 and "expected a multiple of the 2 processes" in done.stderr


@pytest.fixture
def started(tmp_path):
    """A launcher of two processes with a long run, of which an epoch is done."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m"]
    command += [*GLYPHS, "--recipe.epochs", "2000", "--output", str(tmp_path / "run")]
    process = subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    state = tmp_path / "run" / "state.safetensors"
    while not state.is_file() and process.poll() is None:
        time.sleep(0.2)
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_ctrl_c_ends_all_processes(started):
    os.killpg(started.pid, signal.SIGINT)
    _, errors = started.communicate(timeout=60)
    assert started.returncode != 0
    assert errors.count("go on with `vlfast train --resume") == 1, errors


@pytest.mark.slow
def test_the_end_of_one_process_ends_the_others(started):
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    workers = [pid for pid in children if "vlfast" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    started.communicate(timeout=60)
    assert started.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
