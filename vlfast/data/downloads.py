"""Where the images of the papers' datasets come from: archives, and what torchvision can fetch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fetch:
    """A dataset that a class of torchvision.datasets downloads.

    cls: its name. inside: the folder below torchvision's root that holds what is wanted. keep: what
    of it goes to CoOp's folder; all where it is empty.
    """

    cls: str
    inside: str
    keep: tuple[str, ...] = ()


# torchvision.datasets' own folders, as of 0.29.
FETCHED = {
    "caltech101": Fetch("Caltech101", "caltech101", ("101_ObjectCategories",)),
    "oxford_pets": Fetch("OxfordIIITPet", "oxford-iiit-pet", ("annotations", "images")),
    "oxford_flowers": Fetch("Flowers102", "flowers-102", ("imagelabels.mat", "jpg")),
    "food101": Fetch("Food101", "food-101"),
    "fgvc_aircraft": Fetch("FGVCAircraft", "fgvc-aircraft-2013b/data"),
    "sun397": Fetch("SUN397", "", ("SUN397",)),
    "dtd": Fetch("DTD", "dtd/dtd"),
    "eurosat": Fetch("EuroSAT", "eurosat", ("2750",)),
}

# What holds the images, by the names that CoOp's DATASETS.md gives; links come and go.
ARCHIVES = {
    "imagenet": "the training and validation images (image-net.org, for which one signs up)",
    "caltech101": "101_ObjectCategories.tar.gz",
    "oxford_pets": "images.tar.gz and annotations.tar.gz",
    "stanford_cars": "cars_train.tgz and cars_test.tgz",
    "oxford_flowers": "102flowers.tgz",
    "food101": "food-101.tar.gz",
    "fgvc_aircraft": "fgvc-aircraft-2013b.tar.gz, of which its data/ is this folder",
    "sun397": "SUN397.tar.gz",
    "dtd": "dtd-r1.0.1.tar.gz",
    "eurosat": "EuroSAT.zip",
    "ucf101": "UCF-101-midframes.zip",
    "imagenetv2": "imagenetv2-matched-frequency.tar.gz",
    "imagenet_sketch": "the images of ImageNet-Sketch",
    "imagenet_a": "imagenet-a.tar (Natural Adversarial Examples)",
    "imagenet_r": "imagenet-r.tar",
}
