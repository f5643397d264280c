"""The words of `vlfast run`."""

import json

import pytest

from vlfast.cli import main
from vlfast.cli.run import cell_numbers
from vlfast.errors import VlfastError

FEW = ("run", "few-shot", "--datasets", "glyphs/tools", "--shots", "1", "--seeds", "1", "2")


def test_list(capsys, tmp_path):
    words = [*FEW, "--recipe", "zeroshot", "coop", "--output", str(tmp_path), "--list"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["cell", "1", "2", "3"]
    assert "coop-1shots-seed2" in lines[3] and "to do" in lines[3]
    assert main([*words, "--json", "--cell", "2-3"]) == 0
    cells = json.loads(capsys.readouterr().out)
    assert [(c["cell"], c["seed"], c["state"]) for c in cells] == [(2, 1, "to do"), (3, 2, "to do")]
    assert not list(tmp_path.iterdir())


def test_numbers_of_cells():
    assert cell_numbers(["4", "7-9", "2"]) == [4, 7, 8, 9, 2]
    for words in (["x"], ["3-"], ["-3"], ["5-3"], ["1,2"]):
        with pytest.raises(VlfastError, match="--cell: expected"):
            cell_numbers(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "few-shot", "--recipe", "coop"], "--output: expected the folder"),
        ([*FEW, "--output", "o"], "--recipes: expected at least one"),
        ([*FEW, "--recipe", "coop", "--output", "o", "--seed", "3"], "--seed: the seeds are given"),
        ([*FEW, "--recipe", "coop", "--output", "o", "--cell", "9"], "--cell: expected 1 to 2"),
        ([*FEW, "--recipe", "coop", "--output", "o", "--jobs", "0"], "--jobs: expected at least 1"),
        ([*FEW, "--recipe", "coop", "--output", "o", "--json"], "--json: goes with --list"),
        ([*FEW, "--recipe", "coop", "--output", "o", "--recipe.epoch", "3"], "--recipe.epochs"),
        (["run", "few-shots", "--recipe", "coop", "--output", "o"], "did you mean 'few-shot'"),
        (["run", "--recipe", "coop", "--output", "o"], "protocol"),
    ],
)
def test_refusals(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
