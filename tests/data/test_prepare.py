"""`vlfast data prepare`, with classes that write torchvision's folders instead of fetching them."""

import os
import zipfile
from pathlib import Path

import pytest
from torchvision import datasets

from tests.data.image_files import write_image
from vlfast.cli.commands import main
from vlfast.data.coop.layouts import LAYOUTS
from vlfast.data.prepare import prepare
from vlfast.errors import UnknownNameError, VlfastError

# What the classes of torchvision 0.29 leave in their root: archives, and what they unpack.
TORCHVISION = {
    "caltech101": (
        "Caltech101",
        ["caltech101/caltech-101/101_ObjectCategories.tar.gz"],
        ["caltech101/101_ObjectCategories/ant/image_0001.jpg"],
    ),
    "oxford_pets": (
        "OxfordIIITPet",
        ["oxford-iiit-pet/images.tar.gz", "oxford-iiit-pet/annotations.tar.gz"],
        ["oxford-iiit-pet/annotations/test.txt", "oxford-iiit-pet/images/beagle_1.jpg"],
    ),
    "oxford_flowers": (
        "Flowers102",
        ["flowers-102/102flowers.tgz", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"],
        ["flowers-102/jpg/image_00001.jpg"],
    ),
    "food101": (
        "Food101",
        ["food-101.tar.gz"],
        ["food-101/images/waffles/1.jpg", "food-101/meta/train.json", "food-101/README.txt"],
    ),
    "fgvc_aircraft": (
        "FGVCAircraft",
        ["fgvc-aircraft-2013b.tar.gz"],
        [
            "fgvc-aircraft-2013b/data/images/1.jpg",
            "fgvc-aircraft-2013b/data/variants.txt",
            "fgvc-aircraft-2013b/evaluation.m",
        ],
    ),
    "sun397": ("SUN397", ["SUN397.tar.gz"], ["SUN397/a/abbey/sun_1.jpg", "SUN397/ClassName.txt"]),
    "dtd": (
        "DTD",
        ["dtd/dtd-r1.0.1.tar.gz"],
        ["dtd/dtd/images/banded/banded_1.jpg", "dtd/dtd/labels/train1.txt"],
    ),
    "eurosat": ("EuroSAT", ["eurosat/EuroSAT.zip"], ["eurosat/2750/Forest/Forest_1.jpg"]),
}

# Where it is in CoOp's folders; what CoOp does not use is not kept.
COOP = {
    "caltech101": ["caltech-101/101_ObjectCategories/ant/image_0001.jpg"],
    "oxford_pets": ["oxford_pets/annotations/test.txt", "oxford_pets/images/beagle_1.jpg"],
    "oxford_flowers": ["oxford_flowers/imagelabels.mat", "oxford_flowers/jpg/image_00001.jpg"],
    "food101": [
        "food-101/README.txt",
        "food-101/images/waffles/1.jpg",
        "food-101/meta/train.json",
    ],
    "fgvc_aircraft": ["fgvc_aircraft/images/1.jpg", "fgvc_aircraft/variants.txt"],
    "sun397": ["sun397/SUN397/ClassName.txt", "sun397/SUN397/a/abbey/sun_1.jpg"],
    "dtd": ["dtd/images/banded/banded_1.jpg", "dtd/labels/train1.txt"],
    "eurosat": ["eurosat/2750/Forest/Forest_1.jpg"],
}


class Fetcher:
    """Stands for a class of torchvision: archives are fetched unless they are there, and unpacked
    unless any of their content is there."""

    def __init__(self, name):
        _, self.archives, self.files = TORCHVISION[name]
        self.fetched = []
        self.stop_after = None
        self.error = None

    def make(self, root, split="any", transform=None, download=False):
        assert download
        for archive in self.archives:
            if not (Path(root) / archive).is_file():
                self.fetched.append(archive)
                self.write(root, archive)
        if not any((Path(root) / file).is_file() for file in self.files):
            for number, file in enumerate(self.files):
                if number == self.stop_after:
                    raise KeyboardInterrupt
                self.write(root, file)
        if self.error is not None:
            raise self.error

    @staticmethod
    def write(root, name):
        path = Path(root) / name
        if path.suffix == ".jpg":
            write_image(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("content")


@pytest.fixture
def fetcher_of(monkeypatch):
    def replace(name):
        fetcher = Fetcher(name)

        class Made:
            def __init__(self, root, split="any", transform=None, download=False):
                fetcher.make(root, split, transform, download)

        monkeypatch.setattr(datasets, TORCHVISION[name][0], Made)
        return fetcher

    return replace


def files_in(root):
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


@pytest.mark.parametrize("name", TORCHVISION)
def test_coops_folders(name, tmp_path, fetcher_of):
    fetcher = fetcher_of(name)
    folder = prepare(name, tmp_path)
    assert folder == tmp_path / LAYOUTS[name].folder
    assert files_in(tmp_path) == COOP[name]
    assert len(fetcher.fetched) == len(fetcher.archives)
    prepare(LAYOUTS[name].title, tmp_path)
    assert len(fetcher.fetched) == len(fetcher.archives)


def test_torchvisions_own_classes(tmp_path, monkeypatch):
    """As they are, but for the archive that comes over the network."""

    def unpack(url, download_root, **_):
        names = {
            "dtd": [f"dtd/images/banded/banded_{i}.jpg" for i in range(2)],
            "eurosat": ["2750/Forest/Forest_1.jpg"],
        }[Path(download_root).name]
        for name in names:
            Fetcher.write(download_root, name)
        if "dtd" in url:
            labels = Path(download_root) / "dtd/labels"
            labels.mkdir()
            (labels / "train1.txt").write_text("banded/banded_0.jpg\nbanded/banded_1.jpg\n")

    for module in ("dtd", "eurosat"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", unpack)
    prepare("dtd", tmp_path)
    prepare("eurosat", tmp_path)
    assert files_in(tmp_path) == [
        "dtd/images/banded/banded_0.jpg",
        "dtd/images/banded/banded_1.jpg",
        "dtd/labels/train1.txt",
        "eurosat/2750/Forest/Forest_1.jpg",
    ]


def test_what_the_user_has_stays(tmp_path, fetcher_of):
    fetcher_of("oxford_pets")
    for file in ("annotations/mine.txt", "split_zhou_OxfordPets.json"):
        Fetcher.write(tmp_path / "oxford_pets", file)
    prepare("oxford_pets", tmp_path)
    assert files_in(tmp_path / "oxford_pets") == [
        "annotations/mine.txt",
        "images/beagle_1.jpg",
        "split_zhou_OxfordPets.json",
    ]


def test_a_stop_while_it_unpacks(tmp_path, fetcher_of):
    """torchvision would take the half of the images for all of them."""
    fetcher = fetcher_of("food101")
    fetcher.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        prepare("food101", tmp_path)
    assert not (tmp_path / "food-101").exists()
    fetcher.stop_after = None
    prepare("food101", tmp_path)
    assert files_in(tmp_path) == COOP["food101"]
    assert fetcher.fetched == ["food-101.tar.gz"]


def test_a_stop_while_it_moves(tmp_path, fetcher_of, monkeypatch):
    fetcher_of("oxford_pets")
    rename = os.rename

    def stop(source, target):
        if Path(target).name == "images":
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("vlfast.data.prepare.os.rename", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare("oxford_pets", tmp_path)
    prepare("oxford_pets", tmp_path)
    assert files_in(tmp_path) == COOP["oxford_pets"]


def test_no_network(tmp_path, fetcher_of):
    fetcher = fetcher_of("dtd")
    fetcher.error = OSError("Name or service not known")
    with pytest.raises(
        VlfastError, match="DTD could not be fetched .*not known.*same command goes"
    ):
        prepare("dtd", tmp_path)
    assert not (tmp_path / "dtd").exists()


def test_an_archive_that_is_cut_short_is_fetched_again(tmp_path, fetcher_of):
    fetcher = fetcher_of("eurosat")
    fetcher.error = zipfile.BadZipFile("File is not a zip file")
    with pytest.raises(VlfastError, match="archive of EuroSAT was cut short and is removed"):
        prepare("eurosat", tmp_path)
    assert files_in(tmp_path) == []
    fetcher.error = None
    prepare("eurosat", tmp_path)
    assert fetcher.fetched == ["eurosat/EuroSAT.zip"] * 2


def test_a_package_that_only_reading_needs(tmp_path, fetcher_of):
    fetcher = fetcher_of("oxford_flowers")
    fetcher.error = ModuleNotFoundError("No module named 'scipy'")
    prepare("oxford_flowers", tmp_path)
    assert files_in(tmp_path) == COOP["oxford_flowers"]


@pytest.mark.parametrize("name", sorted(set(LAYOUTS) - set(TORCHVISION)))
def test_what_torchvision_can_not_fetch(name, tmp_path):
    layout = LAYOUTS[name]
    with pytest.raises(VlfastError, match=f"can't fetch {layout.title}; put .*DATASETS.md"):
        prepare(name, tmp_path)
    assert files_in(tmp_path) == []


def test_torchvisions_own_folders(tmp_path, monkeypatch):
    made = []

    class Made:
        def __init__(self, root, train=True, transform=None, download=False):
            made.append((root, train, download))

    monkeypatch.setattr(datasets, "CIFAR10", Made)
    assert prepare("torchvision/CIFAR10", tmp_path) == tmp_path
    assert made == [(str(tmp_path), True, True), (str(tmp_path), False, True)]


def test_a_failed_download_leaves_the_users_folder(tmp_path, monkeypatch):
    class Made:
        def __init__(self, root, train=True, transform=None, download=False):
            raise zipfile.BadZipFile("cut")

    monkeypatch.setattr(datasets, "CIFAR10", Made)
    Fetcher.write(tmp_path, "mine.txt")
    with pytest.raises(VlfastError, match="CIFAR10 could not be fetched"):
        prepare("torchvision/CIFAR10", tmp_path)
    assert files_in(tmp_path) == ["mine.txt"]


@pytest.mark.parametrize(
    ("name", "error", "wanted"),
    [
        ("torchvision/CIFAR1O", UnknownNameError, "did you mean 'torchvision/CIFAR10'"),
        ("torchvision/ImageNet", VlfastError, "torchvision does not fetch ImageNet; unpack it at"),
        ("eurosats", UnknownNameError, "did you mean 'eurosat'"),
    ],
)
def test_refusals(tmp_path, name, error, wanted):
    with pytest.raises(error, match=wanted):
        prepare(name, tmp_path)


def test_the_command_says_what_is_still_missing(tmp_path, fetcher_of, capsys):
    fetcher_of("dtd")
    assert main(["data", "prepare", "dtd", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"data: {tmp_path / 'dtd'}" in out
    assert f"put split_zhou_DescribableTextures.json at {tmp_path / 'dtd'}" in out
