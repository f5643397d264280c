"""A user's own images in folders by class."""

import pytest
from PIL import Image

import vlfast
from vlfast.data.catalog import load_dataset
from vlfast.data.folder import load_folder, open_image
from vlfast.errors import UnknownNameError, VlfastError


def write_image(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), colour).save(path)


@pytest.fixture
def root(tmp_path):
    for part in ("train", "test"):
        for name in ("school_bus", "cat"):
            for i in range(3):
                write_image(tmp_path / part / name / f"{i}.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path


def test_classes_are_sorted_folders(root):
    data = load_dataset("folder", str(root))
    assert data.classnames == ("cat", "school bus")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(data.test) == 6 and len(data.val) == 0
    assert data.train.source.key(0) == "train/cat/0.png"
    assert data.train.image(0).mode == "RGB"


def test_hidden_files_and_folders_are_not_data(root):
    write_image(root / "train" / ".cache" / "0.png")
    write_image(root / "train" / "cat" / ".hidden.png")
    assert load_folder(root).classnames == ("cat", "school bus")
    assert len(load_folder(root).train) == 6


def test_other_folders_are_tested_with_all_their_classes(tmp_path, tiny_clip):
    """And those with the same classes, base-to-new."""
    for home, classes in {"a": "xyz", "again": "xyz", "b": "pqr"}.items():
        for part in ("train", "test"):
            for name in classes:
                write_image(tmp_path / home / part / name / "0.png")
    run = vlfast.fit(
        recipe="coop",
        model=tiny_clip,
        data={
            "name": "folder",
            "root": str(tmp_path / "a"),
            "classes": "base",
            "shots": 1,
            "workers": 0,
        },
        output=tmp_path / "run",
        epochs=1,
        show_progress=False,
    )
    assert list(run.evaluate("folder", root=str(tmp_path / "again"))) == list(run.evaluate())
    assert run.evaluate("folder", root=str(tmp_path / "b"))["test"]["images"] == 3


def test_names_that_differ_by_underscores_only(root):
    write_image(root / "train" / "school bus" / "0.png")
    with pytest.raises(VlfastError, match="several folders .* stand for the class 'school bus'"):
        load_folder(root)


def test_val_is_used_where_it_is(root):
    write_image(root / "val" / "cat" / "0.jpg")
    assert load_folder(root).val.labels.tolist() == [0]


def test_what_is_missing_is_named(root, tmp_path_factory):
    with pytest.raises(VlfastError, match="needs the folder"):
        load_dataset("folder")
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(VlfastError, match=r"expected a folder .*train"):
        load_folder(empty)
    (empty / "train").mkdir()
    (empty / "test").mkdir()
    with pytest.raises(VlfastError, match="has no class folders"):
        load_folder(empty)
    (empty / "train" / "cat").mkdir()
    with pytest.raises(VlfastError, match="no images under"):
        load_folder(empty)
    write_image(root / "test" / "dog" / "0.png")
    with pytest.raises(VlfastError, match="classes that train lacks: dog"):
        load_folder(root)


def test_corrupt_image_is_named(root):
    path = root / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(VlfastError, match=r"0\.png can't be read, it is corrupt"):
        load_folder(root).train.image(0)


def test_missing_image_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*gone\.png"):
        open_image(tmp_path / "gone.png")


def test_unknown_dataset_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'glyphs/tools'"):
        load_dataset("glyphs/tool")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new(mode, (8, 8)).save(path)
    assert open_image(path).mode == "RGB"
