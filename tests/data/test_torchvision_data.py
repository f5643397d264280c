"""Datasets of torchvision, from its own folders."""

import inspect
import pickle
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from vlfast.data.catalog import load_dataset
from vlfast.data.check import check_dataset
from vlfast.data.torchvision_data import load_torchvision
from vlfast.errors import UnknownNameError, VlfastError

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR10 += ["dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """CIFAR-10 as it comes, with 4 images a file; image i is i everywhere."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number, file in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        first = 4 * number
        data = np.repeat(np.arange(first, first + 4, dtype=np.uint8)[:, None], 3072, axis=1)
        content = {"data": data, "labels": [(first + i) % 10 for i in range(4)]}
        (folder / file).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CIFAR10}))
    return tmp_path


def test_cifar10(cifar10):
    data = load_dataset("torchvision/CIFAR10", str(cifar10))
    assert data.name == "torchvision/CIFAR10"
    assert list(data.classnames) == CIFAR10
    assert data.template == "a photo of a {}."
    assert data.train.labels.tolist() == [i % 10 for i in range(20)]
    assert data.test.labels.tolist() == [0, 1, 2, 3]
    assert len(data.val) == 0
    assert data.train.image(7).getpixel((0, 0)) == (7, 7, 7)
    assert data.test.image(1).getpixel((3, 5)) == (21, 21, 21)
    assert data.test.image_keys() == ["test/0", "test/1", "test/2", "test/3"]
    assert len(data.few_shot(1, seed=1).train) == 10
    report = check_dataset("torchvision/CIFAR10", cifar10)
    assert (report.state, report.decoded) == ("complete", 24)
    assert report.found() == {
        "classes": 10,
        "train": 20,
        "test": 4,
        "base_test": 4,
        "new_test": 0,
    }


class Fake:
    """A class of torchvision.datasets with splits by name; counts the images it decodes."""

    sizes: ClassVar = {"train": 6, "val": 3, "test": 4}
    decoded = 0

    def __init__(self, root, split="train", transform=None, download=False):
        if split not in self.sizes:
            raise ValueError(f"Unknown value '{split}' for argument split")
        self.split = split
        self.classes = ["aquarium_fish", "bowl"]
        self._labels = [i % 2 for i in range(self.sizes[split])]

    def __len__(self):
        return self.sizes[self.split]

    def __getitem__(self, index):
        type(self).decoded += 1
        return Image.new("L", (8, 8), index), self._labels[index]


@pytest.fixture
def fake(monkeypatch):
    made = type("FakeDTD", (Fake,), {})
    monkeypatch.setattr(datasets, "DTD", made)
    return made


def test_splits_by_name_and_nothing_decoded(fake, tmp_path):
    data = load_torchvision("DTD", tmp_path)
    assert [len(s) for s in (data.train, data.val, data.test)] == [6, 3, 4]
    assert fake.decoded == 0
    assert data.classnames == ("aquarium fish", "bowl")
    assert data.template == "{} texture."
    assert data.val.labels.tolist() == [0, 1, 0]
    image = data.test.image(2)
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (2, 2, 2)


def test_validation_images_test_where_there_are_no_others(fake, tmp_path):
    fake.sizes = {"trainval": 6, "valid": 3}
    data = load_torchvision("DTD", tmp_path)
    assert [len(s) for s in (data.train, data.val, data.test)] == [6, 0, 3]
    assert data.test.image_keys()[0] == "test/0"
    fake.sizes = {"train": 6}
    with pytest.raises(VlfastError, match="torchvision/DTD has no split for test"):
        load_torchvision("DTD", tmp_path)


@pytest.mark.parametrize("attribute", ["targets", "_samples", None])
def test_labels_wherever_they_are(fake, tmp_path, monkeypatch, attribute):
    init = fake.__init__

    def moved(self, *args, **options):
        init(self, *args, **options)
        labels = self.__dict__.pop("_labels")
        if attribute == "targets":
            self.targets = np.array(labels)
        elif attribute:
            setattr(self, attribute, [("file", label) for label in labels])
        self.hidden = labels

    def item(self, index):
        type(self).decoded += 1
        return Image.new("RGB", (8, 8)), self.hidden[index]

    monkeypatch.setattr(fake, "__init__", moved)
    monkeypatch.setattr(fake, "__getitem__", item)
    # The signature is what tells that it has splits.
    moved.__signature__ = inspect.signature(Fake.__init__)
    assert load_torchvision("DTD", tmp_path).train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert (fake.decoded > 0) == (attribute is None)


def test_class_names_of_the_users_own(fake, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("fish\nbowl\n")
    data = load_dataset("torchvision/DTD", str(tmp_path), str(names))
    assert data.classnames == ("fish", "bowl")
    with pytest.raises(VlfastError, match=r"data\.classnames: .* has labels up to 1, but there ar"):
        load_torchvision("DTD", tmp_path, ("fish",))


def test_no_class_names(fake, tmp_path, monkeypatch):
    init = fake.__init__

    def nameless(self, root, split="train"):
        init(self, root, split)
        del self.classes

    monkeypatch.setattr(fake, "__init__", nameless)
    with pytest.raises(VlfastError, match=r"data\.classnames: torchvision/DTD has no class names"):
        load_torchvision("DTD", tmp_path)
    assert load_torchvision("DTD", tmp_path, ("fish", "bowl")).num_classes == 2


def test_not_downloaded(tmp_path):
    wanted = r"torchvision/CIFAR10 is not in .*`vlfast data prepare torchvision/CIFAR10 --root"
    with pytest.raises(VlfastError, match=wanted):
        load_torchvision("CIFAR10", tmp_path)


@pytest.mark.parametrize(
    ("cls", "error", "wanted"),
    [
        ("CIFAR1O", UnknownNameError, "did you mean 'torchvision/CIFAR10'"),
        ("FakeData", VlfastError, "torchvision/FakeData has no training and test split"),
        ("EuroSAT", VlfastError, "no training and test split; .*`vlfast data split`"),
        ("EMNIST", VlfastError, "torchvision/EMNIST needs split, which vlfast can't know"),
        ("CocoDetection", VlfastError, "needs annFile"),
    ],
)
def test_what_is_no_classification_dataset(tmp_path, cls, error, wanted):
    with pytest.raises(error, match=wanted):
        load_torchvision(cls, tmp_path)


def test_several_labels_an_image(fake, tmp_path, monkeypatch):
    init = fake.__init__

    def attributes(self, root, split="train"):
        init(self, root, split)
        self._labels = [[0, 1]] * len(self)

    monkeypatch.setattr(fake, "__init__", attributes)
    with pytest.raises(VlfastError, match="has no class for every image"):
        load_torchvision("DTD", tmp_path)


def test_corrupt_image_is_named(fake, tmp_path, monkeypatch):
    def broken(self, index):
        raise OSError("image file is truncated")

    monkeypatch.setattr(fake, "__getitem__", broken)
    with pytest.raises(VlfastError, match="test image 3 of torchvision/DTD can't be read"):
        load_torchvision("DTD", tmp_path).test.image(3)
