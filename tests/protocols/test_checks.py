"""What is refused before the first run."""

from dataclasses import replace

import pytest
from PIL import Image

from tests.data.coop.folders import make_coop_root
from tests.protocols.support import finish, make_cell, score
from vlfast.data.coop.layouts import IMAGENET_DOMAINS
from vlfast.errors import UnknownNameError, VlfastError
from vlfast.protocols.cells import Target
from vlfast.protocols.checks import check_cells
from vlfast.protocols.grids import Request, grid


@pytest.fixture
def images(tmp_path):
    """A folder of two classes with one training and one test image each."""
    root = tmp_path / "images"
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), "red").save(root / part / name / "0.png")
    return root


def cells_of(tmp_path, protocol="few-shot", recipes=("coop",), **options):
    return grid(Request(protocol, recipes, tmp_path / "runs", seeds=[1], **options))


def test_all_missing_datasets_are_named_together(tmp_path):
    cells = cells_of(tmp_path, datasets=["glyphs/tools", "folder", "csv"], shots=[1])
    with pytest.raises(VlfastError, match="2 of 3 can't be read: folder .*; csv .*--skip-missing"):
        check_cells(cells, skip_missing=False)
    kept, missing = check_cells(cells, skip_missing=True)
    assert [cell.dataset for cell in kept] == ["glyphs/tools"]
    assert [line.partition(":")[0] for line in missing] == ["folder", "csv"]
    with pytest.raises(VlfastError, match="none of them can be read"):
        check_cells(cells[1:], skip_missing=True)
    assert not (tmp_path / "runs").exists()


def test_missing_targets_are_left_out(tmp_path):
    cells = cells_of(
        tmp_path, "cross-dataset", source="glyphs/tools", datasets=["glyphs/nature", "folder"]
    )
    with pytest.raises(VlfastError, match="1 of 3 can't be read: folder"):
        check_cells(cells, skip_missing=False)
    ((cell,), missing) = check_cells(cells, skip_missing=True)
    assert cell.targets == (Target("glyphs/nature"),) and len(missing) == 1


def test_unknown_names_are_never_skipped(tmp_path):
    cells = cells_of(tmp_path, datasets=["glyphs/toolz"], shots=[1])
    with pytest.raises(UnknownNameError, match="did you mean 'glyphs/tools'"):
        check_cells(cells, skip_missing=True)


def test_finished_cells_need_nothing(tmp_path):
    cell = make_cell(tmp_path / "c")
    finish(cell, {"test": score(50.0)})
    gone = replace(cell, dataset="folder")
    assert check_cells([gone], skip_missing=False) == ([gone], [])


def test_too_few_images(tmp_path, images):
    cells = cells_of(
        tmp_path, datasets=["folder"], shots=[1, 2], options={"data": {"root": str(images)}}
    )
    assert len(check_cells(cells[:1], skip_missing=False)[0]) == 1
    with pytest.raises(VlfastError, match="--shots: 2 images a class asked for, but folder has at"):
        check_cells(cells, skip_missing=False)


def test_domains_are_needed(tmp_path, images):
    options = {"data": {"root": str(images)}}
    cells = cells_of(tmp_path, "domain-generalization", source="folder", shots=[1], options=options)
    with pytest.raises(VlfastError, match="folder has no domains of its own, so name those"):
        check_cells(cells, skip_missing=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": {"run": "none/{dataset}"}}, "--teacher.run: there is no none/glyphs-tools/"),
        ({"teacher": {"features": "none"}}, "--teacher.features: there is no none/manifest.json"),
        ({"data": {"dictionary": "none.txt"}}, "--data.dictionary: there is no none.txt"),
    ],
)
def test_files_that_options_name(tmp_path, options, message):
    cells = cells_of(tmp_path, recipes=["kdpl"], datasets=["glyphs/tools"], options=options)
    with pytest.raises(VlfastError, match=message):
        check_cells(cells, skip_missing=False)


def test_class_specific_prompts_stay_with_their_classes(tmp_path):
    how = {"source": "glyphs/tools", "options": {"prompts": "class_specific"}}
    cells = cells_of(tmp_path, "cross-dataset", datasets=["glyphs/nature"], **how)
    with pytest.raises(VlfastError, match="--prompts: class_specific prompts know only"):
        check_cells(cells, skip_missing=False)
    check_cells(cells_of(tmp_path, "domain-generalization", **how), skip_missing=False)


def test_class_specific_prompts_and_domains_of_fewer_classes(tmp_path):
    """ImageNetA and -R have 200 of ImageNet's classes; V2 and Sketch have all."""
    root = make_coop_root(tmp_path / "data", ["imagenet", *IMAGENET_DOMAINS])
    how = {"shots": [2], "options": {"prompts": "class_specific", "data": {"root": str(root)}}}
    cells = cells_of(tmp_path, "domain-generalization", **how)
    with pytest.raises(VlfastError, match="can't be tested on imagenet_a, imagenet_r; learn"):
        check_cells(cells, skip_missing=False)
    how["datasets"] = ["imagenetv2", "imagenet_sketch"]
    check_cells(cells_of(tmp_path, "domain-generalization", **how), skip_missing=False)
