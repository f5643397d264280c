"""A user's own images by tables of path,label."""

import pytest

from tests.data.image_files import write_image
from vlfast.data.catalog import load_dataset
from vlfast.data.csv_table import load_csv
from vlfast.errors import VlfastError


@pytest.fixture
def root(tmp_path):
    for name in ("a.png", "sub/b c.jpg", "é.png"):
        write_image(tmp_path / name)
    return tmp_path


def table(path, *rows, header="path,label"):
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_folder_of_tables(root):
    table(root / "train.csv", "a.png,dog", "sub/b c.jpg,cat", "é.png,dog")
    table(root / "test.csv", "a.png,cat")
    data = load_dataset("csv", str(root))
    assert data.classnames == ("cat", "dog")
    assert data.train.labels.tolist() == [1, 0, 1]
    assert data.test.labels.tolist() == [0]
    assert len(data.val) == 0
    assert data.train.image_keys() == ["a.png", "sub/b c.jpg", "é.png"]
    assert data.train.image(1).size == (36, 40)


def test_one_table_with_its_columns_in_any_order(root):
    file = table(
        root / "all.csv",
        'train,"dog, small",a.png,x',
        "Val,cat,sub/b c.jpg,",
        "test,cat,é.png,y",
        header="split, label, path, note",
    )
    data = load_csv(file)
    assert data.classnames == ("cat", "dog, small")
    assert [len(s) for s in (data.train, data.val, data.test)] == [1, 1, 1]
    assert data.val.labels.tolist() == [0]


def test_excels_byte_order_mark_and_line_ends(root):
    text = "path,label\r\na.png,cat\r\n".encode("utf-8-sig")
    for part in ("train", "test"):
        (root / f"{part}.csv").write_bytes(text)
    assert load_csv(root).classnames == ("cat",)


def test_absolute_paths(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("tables")
    for part in ("train", "test"):
        table(elsewhere / f"{part}.csv", f"{root / 'a.png'},cat")
    assert load_csv(elsewhere).train.image(0).size == (36, 40)


def test_numbers_count_the_class_names(root):
    table(root / "train.csv", "a.png,2", "é.png,0")
    table(root / "test.csv", "a.png,1")
    with pytest.raises(VlfastError, match=r"data\.classnames: the labels of .*train\.csv are num"):
        load_csv(root)
    names = root / "names.txt"
    names.write_text("zebra\ncat\nape\n")
    data = load_dataset("csv", str(root), str(names))
    assert data.classnames == ("zebra", "cat", "ape")
    assert data.train.labels.tolist() == [2, 0]
    with pytest.raises(VlfastError, match=r"line 2 of .*train\.csv: expected a label from 0 to 1"):
        load_csv(root, ("zebra", "cat"))


def test_numbers_with_a_point_name_no_class_either(root):
    table(root / "train.csv", "a.png,0.0", "é.png,1.0")
    table(root / "test.csv", "a.png,1.0")
    with pytest.raises(VlfastError, match=r"data\.classnames: the labels of .*train\.csv are num"):
        load_csv(root)
    with pytest.raises(VlfastError, match=r"line 2 of .*: '0\.0' is not among the 2 class names"):
        load_csv(root, ("cat", "dog"))


def test_given_names_order_the_classes(root):
    table(root / "train.csv", "a.png,cat", "é.png,dog")
    table(root / "test.csv", "a.png,dog")
    data = load_csv(root, ("dog", "cat", "ape"))
    assert data.train.labels.tolist() == [1, 0]
    assert data.num_classes == 3
    with pytest.raises(VlfastError, match=r"line 3 of .*: 'dog' is not among the 2 class names"):
        load_csv(root, ("cat", "ape"))


@pytest.mark.parametrize(
    ("rows", "header", "wanted"),
    [
        (["a.png,cat"], "file,label", r"has no column path, expected .*path, label, got file, lab"),
        (["a.png"], "path,label", "line 2 of .* has no label"),
        ([",cat"], "path,label", "line 2 of .* has no path"),
        (["gone.png,cat"], "path,label", r"line 2 of .*train.csv: there is no image 'gone\.png'"),
        ([], "path,label", "has no row for train"),
        ([], "", "has no column path, expected .*, got an empty file"),
        (['"a.png,cat'], "path,label", r"is not CSV \(unexpected end of data"),
    ],
)
def test_what_is_wrong_is_named(root, rows, header, wanted):
    table(root / "train.csv", *rows, header=header)
    table(root / "test.csv", "a.png,cat")
    with pytest.raises(VlfastError, match=wanted):
        load_csv(root)


def test_refusals(root):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*train\.csv"):
        load_csv(root)
    with pytest.raises(FileNotFoundError, match="there is no folder or .csv file"):
        load_csv(root / "gone.csv")
    file = table(root / "all.csv", "a.png,cat,valid", header="path,label,split")
    with pytest.raises(VlfastError, match="line 2 of .*: expected split train, val, test, got 'va"):
        load_csv(file)
    file.write_bytes(b"path,label,split\n\xe9.png,cat,train\n")
    with pytest.raises(VlfastError, match=r"all\.csv is not UTF-8"):
        load_csv(file)
