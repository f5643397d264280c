"""A cell's folder: its state, what it was begun with, its lock, what is read back."""

import errno
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.protocols.support import evaluate, finish, make_cell, read_yaml, score
from vlfast.errors import VlfastError
from vlfast.protocols.cells import Target
from vlfast.protocols.results import read_results
from vlfast.trainers.run_folder import RunFolder


def test_states(tmp_path):
    cell = make_cell(tmp_path / "c", "cross-dataset", targets=[Target("dtd"), Target("eurosat")])
    assert cell.state() == "to do"
    cell.folder.mkdir()
    cell.write()
    assert cell.state() == "to do"
    RunFolder(cell.folder).start(cell.config)
    assert cell.state() == "begun"
    RunFolder(cell.folder).write_result({})
    assert cell.state() == "begun" and len(cell.untested()) == 2
    evaluate(cell, "dtd", 50.0, ["cross-dataset"])
    assert [target.name for target in cell.untested()] == ["eurosat"]
    evaluate(cell, "eurosat", 50.0, ["cross-dataset"])
    assert cell.state() == "done"


def test_other_options_than_those_it_was_begun_with_are_refused(tmp_path):
    cell = make_cell(tmp_path / "c")
    cell.folder.mkdir()
    cell.write()
    other = make_cell(tmp_path / "c", epochs=3)
    other.check()  # nothing was trained yet
    RunFolder(cell.folder).start(cell.config)
    cell.check()
    with pytest.raises(VlfastError, match=r"--recipe.epochs: .*begun with 2, this is with 3"):
        other.check()
    without = make_cell(tmp_path / "c", template="an {}.")
    with pytest.raises(VlfastError, match=r"--data.template: .*begun without it, this is with"):
        without.check()
    make_cell(tmp_path / "c", workers=3, test_features="elsewhere").check()
    with pytest.raises(VlfastError, match="belongs to the protocol few-shot, not to base-to-new"):
        make_cell(tmp_path / "c", "base-to-new").check()


def test_a_run_of_ones_own_is_left_alone(tmp_path):
    cell = make_cell(tmp_path / "c")
    RunFolder(cell.folder).start(cell.config)
    with pytest.raises(VlfastError, match="holds a run that no protocol made"):
        cell.check()


def test_a_run_serves_both_protocols_that_train_on_a_source(tmp_path):
    """Domain generalization tests the model that cross-dataset has trained."""
    first = make_cell(tmp_path / "c", "cross-dataset", targets=[Target("dtd")])
    domains = {"remix": {"test": score(30.0)}}
    finish(first, {"test": score(60.0), "domains": domains})
    evaluate(first, "dtd", 40.0, ["cross-dataset"])
    assert first.state() == "done"
    second = make_cell(tmp_path / "c", "domain-generalization", targets=[Target("imagenetv2")])
    second.check()
    assert second.state() == "begun"
    evaluate(second, "imagenetv2", 20.0, ["domain-generalization"])
    second.write()
    assert second.state() == first.state() == "done"
    cross, domain = read_results(tmp_path)
    assert cross.protocol == "cross-dataset" and domain.protocol == "domain-generalization"
    accuracies = [{k: s["test"]["accuracy"] for k, s in r.scores.items()} for r in (cross, domain)]
    assert accuracies == [
        {"glyphs/tools": 60.0, "dtd": 40.0},
        {"glyphs/tools": 60.0, "glyphs/tools/remix": 30.0, "imagenetv2": 20.0},
    ]
    # A target of both counts for each only once that protocol has asked for it.
    both = replace(second, targets=(Target("dtd"),))
    assert [target.name for target in both.untested()] == ["dtd"]


def test_writing_again_changes_nothing_of_a_begun_cell(tmp_path):
    cell = make_cell(tmp_path / "c")
    finish(cell, {"test": score(60.0)})
    before = (cell.folder / "cell.yaml").stat().st_mtime_ns
    make_cell(tmp_path / "c", workers=3).write()
    assert (cell.folder / "cell.yaml").stat().st_mtime_ns == before
    about = read_yaml(cell.folder / "cell.yaml")
    assert about["given"]["recipe"]["epochs"] == 2 and about["also"] == []
    assert read_yaml(cell.folder / "options.yaml") == about["given"]


def test_a_lock_holds_as_long_as_a_process_that_inherited_it(tmp_path):
    cell = make_cell(tmp_path / "c")
    with cell.locked() as lock:
        assert lock is not None
        with cell.locked() as second:
            assert second is None
        reader, writer = os.pipe()
        command = [sys.executable, "-c", f"import os; os.read({reader}, 1)"]
        child = subprocess.Popen(command, pass_fds=(lock, reader))
    with cell.locked() as while_it_runs:
        assert while_it_runs is None
    os.write(writer, b"x")
    child.wait()
    os.close(reader)
    os.close(writer)
    with cell.locked() as afterwards:
        assert afterwards is not None


def test_damaged_cells_are_named(tmp_path):
    cell = make_cell(tmp_path / "c")
    finish(cell, {"test": score(60.0)})
    (cell.folder / "cell.yaml").write_text("a: [")
    with pytest.raises(VlfastError, match="cell.yaml is not valid YAML"):
        cell.check()


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("vlfast.protocols.cells.fcntl.flock", refuse)
    with make_cell(tmp_path / "c").locked() as lock:
        assert lock is not None
