"""The whole report: pictures, one HTML file, the command."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image

import vlfast
from tests.conftest import make_tiny_model, squares_dataset
from tests.report.sweeps import VERSIONS, make_predictions, write_run
from vlfast.cli import main
from vlfast.errors import UnknownNameError, VlfastError
from vlfast.evaluation.style import line_style
from vlfast.report.figures import (
    plot_base_to_new,
    plot_calibration,
    plot_few_shot_curves,
    plot_gains,
    plot_losses,
)
from vlfast.report.provenance import provenance_of
from vlfast.report.report import write_report
from vlfast.report.sweeps import collect_sweeps
from vlfast.report.worst import worst_of

NASTY = ("<script>alert(1)</script>", "a $x_2$ \\frac & b", "dog", "an owl " * 12)


def shown(file) -> int:
    """How many colours a picture has: an empty one has few."""
    picture = Image.open(file).convert("RGB")
    assert picture.width > 250
    return len(picture.resize((200, 150)).getcolors(100_000))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Base-to-new and few-shot runs with what goes wrong in practice."""
    root = tmp_path_factory.mktemp("mixed")
    names = {"classnames": NASTY}
    for dataset in ("dtd", "my <b>&\n$data$"):
        write_run(root / "b", "base-to-new", "zeroshot", dataset, (40.0, 50.0), **names)
        for seed in (1, 2):
            pair = (60.0 + seed, 45.0)
            write_run(root / "b", "base-to-new", "coop", dataset, pair, seed=seed, **names)
    write_run(root / "b", "base-to-new", "kgcoop", "dtd", (70.0, 55.0), **names)
    write_run(root / "f", "few-shot", "zeroshot", "dtd", 40.0, **names)
    for shots in (1, 4):
        write_run(root / "f", "few-shot", "coop", "dtd", 40.0 + shots, shots=shots, **names)
    nan = (2.0, float("nan"), 1.0)
    write_run(root / "f", "few-shot", "kgcoop", "dtd", 50.0, shots=4, losses=nan, predictions={})
    write_run(root / "f", "few-shot", "coop", "eurosat", 50.0, finished=False)
    return root


def test_every_picture_is_drawn(mixed, tmp_path):
    few_shot, base_to_new = (
        next(s for s in collect_sweeps([mixed]).sweeps if s.protocol == protocol)
        for protocol in ("few-shot", "base-to-new")
    )
    drawn = {
        "curves": plot_few_shot_curves(few_shot, tmp_path / "curves.png"),
        "bars": plot_base_to_new(base_to_new, tmp_path / "bars.png"),
        "gains": plot_gains(base_to_new, tmp_path / "gains.png"),
        "losses": plot_losses(few_shot, tmp_path / "losses.png"),
        "calibration": plot_calibration(base_to_new, tmp_path / "calibration.png"),
    }
    assert all(drawn.values())
    assert all(shown(tmp_path / f"{name}.png") > 15 for name in drawn)
    assert not plot_few_shot_curves(base_to_new, tmp_path / "no.png")
    assert not plot_base_to_new(few_shot, tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def test_one_method_on_one_dataset(tmp_path):
    write_run(tmp_path, "few-shot", "coop", "dtd", 60.0, predictions={}, losses=(1.0,))
    report = write_report([tmp_path])
    assert {file.name for file in report.files} == {
        "tables.md",
        "tables.tex",
        "results.csv",
        "few-shot-vit-b-16-openai-curves.png",
        "few-shot-vit-b-16-openai-losses.png",
        "report.html",
    }


def test_lines_of_many_methods_look_different():
    """Six colours, then the same ones with other dashes."""
    looks = [tuple(sorted(line_style(i).items())) for i in range(24)]
    assert len(set(looks)) == 24


class Page(HTMLParser):
    """What a browser would load, and which elements there are."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.sources, self.tags, self.links = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if "src" in attrs:
            self.sources.append(attrs["src"])
        if "href" in attrs:
            self.links.append(attrs["href"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_one_whole_escaped_file(mixed, tmp_path):
    report = write_report([mixed], tmp_path / "out", published=True, formats=["html"])
    assert [file.name for file in report.files] == ["report.html"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["report.html"]
    text = report.files[0].read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert len(page.ids) == len(set(page.ids))
    assert page.links
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert len(page.sources) >= 8
    for source in page.sources:
        assert source.startswith("data:image/png;base64,")
        Image.open(BytesIO(base64.b64decode(source.partition(",")[2]))).verify()
    assert "maple" not in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert "1 run is not finished and left out" in text


def test_differences_between_cells_are_said(tmp_path):
    write_run(tmp_path, "few-shot", "coop", "dtd", 60.0, fingerprint="one")
    other = {**VERSIONS, "vlfast": "0.0.9"}
    write_run(tmp_path, "few-shot", "kgcoop", "dtd", 60.0, fingerprint="two", versions=other)
    write_run(tmp_path, "few-shot", "zeroshot", "dtd", 60.0)  # saw all images, as it must
    (sweep,) = collect_sweeps([tmp_path]).sweeps
    said = provenance_of(sweep).warnings
    assert said == (
        "The runs have different versions of vlfast: 0.1.0 (2 runs), 0.0.9 (1 run).",
        "DTD, 16 shots, seed 1: the runs had different images (fingerprints one, two).",
    )
    report = write_report([tmp_path], formats=["html"])
    assert said[1] in report.files[0].read_text(encoding="utf-8")
    assert f"few-shot: {said[0]}" in report.notes


def test_seeds_that_trained_differently_are_said(tmp_path):
    """As of two sweeps below one folder, the second with another learning rate."""
    for seed in (1, 2, 3):
        folder = write_run(tmp_path / str(seed), "few-shot", "coop", "dtd", 60.0, seed=seed)
    text = (folder / "config.yaml").read_text()
    assert text.count("  lr: 0.002\n") == 1
    (folder / "config.yaml").write_text(text.replace("  lr: 0.002\n", "  lr: 0.5\n"))
    (sweep,) = collect_sweeps([tmp_path]).sweeps
    assert provenance_of(sweep).warnings == (
        "coop on DTD, 16 shots: the runs have different recipe.lr: 0.002 (2 runs), 0.5 (1 run).",
    )


def test_same_runs_differ_in_nothing(tmp_path):
    for recipe in ("coop", "kgcoop"):
        for seed in (1, 2):
            options = {"seed": seed, "targets": {"dtd": 50.0}}
            write_run(tmp_path, "cross-dataset", recipe, "imagenet", 60.0, **options)
    (sweep,) = collect_sweeps([tmp_path]).sweeps
    assert provenance_of(sweep).warnings == ()


def test_worst_classes_are_of_the_most_accurate_method(tmp_path):
    for recipe, accuracy in (("coop", 80.0), ("kgcoop", 60.0)):
        for seed in (1, 2):
            kept = {"test": make_predictions(accuracy, ("a", "b", "c"), 90, seed)}
            write_run(tmp_path, "few-shot", recipe, "dtd", accuracy, seed=seed, predictions=kept)
    (sweep,) = collect_sweeps([tmp_path]).sweeps
    (worst,) = worst_of(sweep)
    assert worst.method.name == "coop"
    assert {m.name for m in worst.recalls} == {"coop", "kgcoop"}
    assert worst.classes[0].images == 60  # both seeds
    recall = worst.recalls[worst.method]
    assert worst.classes[0].recall == min(recall.values())


def test_a_real_run(tmp_path):
    clip = vlfast.wrap_clip(make_tiny_model(), name="tiny")
    options = {"model": clip, "data": squares_dataset(), "shots": 4, "show_progress": False}
    for recipe in ("zeroshot", "coop"):
        epochs = {} if recipe == "zeroshot" else {"epochs": 2, "n_ctx": 3}
        folder = tmp_path / "runs" / recipe
        run = vlfast.fit(recipe, output=folder, classes="base", **epochs, **options)
    report = write_report([tmp_path / "runs"], tmp_path / "out")
    (table,) = report.tables
    assert table.title == "Base-to-new generalisation, tiny"
    of_run = run.result["accuracy"]
    (row,) = [row for row in table.rows if row.labels == ("coop",)]
    expected = [of_run["base"]["accuracy"], of_run["new"]["accuracy"], of_run["harmonic_mean"]]
    assert [c.mean for c in row.cells] == pytest.approx(expected)
    kinds = {re.sub(".*-tiny-", "", f.stem) for f in report.files if f.suffix == ".png"}
    assert {"bars", "gains", "losses", "calibration"} <= kinds


def test_command(mixed, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--protocol", "few-shot", "--macro-f1", "--format", "md", "tex"]
    assert main(["report", str(mixed), "--output", str(out), *words]) == 0
    printed = capsys.readouterr()
    assert "Few-shot learning, ViT-B-16 (openai), macro-F1" in printed.out
    assert f"wrote {out / 'tables.md'}" in printed.out
    assert "1 run is not finished and left out" in printed.err
    assert sorted(file.name for file in out.iterdir()) == ["tables.md", "tables.tex"]
    assert "usepackage{booktabs}" in (out / "tables.tex").read_text()


def test_refusals(mixed, tmp_path, capsys):
    with pytest.raises(UnknownNameError, match="unknown protocol 'few-shots'; did you mean 'few"):
        write_report([mixed], tmp_path, protocol="few-shots")
    with pytest.raises(UnknownNameError, match="unknown format 'latex'"):
        write_report([mixed], tmp_path, formats=["latex"])
    with pytest.raises(ValueError, match="folders: expected at least one"):
        write_report([])
    (tmp_path / "file").write_text("")
    with pytest.raises(VlfastError, match="--output: can't write to"):
        write_report([mixed], tmp_path / "file" / "out", formats=["csv"])
    assert main(["report", str(tmp_path / "no")]) == 2
    assert "there is no folder" in capsys.readouterr().err
