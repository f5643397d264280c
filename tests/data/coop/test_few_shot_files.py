"""Few-shot subsets of the papers' datasets: the same images as CoOp's for the same seed, drawn or
read from its pickles."""

import json
import pickle
import random
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

from tests.data.coop.folders import make_coop_folder
from vlfast.data.catalog import load_dataset
from vlfast.data.coop.layouts import ELEVEN, LAYOUTS
from vlfast.errors import VlfastError


@pytest.fixture
def datum(monkeypatch):
    """Dassl's record of an image, as its module has it ([Dassl] base_dataset.py:12-45)."""
    modules = ["dassl", "dassl.data", "dassl.data.datasets", "dassl.data.datasets.base_dataset"]
    for name in modules:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))

    class Datum:
        def __init__(self, impath="", label=0, domain=0, classname=""):
            self._impath = impath
            self._label = label
            self._domain = domain
            self._classname = classname

    Datum.__module__, Datum.__qualname__ = modules[-1], "Datum"
    sys.modules[modules[-1]].Datum = Datum
    return Datum


@pytest.fixture
def pets(tmp_path):
    make_coop_folder(tmp_path, "oxford_pets", train=6, val=5)
    return load(tmp_path)


def load(root, name="oxford_pets"):
    return load_dataset(name, str(root))


def rows_of(folder, layout, part):
    """(path below the dataset's folder, label, class name), in the split file's order."""
    split = json.loads((folder / layout.split_file).read_text())
    images = f"{layout.images}/" if layout.images else ""
    return [(images + path, label, name) for path, label, name in split[part]]


def dassl_draw(rows, count):
    """METHODS of Dassl: classes by first appearance; random.sample, or all there are."""
    groups = {}
    for row in rows:
        groups.setdefault(row[1], []).append(row)
    drawn = []
    for items in groups.values():
        drawn += items if len(items) < count else random.sample(items, count)
    return drawn


def dassl_subset(folder, layout, shots, seed):
    random.seed(seed)
    train = dassl_draw(rows_of(folder, layout, "train"), shots)
    return {"train": train, "val": dassl_draw(rows_of(folder, layout, "val"), min(shots, 4))}


def write_pickle(file, subset, datum, root, protocol=pickle.HIGHEST_PROTOCOL):
    file.parent.mkdir(exist_ok=True)
    data = {
        part: [datum(impath=f"{root}/{path}", label=y, classname=name) for path, y, name in rows]
        for part, rows in subset.items()
    }
    file.write_bytes(pickle.dumps(data, protocol=protocol))


@pytest.mark.parametrize("name", sorted(set(ELEVEN) - {"imagenet", "fgvc_aircraft"}))
@pytest.mark.parametrize(("shots", "seed"), [(1, 1), (4, 2), (5, 3)])
def test_a_seed_draws_what_dassl_draws(tmp_path, name, shots, seed):
    layout = LAYOUTS[name]
    folder = make_coop_folder(tmp_path, name, train=6, val=5)
    expected = dassl_subset(folder, layout, shots, seed)
    drawn = load(tmp_path, name).few_shot(shots, seed)
    for part, rows in expected.items():
        split = drawn.splits()[part]
        assert split.image_keys() == [path for path, _, _ in rows]
        assert split.labels.tolist() == [label for _, label, _ in rows]
    assert drawn.few_shot_from == "drawn"


def test_halves_are_cut_from_the_draw_over_all_classes(tmp_path, pets):
    whole = pets.few_shot(2, 1)
    new = whole.restrict("new")
    expected = [
        name
        for name, label in zip(whole.train.image_keys(), whole.train.labels, strict=True)
        if label >= 3
    ]
    assert new.train.image_keys() == expected
    assert new.few_shot_from == "drawn"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_coops_pickle_is_served(tmp_path, pets, datum, protocol):
    """Other images than the draw gives, in another order, from another machine's folder."""
    folder, layout = tmp_path / "oxford_pets", LAYOUTS["oxford_pets"]
    subset = dassl_subset(folder, layout, 2, seed=77)
    file = folder / "split_fewshot/shot_2-seed_1.pkl"
    write_pickle(file, subset, datum, "/home/someone/oxford_pets/data/oxford_pets", protocol)
    del sys.modules["dassl.data.datasets.base_dataset"]
    drawn = pets.few_shot(2, 1)
    assert drawn.few_shot_from == str(file)
    assert drawn.train.image_keys() == [path for path, _, _ in subset["train"]]
    assert drawn.val.image_keys() == [path for path, _, _ in subset["val"]]
    assert drawn.val.labels.tolist() == [label for _, label, _ in subset["val"]]
    assert drawn.train.image(0).size == (24, 20)
    assert not file.with_suffix(".json").exists()


def test_a_pickle_wins_over_json(tmp_path, pets, datum):
    folder = tmp_path / "oxford_pets"
    drawn = pets.few_shot(2, 1)
    subset = dassl_subset(folder, LAYOUTS["oxford_pets"], 2, seed=77)
    write_pickle(folder / "split_fewshot/shot_2-seed_1.pkl", subset, datum, folder)
    served = load(tmp_path).few_shot(2, 1)
    assert served.few_shot_from.endswith(".pkl")
    assert served.train.image_keys() != drawn.train.image_keys()


def test_windows_paths(tmp_path, pets, datum):
    folder = tmp_path / "oxford_pets"
    subset = dassl_subset(folder, LAYOUTS["oxford_pets"], 1, seed=1)
    backslashed = {p: [(x.replace("/", "\\"), y, n) for x, y, n in r] for p, r in subset.items()}
    file = folder / "split_fewshot/shot_1-seed_1.pkl"
    write_pickle(file, backslashed, datum, "D:\\DATA\\oxford_pets")
    assert len(pets.few_shot(1, 1).train) == 5


def test_imagenets_pickle_has_no_validation_images(tmp_path, datum):
    folder = make_coop_folder(tmp_path, "imagenet")
    data = load(tmp_path, "imagenet")
    names = [data.train.image_keys()[5 * label + 3] for label in range(6)]
    subset = {"train": [(n, y, data.classnames[y]) for y, n in enumerate(names)]}
    file = folder / "split_fewshot/shot_1-seed_1.pkl"
    write_pickle(file, subset, datum, "/data/imagenet")
    drawn = data.few_shot(1, 1)
    assert drawn.train.image_keys() == names
    assert len(drawn.val) == 0 and len(drawn.test) == 18


class Dangerous:
    def __reduce__(self):
        import os

        return os.system, ("touch dangerous",)


@pytest.mark.parametrize(
    "content",
    [Dangerous(), {"train": [Dangerous()], "val": []}, {"train": np.zeros(2), "val": []}],
    ids=["whole", "inside", "array"],
)
def test_nothing_but_records_is_built(tmp_path, pets, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "oxford_pets/split_fewshot/shot_1-seed_1.pkl"
    file.parent.mkdir()
    file.write_bytes(pickle.dumps(content))
    with pytest.raises(VlfastError, match=r"asks for (posix\.system|numpy\S+),.*nothing of it was"):
        pets.few_shot(1, 1)
    assert not (tmp_path / "dangerous").exists()


def test_a_datum_can_not_be_called_upon(tmp_path, pets, datum):
    """A pickle that builds a record with arguments, or gives it another form, is refused."""

    class Called(datum):
        def __reduce__(self):
            return datum, ("/a/oxford_pets/b.jpg", 0)

    file = tmp_path / "oxford_pets/split_fewshot/shot_1-seed_1.pkl"
    file.parent.mkdir()
    file.write_bytes(pickle.dumps({"train": [Called()], "val": []}))
    with pytest.raises(VlfastError, match="is damaged or is no pickle"):
        pets.few_shot(1, 1)


def served(tmp_path, pets, datum, change, shots=2):
    """Ask for the subset of a pickle whose rows went through ``change``."""
    folder = tmp_path / "oxford_pets"
    subset = dassl_subset(folder, LAYOUTS["oxford_pets"], shots, seed=1)
    change(subset)
    write_pickle(folder / f"split_fewshot/shot_{shots}-seed_1.pkl", subset, datum, folder)
    return pets.few_shot(shots, 1)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (("images/Nemo_1.jpg", 0, "abyssinian"), r"images/Nemo_1.jpg is no train image of oxford"),
        (("images/Abyssinian_1.jpg", 1, "abyssinian"), "has the label 1 there, 0 here"),
        (("images/Abyssinian_12.jpg", 0, "abyssinian"), "Abyssinian_12.jpg is no train image"),
        (("images/Abyssinian_1.jpg", "0", "abyssinian"), "expected Dassl's records of an image"),
    ],
    ids=["unknown", "label", "of the test split", "label's type"],
)
def test_images_that_are_not_in_the_split(tmp_path, pets, datum, row, why):
    def change(subset):
        subset["train"][0] = row

    with pytest.raises(VlfastError, match=why) as error:
        served(tmp_path, pets, datum, change)
    message = str(error.value)
    assert "split_fewshot/shot_2-seed_1.pkl" in message and "move it away" in message


def test_fewer_images_than_its_name_says(tmp_path, pets, datum):
    with pytest.raises(VlfastError, match="expected 2 train images of 'abyssinian', got 1"):
        served(tmp_path, pets, datum, lambda subset: subset["train"].pop(0))


def test_no_validation_images_where_there_are_some(tmp_path, pets, datum):
    with pytest.raises(VlfastError, match="expected a list of val images, got NoneType"):
        served(tmp_path, pets, datum, lambda subset: subset.pop("val"))


def test_a_folder_of_another_name_in_its_paths(tmp_path, pets, datum):
    folder = tmp_path / "oxford_pets"
    subset = dassl_subset(folder, LAYOUTS["oxford_pets"], 1, seed=1)
    write_pickle(folder / "split_fewshot/shot_1-seed_1.pkl", subset, datum, "/data/pets")
    with pytest.raises(VlfastError, match="expected a folder oxford_pets in every path, got /data"):
        pets.few_shot(1, 1)


def test_other_class_names_are_told(tmp_path, pets, datum):
    def change(subset):
        path, label, _ = subset["train"][0]
        subset["train"][0] = (path, label, "Abyssinian cat")

    with pytest.warns(UserWarning, match="calls class 0 'Abyssinian cat'.*here it is 'abyssinian'"):
        served(tmp_path, pets, datum, change)


def test_a_truncated_pickle(tmp_path, pets, datum):
    served(tmp_path, pets, datum, lambda subset: None)
    file = tmp_path / "oxford_pets/split_fewshot/shot_2-seed_1.pkl"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(VlfastError, match=f"{file} is damaged or is no pickle"):
        pets.few_shot(2, 1)


def test_a_draw_is_stored_and_served_again(tmp_path, pets):
    drawn = pets.few_shot(2, 3)
    file = tmp_path / "oxford_pets/split_fewshot/shot_2-seed_3.json"
    content = json.loads(file.read_text())
    assert content["train"] == [
        [name, label]
        for name, label in zip(drawn.train.image_keys(), drawn.train.labels.tolist(), strict=True)
    ]
    assert Counter(label for _, label in content["val"]) == dict.fromkeys(range(5), 2)
    again = load(tmp_path).few_shot(2, 3)
    assert again.few_shot_from == str(file)
    assert again.fingerprint() == drawn.fingerprint()
    assert [p.name for p in file.parent.iterdir()] == ["shot_2-seed_3.json"]


def test_stored_images_are_taken_not_drawn_anew(tmp_path, pets):
    pets.few_shot(1, 1)
    file = tmp_path / "oxford_pets/split_fewshot/shot_1-seed_1.json"
    content = json.loads(file.read_text())
    other = next(
        name
        for name, label in zip(pets.train.image_keys(), pets.train.labels, strict=True)
        if label == 0 and [name, 0] not in content["train"]
    )
    content["train"][0] = [other, 0]
    file.write_text(json.dumps(content))
    assert pets.few_shot(1, 1).train.image_keys()[0] == other


def test_json_of_another_split_is_refused(tmp_path, pets):
    pets.few_shot(2, 1)
    make_coop_folder(tmp_path, "oxford_pets", train=7, val=5)
    with pytest.raises(VlfastError, match=r"seed_1\.json.*drawn from other splits of oxford_pets"):
        load(tmp_path).few_shot(2, 1)


@pytest.mark.parametrize(
    ("content", "why"),
    [("{", "it is not JSON"), ("[]", "expected the format"), ('{"format": 1}', "expected the for")],
)
def test_damaged_json(tmp_path, pets, content, why):
    file = tmp_path / "oxford_pets/split_fewshot/shot_2-seed_1.json"
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(VlfastError, match=f"{file} can't be used: {why}.*move it away"):
        pets.few_shot(2, 1)


def test_a_folder_that_can_not_be_written_to(tmp_path, pets):
    (tmp_path / "oxford_pets/split_fewshot").write_text("a file in its place")
    assert pets.few_shot(2, 1).few_shot_from == "drawn"


def test_several_at_once(tmp_path, pets):
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda _: load(tmp_path).few_shot(2, 1).train.image_keys(), range(24)))
    assert all(found == keys[0] for found in keys)
    assert len(list((tmp_path / "oxford_pets/split_fewshot").iterdir())) == 1


def test_the_files_stay_with_a_copy_and_leave_a_half(tmp_path, pets):
    assert replace(pets, template="a {}.").few_shot(1, 1).few_shot_from == "drawn"
    assert replace(pets, template="a {}.").few_shot(1, 1).few_shot_from.endswith(".json")
    assert pets.restrict("base").few_shot(1, 1).few_shot_from == "drawn"
