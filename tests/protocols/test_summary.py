"""Averages over seeds and datasets, by hand."""

from dataclasses import replace

import pytest

from tests.protocols.support import evaluate, finish, make_cell, score
from vlfast.protocols.cells import Target
from vlfast.protocols.summary import outcome_line, summary_table


def halves(base, new):
    harmonic = 2 * base * new / (base + new)
    return {"base": score(base), "new": score(new), "harmonic_mean": harmonic}


def test_base_to_new_takes_the_harmonic_mean_of_the_averages(tmp_path):
    cells = []
    for number, (dataset, base, new) in enumerate(
        [("glyphs/tools", 80.0, 40.0), ("glyphs/tools", 90.0, 60.0), ("glyphs/nature", 95.0, 90.0)]
    ):
        cell = replace(make_cell(tmp_path / str(number), "base-to-new"), dataset=dataset)
        finish(cell, halves(base, new))
        cells.append(cell)
    # base: (85 + 95) / 2, new: (50 + 90) / 2; 2 * 90 * 70 / 160
    words = summary_table("base-to-new", cells).splitlines()[1].split()
    assert words == ["coop", "2", "2", "90.0", "70.0", "78.8"]
    assert outcome_line(cells[0]) == "base 80.0 %, new 40.0 %, harmonic mean 53.3"


def test_few_shot_has_a_column_a_number_of_shots(tmp_path):
    cells = []
    for number, (recipe, epochs, shots, accuracy) in enumerate(
        [("zeroshot", 0, 0, 50.0), ("coop", 2, 1, 55.0), ("coop", 2, 1, 57.0), ("coop", 2, 4, 70.0)]
    ):
        cell = make_cell(tmp_path / str(number), recipe=recipe, epochs=epochs, shots=shots)
        finish(cell, {"test": score(accuracy), "domains": {"remix": {"test": score(1.0)}}})
        cells.append(cell)
    lines = [line.split() for line in summary_table("few-shot", cells).splitlines()]
    assert lines[0] == ["accuracy,", "%", "datasets", "untrained", "1", "4"]
    assert lines[1:] == [["zeroshot", "1", "50.0", "-", "-"], ["coop", "1", "-", "56.0", "70.0"]]
    assert outcome_line(cells[1]) == "55.0 %"


def test_transfer_leaves_the_source_out_of_the_average(tmp_path):
    cell = make_cell(tmp_path / "c", "cross-dataset", targets=[Target("dtd"), Target("eurosat")])
    finish(cell, {"test": score(70.0)})
    evaluate(cell, "dtd", 40.0, ["cross-dataset"])
    evaluate(cell, "eurosat", 50.0, ["cross-dataset"])
    lines = [line.split() for line in summary_table("cross-dataset", [cell]).splitlines()]
    assert lines[0][3:] == ["glyphs/tools", "dtd", "eurosat", "average"]
    assert lines[1] == ["coop", "2", "70.0", "40.0", "50.0", "45.0"]
    assert outcome_line(cell) == "70.0 %, mean of 2 other test sets 45.0 %"


@pytest.mark.parametrize("protocol", ["few-shot", "base-to-new", "cross-dataset"])
def test_nothing_finished(protocol):
    assert summary_table(protocol, []) == ""
