"""Tables of sweeps whose numbers are worked out by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from tests.report.sweeps import write_run
from vlfast.errors import VlfastError
from vlfast.report.sweeps import collect_sweeps
from vlfast.report.table import (
    Cell,
    Column,
    Row,
    Table,
    as_html,
    as_latex,
    as_markdown,
    as_text,
    latex_escape,
    mark_best,
)
from vlfast.report.tables import ece_table, sweep_table


def only_sweep(root: Path):
    (sweep,) = collect_sweeps([root]).sweeps
    return sweep


def cell(table: Table, row: str, column: str, group: str = "", shots: str | None = None) -> Cell:
    (place,) = [i for i, c in enumerate(table.columns) if (c.group, c.name) == (group, column)]
    rows = [r for r in table.rows if row in r.labels and (shots is None or shots in r.labels)]
    (found,) = rows
    return found.cells[place]


@pytest.fixture
def base_to_new(tmp_path):
    """coop: two datasets, two seeds; kgcoop lacks eurosat; maple lacks a seed on dtd; zero-shot."""
    scores = {
        ("coop", "dtd"): [(80.0, 40.0), (90.0, 50.0)],
        ("coop", "eurosat"): [(60.0, 70.0), (70.0, 80.0)],
        ("kgcoop", "dtd"): [(90.0, 60.0), (94.0, 64.0)],
        ("maple", "dtd"): [(99.0, 99.0)],
        ("maple", "eurosat"): [(50.0, 50.0), (52.0, 50.0)],
    }
    for (method, dataset), pairs in scores.items():
        for seed, pair in enumerate(pairs, 1):
            write_run(tmp_path, "base-to-new", method, dataset, pair, seed=seed)
    write_run(tmp_path, "base-to-new", "zeroshot", "dtd", (50.0, 60.0))
    write_run(tmp_path, "base-to-new", "zeroshot", "eurosat", (40.0, 50.0))
    return tmp_path


def test_base_to_new(base_to_new):
    table = sweep_table(only_sweep(base_to_new))
    assert [row.labels[0] for row in table.rows] == ["zeroshot", "coop", "kgcoop", "maple"]
    assert [c.group for c in table.columns[::3]] == ["average", "DTD", "EuroSAT"]
    dtd = [cell(table, "coop", part, "DTD") for part in ("base", "new", "HM")]
    assert [c.mean for c in dtd] == pytest.approx([85, 45, 2 * 85 * 45 / 130])
    # Population: of 80 and 90 it is 5, the sample's would be 7.07.
    assert dtd[0].std == dtd[1].std == pytest.approx(5)
    each = [2 * 80 * 40 / 120, 2 * 90 * 50 / 140]
    assert dtd[2].std == pytest.approx(abs(each[0] - each[1]) / 2)
    # The average's harmonic mean: of 75 and 60, not the mean of those of the datasets.
    average = [cell(table, "coop", part, "average") for part in ("base", "new", "HM")]
    assert [c.mean for c in average] == pytest.approx([75, 60, 2 * 75 * 60 / 135])
    per_dataset = [cell(table, "coop", "HM", d).mean for d in ("DTD", "EuroSAT")]
    assert abs(average[2].mean - np.mean(per_dataset)) > 1
    # Seeds: (80 + 60) / 2 and (90 + 70) / 2.
    assert average[0].std == pytest.approx(5)
    assert cell(table, "zeroshot", "base", "DTD").std is None


def test_what_is_missing_is_marked_and_never_best(base_to_new):
    table = sweep_table(only_sweep(base_to_new))
    assert cell(table, "kgcoop", "base", "EuroSAT") == Cell()
    average = cell(table, "kgcoop", "base", "average")
    assert (average.mean, average.mark, average.best) == (pytest.approx(92), "†", False)
    lacks_a_seed = cell(table, "maple", "base", "DTD")
    assert (lacks_a_seed.mean, lacks_a_seed.mark, lacks_a_seed.best) == (99.0, "†", False)
    assert cell(table, "kgcoop", "base", "DTD").best
    assert cell(table, "coop", "base", "average").best
    assert "kgcoop misses EuroSAT; its average is over 1 of 2 datasets." in table.notes
    assert "maple misses DTD (seed 2)." in table.notes
    assert table.notes[0].startswith("† over fewer seeds")
    assert "2 seeds (1, 2)" in table.caption
    assert "population" in table.caption


def test_published_rows(base_to_new):
    table = sweep_table(only_sweep(base_to_new), published=True)
    label = "maple, published (ViT-B/16)"
    assert cell(table, label, "base", "DTD").mean == 80.36
    # Over DTD and EuroSAT alone, from their published numbers.
    base, new = (80.36 + 94.07) / 2, (59.18 + 73.23) / 2
    assert cell(table, label, "base", "average").mean == pytest.approx(base)
    assert cell(table, label, "HM", "average").mean == pytest.approx(2 * base * new / (base + new))
    assert any("computed here" in note for note in table.notes)
    assert not any(c.best for row in table.rows if row.published for c in row.cells)
    labels = [row.labels[0] for row in table.rows]
    assert labels.index(label) == labels.index("maple") + 1


def test_published_with_another_backbone(tmp_path):
    write_run(tmp_path, "base-to-new", "maple", "dtd", (80.0, 60.0), model="RN50")
    table = sweep_table(only_sweep(tmp_path), published=True)
    note = "The published numbers of ViT-B/16 are not comparable with RN50 (openai)."
    assert note in table.notes


def test_published_with_an_unknown_backbone(tmp_path):
    how = {"source": "imagenet", "targets": {"dtd": 40.0}, "model": "glyphs-student"}
    write_run(tmp_path, "cross-dataset", "kdpl", "imagenet", 60.0, pretrained=None, **how)
    table = sweep_table(only_sweep(tmp_path), published=True)
    note = "The published numbers of an unknown backbone are not comparable with glyphs-student."
    assert note in table.notes


def test_published_of_nothing_here(tmp_path):
    write_run(tmp_path, "base-to-new", "plpp", "dtd", (80.0, 60.0))
    table = sweep_table(only_sweep(tmp_path), published=True)
    assert len(table.rows) == 1
    assert table.notes == ("There are no published numbers for these methods and datasets.",)


def test_few_shot(tmp_path):
    for dataset, at in (("dtd", 50.0), ("eurosat", 60.0)):
        write_run(tmp_path, "few-shot", "zeroshot", dataset, at - 10)
        for shots in (1, 16):
            for seed in (1, 2):
                score = at + shots + seed
                write_run(tmp_path, "few-shot", "coop", dataset, score, shots=shots, seed=seed)
    write_run(tmp_path, "few-shot", "kgcoop", "dtd", 99.0, shots=1, domains={"noisy": 12.0})
    table = sweep_table(only_sweep(tmp_path))
    labels = [row.labels for row in table.rows]
    assert labels == [("none", "zeroshot"), ("1", "coop"), ("1", "kgcoop"), ("16", "coop")]
    assert cell(table, "coop", "DTD", shots="1").mean == pytest.approx(52.5)
    assert cell(table, "coop", "average", shots="16").mean == pytest.approx(72.5)
    assert cell(table, "coop", "average", shots="16").std == pytest.approx(0.5)
    assert cell(table, "zeroshot", "average").mean == pytest.approx(45)
    assert "kgcoop misses 16 shots." in table.notes
    assert "The tests on domains (dtd/noisy) are in results.csv alone." in table.notes
    f1 = sweep_table(only_sweep(tmp_path), "macro_f1")
    assert f1.caption.startswith("Macro-F1, %.")
    assert cell(f1, "coop", "DTD", shots="1").mean == pytest.approx(51.5)


def test_transfer_without_the_source_in_the_average(tmp_path):
    for seed in (1, 2):
        targets = {"dtd": 40.0 + seed, "eurosat": 50.0 + seed}
        options = {"seed": seed, "targets": targets}
        write_run(tmp_path, "cross-dataset", "coop", "imagenet", 70.0 + seed, **options)
    for target in ("dtd", "eurosat"):
        for seed in (1, 2):
            options = {"seed": seed, "shots": 0, "source": "imagenet"}
            write_run(tmp_path, "cross-dataset", "promptkd", target, 90.0, **options)
    sweep = only_sweep(tmp_path)
    table = sweep_table(sweep, published=True)
    names = [column.name for column in table.columns]
    assert names == ["ImageNet (source)", "DTD", "EuroSAT", "average"]
    assert cell(table, "coop", "average").mean == pytest.approx(46.5)
    assert cell(table, "coop", "average").std == pytest.approx(0.5)
    assert cell(table, "promptkd", "ImageNet (source)") == Cell()
    assert not any(
        "misses" in note for note in table.notes
    )  # it never had a source to be tested on
    assert any(note.startswith("promptkd: trained on unlabelled images") for note in table.notes)
    assert not any(c.best for row in table.rows for c in row.cells)
    assert cell(table, "promptkd, published (ViT-B/16)", "EuroSAT").mean == 63.74


def test_domains_of_the_source_itself(tmp_path):
    protocol = "domain-generalization"
    domains = {"remix": 60.0, "fontawesome": 70.0}
    for recipe in ("coop", "kgcoop"):
        write_run(tmp_path, protocol, recipe, "glyphs/tools", 90.0, domains=domains)
    table = sweep_table(only_sweep(tmp_path))
    names = [column.name for column in table.columns]
    assert names == ["glyphs/tools (source)", "fontawesome", "remix", "average"]
    assert cell(table, "coop", "average").mean == pytest.approx(65)


def test_unlike_test_images_are_not_compared(tmp_path):
    write_run(tmp_path, "few-shot", "coop", "dtd", 60.0, images=100)
    write_run(tmp_path, "few-shot", "kgcoop", "dtd", 70.0, images=80)
    table = sweep_table(only_sweep(tmp_path))
    assert not any(c.best for row in table.rows for c in row.cells)
    assert any("different numbers of images (80, 100)" in note for note in table.notes)


def test_models_never_share_a_table(tmp_path):
    write_run(tmp_path / "a", "few-shot", "coop", "dtd", 60.0)
    write_run(tmp_path / "b", "few-shot", "coop", "dtd", 70.0, pretrained="laion2b_s34b_b88k")
    sweeps = collect_sweeps([tmp_path]).sweeps
    assert [s.model for s in sweeps] == ["ViT-B-16 (laion2b_s34b_b88k)", "ViT-B-16 (openai)"]


def test_the_same_cell_in_two_folders(tmp_path):
    for folder, score in (("a", 60.0), ("b", 70.0)):
        write_run(tmp_path / folder, "few-shot", "coop", "dtd", score)
    both = collect_sweeps([tmp_path / "a", tmp_path / "b"])
    names = [m.name for m in both.sweeps[0].methods()]
    assert names == [f"coop ({tmp_path / 'a'})", f"coop ({tmp_path / 'b'})"]
    within = collect_sweeps([tmp_path])
    assert len(within.sweeps[0].runs) == 1
    assert "is left out" in within.notes[0]
    overlapping = collect_sweeps([tmp_path / "a", tmp_path / "a"])
    assert [m.name for m in overlapping.sweeps[0].methods()] == ["coop"]


def test_nothing_to_report(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        collect_sweeps([tmp_path / "no"])
    with pytest.raises(VlfastError, match="there is no run in"):
        collect_sweeps([tmp_path])
    write_run(tmp_path, "few-shot", "coop", "dtd", 60.0, finished=False)
    with pytest.raises(VlfastError, match="no finished run in .*: 1 run is unfinished"):
        collect_sweeps([tmp_path])
    write_run(tmp_path, "few-shot", "coop", "dtd", 60.0, seed=2)
    assert len(collect_sweeps([tmp_path]).unfinished) == 1
    with pytest.raises(VlfastError, match="no finished run of base-to-new; there are runs of few"):
        collect_sweeps([tmp_path], "base-to-new")


def test_a_damaged_run_is_named(tmp_path):
    folder = write_run(tmp_path, "few-shot", "coop", "dtd", 60.0)
    (folder / "result.json").write_text('{"recipe": "coop"}')
    with pytest.raises(VlfastError, match=f"result.json in {folder} is not what a run writes"):
        collect_sweeps([tmp_path])


def test_calibration_table(base_to_new):
    table = ece_table(only_sweep(base_to_new))
    assert table.better == "lowest"
    cells = [row.cells[0] for row in table.rows]
    assert all(c.mean is None or 0 < c.mean < 100 for c in cells)


AWKWARD = Table(
    "t",
    "A_b & 50 % of $x$",
    r"under\score {x} ~ ^ # <b>",
    ("method",),
    (Column("base", "<g>"), Column("new", "<g>"), Column("c|d")),
    (
        Row(("a_b<i>",), (Cell(50.0, 1.25), Cell(60.0), Cell())),
        Row(("c",), (Cell(40.0), Cell(60.001, mark="†"), Cell(float("nan")))),
        Row(("p",), (Cell(99.0), Cell(99.0), Cell(99.0)), published=True),
    ),
    ("50 % & more",),
)


def test_best_by_two_decimals_among_our_own():
    table = Table(
        "t",
        "t",
        "",
        ("m",),
        (Column("a"), Column("b", fair=False), Column("c")),
        (
            Row(("x",), (Cell(50.001), Cell(1.0), Cell(1.0))),
            Row(("y",), (Cell(50.004), Cell(2.0), Cell())),
            Row(("z",), (Cell(99.0), Cell(9.0), Cell(3.0)), published=True),
        ),
    )
    best = [[c.best for c in row.cells] for row in mark_best(table).rows]
    assert best == [[True, False, False], [True, False, False], [False, False, False]]


def test_latex_is_escaped():
    text = as_latex(mark_best(AWKWARD))
    assert r"A\_b \& 50 \% of \$x\$" in text
    assert r"under\textbackslash{}score \{x\} \textasciitilde{} \textasciicircum{} \#" in text
    assert r"\multicolumn{2}{c}{<g>}" in text
    assert r"\cmidrule(lr){2-3}" in text
    assert r"a\_b<i> & \textbf{50.00} {\scriptsize $\pm$ 1.25} & 60.00 & -- \\" in text
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1
    assert latex_escape("a\\_b") == r"a\textbackslash{}\_b"


def test_html_is_escaped():
    text = as_html(AWKWARD)
    assert "<i>" not in text
    assert "a_b&lt;i&gt;" in text
    assert '<th colspan="2" class="group">&lt;g&gt;</th>' in text


def test_markdown():
    lines = as_markdown(mark_best(AWKWARD)).splitlines()
    assert r"| method | \<g\> base | \<g\> new | c\|d |" in lines
    assert r"| a\_b\<i\> | **50.00 ± 1.25** | 60.00 | - |" in lines


def test_text_fits_the_width(base_to_new):
    table = sweep_table(only_sweep(base_to_new))
    for width in (80, 100, 200):
        lines = as_text(table, width).splitlines()
        numbers = [line for line in lines if line.startswith(("method", "coop", "maple"))]
        assert max(map(len, numbers[:-1])) <= width
    assert any(line.startswith("coop") and "75.00 ± 5.00*" in line for line in lines)


def test_long_form(tmp_path):
    from vlfast.report.report import write_report

    write_run(tmp_path, "few-shot", "coop", "dtd", 60.0, shots=4, domains={"noisy": 12.0})
    report = write_report([tmp_path], formats=["csv"])
    assert report.files == (tmp_path / "report" / "results.csv",)
    with open(report.files[0], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["target"], r["shots"], r["accuracy"], r["macro_f1"], r["images"]) for r in rows] == [
        ("dtd", "4", "60.0", "59.0", "100"),
        ("dtd/noisy", "4", "12.0", "11.0", "100"),
    ]
