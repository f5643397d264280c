"""Protocols end to end on icons: what is run, resumed, refused, reported."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from PIL import Image

from tests.protocols.support import read_yaml
from vlfast.cli import main
from vlfast.cli.run import _stopped_by_signals
from vlfast.errors import VlfastError
from vlfast.protocols import targets
from vlfast.protocols.cells import LOG
from vlfast.protocols.grids import Request, grid
from vlfast.protocols.results import read_results
from vlfast.protocols.sweep import device_groups, run_protocol
from vlfast.protocols.work import GRACE, Workers, environment_for
from vlfast.run import load
from vlfast.trainers.run_folder import RunFolder


def command(*words):
    return [sys.executable, "-m", "vlfast", "run", *map(str, words)]


def vlfast_run(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*words), capture_output=True, text=True, env=environment)


def vlfast_here(*words):
    """The same in this process: (exit status, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main(["run", *map(str, words)])
        except SystemExit as stopped:
            status = stopped.code
    return status, out.getvalue(), err.getvalue()


def times(folder):
    return {
        file: file.stat().st_mtime_ns
        for file in folder.rglob("*")
        if file.is_file() and file.name != ".lock"
    }


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """(output, what `vlfast run` said): a sweep of which one cell fails, on a test image that is
    cut short."""
    root = tmp_path_factory.mktemp("images")
    for part in ("train", "test"):
        for name in ("hammer", "saw"):
            (root / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), "red").save(root / part / name / "0.png")
    broken = root / "test" / "saw" / "0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    output = tmp_path_factory.mktemp("runs") / "few"
    words = ["few-shot", "--recipes", "zeroshot", "coop", "--datasets", "folder", "glyphs/tools"]
    words += ["--cell", "1", "3-4", "--shots", "1", "--seeds", "1", "--recipe.epochs", "1"]
    words += ["--data.root", root, "--jobs", "2", "--output", output]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        return output, words, vlfast_here(*words)


def test_a_failing_cell_is_reported_and_the_others_finish(swept):
    output, _, (status, said, problems) = swept
    assert status == 1
    (line,) = (x for x in problems.splitlines() if x.startswith("failed: "))
    assert "folder/zeroshot" in line and "corrupt" in line and "0.png" in line
    assert "corrupt" in (output / "folder" / "zeroshot" / LOG).read_text()
    assert [result.method for result in read_results(output)] == ["coop", "zeroshot"]
    assert "[3/3]" in said and "untrained" in said
    assert f"vlfast report {output}" in said


def test_results_say_what_they_are(swept):
    coop, zeroshot = read_results(swept[0])
    assert {coop.protocol, zeroshot.protocol} == {"few-shot"}
    assert (coop.dataset, coop.shots, coop.seed, coop.epochs) == ("glyphs/tools", 1, 1, 1)
    assert (zeroshot.shots, zeroshot.epochs) == (0, 0)
    predictions = coop.predictions()["glyphs/tools"]["test"]
    accuracy = (predictions.labels == predictions.predicted).double().mean().item()
    assert 100 * accuracy == pytest.approx(coop.scores["glyphs/tools"]["test"]["accuracy"])


def test_kept_features_change_no_number(swept, tmp_path):
    """The zero-shot run read features that another process may have written."""
    (zeroshot,) = (r for r in read_results(swept[0]) if not r.epochs)
    run = load(zeroshot.folder)
    assert run.config.data.test_features == str(swept[0].absolute() / ".features")
    assert len(list((swept[0] / ".features").iterdir())) >= 3
    run.config.data.test_features = None
    again = run.evaluate()
    assert again["test"] == zeroshot.scores["glyphs/tools"]["test"]


def test_finished_cells_are_left_as_they_are(swept):
    output, words, _ = swept
    before = times(output)
    at = words.index("--cell")
    finished = [*words[: at + 1], *words[at + 2 :]]
    status, said, _ = vlfast_here(*finished)
    assert status == 0 and "[1/" not in said and "untrained" in said
    status, _, problem = vlfast_here(*words, "--recipe.epochs", "2")
    assert status == 2 and problem.count("\n") == 1
    assert "--recipe.epochs" in problem and "was begun with 1" in problem
    assert times(output) == before


def test_a_cell_that_another_works_at_is_left_to_it(swept):
    output, words, _ = swept
    root = words[words.index("--data.root") + 1]
    options = {"recipe": {"epochs": 1}, "data": {"root": str(root)}}
    (cell,) = grid(Request("few-shot", ["zeroshot"], output, ["folder"], options=options))
    with cell.locked():
        status, said, problems = vlfast_here(*words)
    assert status == 1 and "another process works at it" in said
    assert problems.startswith("left to another process: folder/zeroshot; when that has ended")
    assert problems.count("\n") == 1


@pytest.mark.slow
def test_cross_dataset(tmp_path):
    output = tmp_path / "cross"
    how = {"output": output, "seeds": [1], "shots": [2], "source": "glyphs/tools", "jobs": 2}
    how["options"] = {"recipe": {"epochs": 1}}
    lines = []
    outcome = run_protocol(
        "cross-dataset",
        ["zeroshot", "coop", "promptkd"],
        ["glyphs/nature", "glyphs/places"],
        **how,
        report=lines.append,
    )
    assert not outcome.failed and len(outcome.done) == len(lines) == 4
    results = {r.folder.name: r for r in read_results(output) if r.dataset == r.source}
    for result in results.values():
        assert set(result.scores) == {"glyphs/tools", "glyphs/nature", "glyphs/places"}
        own = load(result.folder).evaluate("glyphs/nature")["test"]
        assert result.scores["glyphs/nature"]["test"] == own
        found = result.predictions()["glyphs/nature"]["test"]
        assert len(found.labels) == own["images"]
    promptkd = [r for r in read_results(output) if r.method == "promptkd"]
    assert [(r.dataset, r.source) for r in promptkd] == [
        ("glyphs/nature", "glyphs/tools"),
        ("glyphs/places", "glyphs/tools"),
    ]
    # An evaluation that is gone is made again; the training is not.
    folder = results["coop-2shots-seed1"].folder
    before = times(folder)
    file = folder / "evaluations" / "glyphs-places.json"
    file.unlink()
    outcome = run_protocol(
        "cross-dataset", ["coop"], ["glyphs/nature", "glyphs/places"], **how, report=lines.append
    )
    assert len(outcome.done) == 1 and file.is_file()
    changed = {f.name for f, when in times(folder).items() if when != before.get(f)}
    assert changed == {"glyphs-places.json", "glyphs-places.safetensors", "log.txt"}
    # Domain generalization needs no training of its own.
    outcome = run_protocol("domain-generalization", ["coop", "zeroshot"], **how)
    assert len(outcome.done) == 2 and times(folder)[folder / "last.safetensors"]
    domain = [r for r in read_results(output) if r.protocol == "domain-generalization"]
    assert {r.method for r in domain} == {"coop", "zeroshot"}
    assert set(domain[0].scores) == {
        "glyphs/tools",
        "glyphs/tools/remix",
        "glyphs/tools/fontawesome",
    }


@pytest.mark.slow
def test_base_to_new_in_several_processes(tmp_path):
    words = ["base-to-new", "--recipe", "coop", "--datasets", "glyphs/tools", "--seeds", "1"]
    words += ["--shots", "2", "--recipe.epochs", "1"]
    for name, more in (("one", []), ("two", ["--processes", "2"])):
        done = vlfast_run(*words, "--output", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
        assert "harmonic mean" in done.stdout
    one, two = (read_results(tmp_path / name)[0] for name in ("one", "two"))
    assert one.scores == two.scores and one.protocol == two.protocol == "base-to-new"
    contexts = [RunFolder(r.folder).read_tensors("last")[0]["context"] for r in (one, two)]
    torch.testing.assert_close(contexts[1], contexts[0], atol=1e-6, rtol=1e-4)


def test_a_terminal_that_closes_leaves_what_nohup_started(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", {signal.SIGHUP: signal.SIG_IGN}.get)
    changed = {}
    monkeypatch.setattr(signal, "signal", lambda number, handler: changed.update({number: handler}))
    with _stopped_by_signals():
        assert set(changed) == {signal.SIGTERM}


class Process:
    """One that ends when it is killed, on a clock of its own."""

    clock = 0.0

    def __init__(self, pid):
        self.pid, self.signals = pid, []

    def send_signal(self, number):
        self.signals.append(number)

    def wait(self, timeout):
        Process.clock += timeout
        raise subprocess.TimeoutExpired("vlfast", timeout)


@pytest.mark.parametrize(
    ("handler", "sent"),
    [(signal.default_int_handler, signal.SIGINT), (signal.SIG_IGN, signal.SIGTERM)],
)
def test_all_processes_have_the_same_time_to_stop(monkeypatch, handler, sent):
    processes = [Process(1), Process(2), Process(3)]
    killed = []

    def kill(pid, number):
        killed.append((pid, number))
        if pid == 2:
            raise ProcessLookupError

    monkeypatch.setattr(Process, "clock", 0.0)
    monkeypatch.setattr("vlfast.protocols.work.time.monotonic", lambda: Process.clock)
    monkeypatch.setattr("vlfast.protocols.work.os.killpg", kill)
    monkeypatch.setattr("vlfast.protocols.work.signal.getsignal", lambda number: handler)
    workers = Workers()
    workers._running.update(processes)
    workers.stop()
    assert Process.clock == GRACE
    assert all(process.signals == [sent] for process in processes)
    assert sorted(killed) == [(pid, signal.SIGKILL) for pid in (1, 2, 3)]


def test_a_run_that_cannot_be_loaded_is_one_line(tmp_path, capsys):
    assert targets.main([str(tmp_path), "cross-dataset", "[]"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vlfast: ") and "no config.yaml" in said and said.count("\n") == 1


LONG = ("few-shot", "--recipe", "coop", "--datasets", "glyphs/tools", "--shots", "1")


def _start(words):
    return subprocess.Popen(
        command(*words),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for(file, process):
    while not file.is_file() and process.poll() is None:
        time.sleep(0.1)
    assert process.poll() is None


def _children(process):
    """Process ids of its children, from /proc."""
    path = f"/proc/{process.pid}/task"
    found = []
    for task in os.listdir(path):
        with open(f"{path}/{task}/children") as file:
            found += map(int, file.read().split())
    return found


@pytest.mark.slow
def test_what_is_killed_goes_on_with_the_same_command(tmp_path):
    words = [*LONG, "--seeds", "1", "2", "--recipe.epochs", "20", "--output", tmp_path / "killed"]
    process = _start(words)
    first, second = (tmp_path / "killed/glyphs-tools" / f"coop-1shots-seed{s}" for s in (1, 2))
    _wait_for(second / "metrics.jsonl", process)
    kept = times(first)
    (child,) = _children(process)
    process.kill()
    os.kill(child, signal.SIGKILL)
    process.communicate()
    assert RunFolder(first).finished and not RunFolder(second).finished
    done = vlfast_run(*words)
    assert done.returncode == 0, done.stderr
    assert times(first) == kept and RunFolder(second).finished
    assert [row["epoch"] for row in RunFolder(second).read_metrics()] == list(range(1, 21))
    words[-1] = tmp_path / "whole"
    assert vlfast_run(*words, "--cell", "2").returncode == 0
    whole = tmp_path / "whole/glyphs-tools/coop-1shots-seed2"
    assert not (whole.parent / "coop-1shots-seed1").exists()
    for name in ("last", "best"):
        ours, theirs = (RunFolder(f).read_tensors(name)[0]["context"] for f in (second, whole))
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    assert RunFolder(second).read_result()["accuracy"] == RunFolder(whole).read_result()["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_cells(tmp_path, number):
    words = [*LONG, "--seeds", "1", "2", "--recipe.epochs", "4000", "--output", tmp_path]
    process = _start([*words, "--jobs", "2"])
    folder = tmp_path / "glyphs-tools"
    for seed in (1, 2):
        _wait_for(folder / f"coop-1shots-seed{seed}" / "metrics.jsonl", process)
    children = _children(process)
    assert len(children) == 2
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "go on with the same command: `vlfast run few-shot" in said
    assert not any(os.path.exists(f"/proc/{child}") for child in children)
    listed = vlfast_run(*words, "--list", "--json")
    assert [cell["state"] for cell in json.loads(listed.stdout)] == ["begun", "begun"]
    assert read_yaml(folder / "coop-1shots-seed2" / "cell.yaml")["seed"] == 2


@pytest.mark.slow
def test_a_killed_cell_is_a_failed_cell(tmp_path):
    words = [*LONG, "--seeds", "1", "--recipe.epochs", "4000", "--output", tmp_path]
    process = _start(words)
    _wait_for(tmp_path / "glyphs-tools/coop-1shots-seed1/metrics.jsonl", process)
    (child,) = _children(process)
    os.kill(child, signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "failed: glyphs-tools/coop-1shots-seed1: killed by SIGKILL" in said


def test_devices_are_shared_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    four = [f"cuda:{i}" for i in range(4)]
    assert device_groups(four, 2, {}) == [("cuda:0", "cuda:1"), ("cuda:2", "cuda:3")]
    assert device_groups([], 2, {}) == []
    assert device_groups(["cpu"], 2, {}) == [("cpu", "cpu")]
    for devices, processes, options, message in (
        (four[:3], 2, {}, "expected a multiple of the 2 processes"),
        (["cuda"], 1, {}, 'expected "cuda:N" or "cpu", got \'cuda\''),
        (["cuda:4"], 1, {}, "torch finds 4 GPUs"),
        (["cuda:0", "cpu"], 1, {}, "expected GPUs or cpu, got both"),
        (["gpu"], 1, {}, "expected"),
        (four, 1, {"model": {"device": "cuda:1"}}, "--model.device names one for all"),
        ([], 0, {}, "--processes: expected at least 1"),
    ):
        with pytest.raises(VlfastError, match=message):
            device_groups(devices, processes, options)


def test_environments_of_cells(monkeypatch):
    monkeypatch.setattr("vlfast.protocols.work._cores", lambda: 8)
    assert environment_for((), 1, 1, {"A": "b"}) == {"A": "b"}
    assert environment_for((), 1, 3, {}) == {"OMP_NUM_THREADS": "2"}
    assert environment_for((), 2, 8, {}) == {"OMP_NUM_THREADS": "1"}
    given = {"OMP_NUM_THREADS": "5"}
    assert environment_for((), 1, 3, given) == given
    two = ("cuda:1", "cuda:2")
    assert environment_for(two, 1, 1, {}) == {"CUDA_VISIBLE_DEVICES": "1,2"}
    seen = {"CUDA_VISIBLE_DEVICES": "4,GPU-ab,7"}
    assert environment_for(two, 1, 1, seen) == {"CUDA_VISIBLE_DEVICES": "GPU-ab,7"}
    assert environment_for(("cpu",), 1, 1, seen) == {"CUDA_VISIBLE_DEVICES": ""}
    with pytest.raises(VlfastError, match="cuda:3 asked for, but CUDA_VISIBLE_DEVICES=4,GPU-ab,7"):
        environment_for(("cuda:3",), 1, 1, seen)
