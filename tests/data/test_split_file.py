"""CoOp's split files, and what is refused."""

import json

import pytest

from vlfast.data.split_file import read_split_file
from vlfast.errors import VlfastError

GOOD = {
    "train": [["b/1.jpg", 1, "boat"], ["a/1.jpg", 0, "air_plane"], ["b/2.jpg", 1, "boat"]],
    "val": [],
    "test": [["a/2.jpg", 0, "air_plane"]],
}


def write(tmp_path, content):
    file = tmp_path / "split_zhou_Toy.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_order_is_kept_and_names_are_in_label_order(tmp_path):
    listed, names = read_split_file(write(tmp_path, GOOD), "images")
    assert names == ("air_plane", "boat")
    assert list(listed["train"].names) == ["images/b/1.jpg", "images/a/1.jpg", "images/b/2.jpg"]
    assert listed["train"].labels.tolist() == [1, 0, 1]
    assert len(listed["val"].names) == 0
    assert list(listed["test"].names) == ["images/a/2.jpg"]


def test_paths_may_be_relative_to_the_folder_itself(tmp_path):
    listed, _ = read_split_file(write(tmp_path, GOOD), "")
    assert list(listed["test"].names) == ["a/2.jpg"]


def train(*rows):
    return {**GOOD, "train": [*GOOD["train"], *rows]}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("<html>", "it is not JSON"),
        ("[]", "expected the lists train, val and test"),
        ({"train": [], "test": []}, "expected the lists train, val and test"),
        ({"train": [], "val": [], "test": []}, "it lists no image"),
        (train(["a.jpg", 0]), r"expected \[path, label, class name\], got \['a.jpg', 0\]"),
        (train(["a.jpg", "0", "x"]), r"expected \[path, label, class name\]"),
        (train(["a.jpg", True, "x"]), r"expected \[path, label, class name\]"),
        (train(["a.jpg", -1, "x"]), r"expected \[path, label, class name\]"),
        (train(["a.jpg", 0, " "]), r"expected \[path, label, class name\]"),
        (train(["/data/a.jpg", 0, "air_plane"]), "got the absolute '/data/a.jpg'"),
        (train(["a.jpg", 0, "aeroplane"]), "label 0 is 'air_plane' and, at a.jpg, 'aeroplane'"),
        (train(["a.jpg", 3, "car"]), "labels run to 3, but none is 2"),
        ({**GOOD, "test": [["c.jpg", 2, "car"]]}, "no training image has label 2, 'car'"),
    ],
)
def test_what_is_no_split_file(tmp_path, content, why):
    file = write(tmp_path, content)
    with pytest.raises(VlfastError, match=why) as error:
        read_split_file(file, "images")
    message = str(error.value)
    assert str(file) in message and "download it again" in message and "\n" not in message


def test_bytes_that_are_no_text(tmp_path):
    file = tmp_path / "split.json"
    file.write_bytes(b"\x80\x81")
    with pytest.raises(VlfastError, match="it is not JSON"):
        read_split_file(file, "")
