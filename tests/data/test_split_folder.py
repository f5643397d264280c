"""Class folders without a split, and the split that is drawn once."""

import json
import os
import shutil

import pytest

from tests.data.image_files import write_image
from vlfast.data.folder import load_folder
from vlfast.data.split_folder import split_folder
from vlfast.errors import VlfastError


@pytest.fixture
def root(tmp_path):
    for name, count in (("school_bus", 10), ("cat", 20), (".cache", 3)):
        for i in range(count):
            write_image(tmp_path / name / f"{i:02}.png")
    return tmp_path


def test_without_a_split_the_command_is_named(root):
    with pytest.raises(
        VlfastError, match=r"`vlfast data split .* --test 0\.2 --val 0\.1 --seed 1`"
    ):
        load_folder(root)


def test_a_drawn_split(root):
    assert split_folder(root, test=0.2, val=0.1, seed=1) == {"train": 21, "val": 3, "test": 6}
    data = load_folder(root)
    assert data.classnames == ("cat", "school bus")
    assert [s.labels.tolist() for s in (data.val, data.test)] == [[0, 0, 1], [0] * 4 + [1] * 2]
    keys = [*data.train.image_keys(), *data.val.image_keys(), *data.test.image_keys()]
    assert len(set(keys)) == len(keys) == 30
    assert all(key.startswith(("cat/", "school_bus/")) for key in keys)
    assert data.test.image(0).mode == "RGB"


def test_the_form_is_that_of_coops_split_files(root):
    split_folder(root)
    written = json.loads((root / "split.json").read_text())
    assert list(written) == ["train", "val", "test"]
    path, label, name = written["train"][-1]
    assert path.startswith("school_bus/") and (label, name) == (1, "school bus")


def test_file_names_that_are_not_utf8(root):
    shutil.copy(root / "cat/00.png", os.fsencode(root / "cat/caf") + b"\xe9.png")
    split_folder(root)
    splits = load_folder(root).splits().values()
    found = [(s, i) for s in splits for i, key in enumerate(s.image_keys()) if "caf" in key]
    assert len(found) == 1
    split, position = found[0]
    assert split.image(position).size == (36, 40)


def test_the_seed_decides_and_nothing_is_drawn_anew_silently(root):
    split_folder(root, seed=1)
    first = (root / "split.json").read_bytes()
    with pytest.raises(VlfastError, match=r"split\.json is there already, .*--overwrite"):
        split_folder(root, seed=2)
    assert (root / "split.json").read_bytes() == first
    split_folder(root, seed=2, overwrite=True)
    assert (root / "split.json").read_bytes() != first
    split_folder(root, seed=1, overwrite=True)
    assert (root / "split.json").read_bytes() == first
    assert sorted(p.name for p in root.iterdir() if p.is_file()) == ["split.json"]


def test_small_classes_keep_an_image_to_train_and_one_to_test(tmp_path):
    for i in range(2):
        write_image(tmp_path / "cat" / f"{i}.png")
    assert split_folder(tmp_path, test=0.1, val=0.4) == {"train": 1, "val": 0, "test": 1}
    write_image(tmp_path / "dog" / "0.png")
    with pytest.raises(VlfastError, match="dog has 1 images, expected at least 2"):
        split_folder(tmp_path, overwrite=True)


@pytest.mark.parametrize("shares", [(0, 0.1), (1, 0), (0.6, 0.4), (0.2, -0.1), (float("nan"), 0)])
def test_shares_that_leave_nothing(root, shares):
    with pytest.raises(VlfastError, match="expected shares that leave images for training"):
        split_folder(root, test=shares[0], val=shares[1])


def test_refusals(root, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(VlfastError, match="expected one folder a class"):
        split_folder(empty)
    with pytest.raises(VlfastError, match="there is no folder"):
        split_folder(empty / "gone")
    (empty / "train").mkdir()
    (empty / "test").mkdir()
    with pytest.raises(VlfastError, match="it is split already"):
        split_folder(empty)


def test_a_damaged_split_and_a_missing_image(root):
    split_folder(root)
    gone = json.loads((root / "split.json").read_text())["val"][0][0]
    (root / gone).unlink()
    with pytest.raises(VlfastError, match=f"names {gone}, which is not in .*vlfast data check fol"):
        load_folder(root)
    assert len(load_folder(root, look=False).val) == 3
    (root / "split.json").write_text("[]")
    with pytest.raises(VlfastError, match=r"split\.json .*`vlfast data split .* --overwrite`"):
        load_folder(root)
