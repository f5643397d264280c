"""Small copies of the papers' datasets as CoOp's DATASETS.md lays them out: real folders, file
names and naming rules, a handful of classes, tiny generated images."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from vlfast.data.coop.layouts import LAYOUTS

# Folder (or stem) of each class, and its name, in label order.
SPLIT_CLASSES = {
    "caltech101": {
        "Faces": "face",
        "Leopards": "leopard",
        "Motorbikes": "motorbike",
        "accordion": "accordion",
        "airplanes": "airplane",
    },
    "oxford_pets": {
        "Abyssinian": "abyssinian",
        "american_bulldog": "american_bulldog",
        "american_pit_bull_terrier": "american_pit_bull_terrier",
        "basset_hound": "basset_hound",
        "beagle": "beagle",
    },
    "stanford_cars": {
        "1": "2000 AM General Hummer SUV",
        "2": "2012 Acura RL Sedan",
        "3": "2012 Acura TL Sedan",
        "4": "2008 Acura TL Type-S",
        "5": "2012 smart fortwo Convertible",
    },
    "oxford_flowers": {
        "1": "pink primrose",
        "2": "hard-leaved pocket orchid",
        "3": "canterbury bells",
        "4": "sweet pea",
        "10": "globe thistle",
    },
    "food101": {
        name: name
        for name in ("apple_pie", "baby_back_ribs", "baklava", "beef_carpaccio", "waffles")
    },
    "sun397": {
        "a/abbey": "abbey",
        "a/airplane_cabin": "airplane_cabin",
        "a/apse/indoor": "indoor apse",
        "b/bazaar/outdoor": "outdoor bazaar",
        "y/youth_hostel": "youth_hostel",
    },
    "dtd": {name: name for name in ("banded", "blotchy", "braided", "bubbly", "zigzagged")},
    "eurosat": {
        "AnnualCrop": "Annual Crop Land",
        "Forest": "Forest",
        "HerbaceousVegetation": "Herbaceous Vegetation Land",
        "Highway": "Highway or Road",
        "SeaLake": "Sea or Lake",
    },
    "ucf101": {
        name: name
        for name in ("Apply_Eye_Makeup", "Apply_Lipstick", "Archery", "Baby_Crawling", "Yo_Yo")
    },
}
VARIANTS = ("707-320", "727-200", "A300B4", "F/A-18", "Yak-42")
# In the order of classnames.txt; two classes share a name, as some of ImageNet's do.
WNIDS = {
    "n01440764": "tench",
    "n01443537": "goldfish",
    "n01484850": "great white shark",
    "n01498041": "stingray",
    "n04355933": "sunglasses",
    "n04356056": "sunglasses",
}
DOMAIN_WNIDS = {
    "imagenet_sketch": tuple(WNIDS),
    "imagenet_a": ("n01498041", "n04355933"),
    "imagenet_r": ("n01443537", "n01484850", "n01498041"),
}

CLASSNAMES: dict[str, tuple[str, ...]] = {
    **{name: tuple(classes.values()) for name, classes in SPLIT_CLASSES.items()},
    "fgvc_aircraft": VARIANTS,
    "imagenet": tuple(WNIDS.values()),
    "imagenetv2": tuple(WNIDS.values()),
    **{name: tuple(WNIDS[w] for w in wnids) for name, wnids in DOMAIN_WNIDS.items()},
}


def make_coop_root(root: Path, names: Iterable[str] = tuple(LAYOUTS), **images: int) -> Path:
    """Copies of these datasets below ``root``; ``images``: train, val and test images a class."""
    for name in names:
        make_coop_folder(root, name, **images)
    return root


def make_coop_folder(root: Path, name: str, train: int = 5, val: int = 2, test: int = 3) -> Path:
    """A copy of one dataset below ``root``; its own folder."""
    folder = root / LAYOUTS[name].folder
    images = folder / LAYOUTS[name].images
    images.mkdir(parents=True, exist_ok=True)
    counts = {"train": train, "val": val, "test": test}
    if name in SPLIT_CLASSES:
        _write_split_dataset(folder, images, name, counts)
    elif name == "fgvc_aircraft":
        _write_aircraft(folder, images, counts)
    else:
        _write_imagenet(folder, images, name, counts)
    return folder


def write_image(path: Path, label: int = 0, number: int = 0) -> None:
    """24 x 20 pixels in a colour of the class, with noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = np.random.default_rng(label).integers(40, 215, 3)
    noise = np.random.default_rng([label, number]).integers(-30, 30, (20, 24, 3))
    Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8)).save(path, "JPEG")


def _write_split_dataset(folder: Path, images: Path, name: str, counts: dict[str, int]) -> None:
    classes = SPLIT_CLASSES[name]
    running = {"cars_train": count(1), "cars_test": count(1), "flowers": count(1)}
    split: dict[str, list[list[object]]] = {part: [] for part in counts}
    shuffle = random.Random(5).shuffle
    for label, (stem, classname) in enumerate(classes.items()):
        numbers = count(1)
        for part, wanted in counts.items():
            rows = []
            for _ in range(wanted):
                path = _image_name(name, stem, part, next(numbers), running)
                write_image(images / path, label, len(rows))
                rows.append([path, label, classname])
            shuffle(rows)
            split[part] += rows
    if name == "oxford_flowers":  # its classes do not begin with label 0
        for part, rows in split.items():
            split[part] = rows[counts[part] :] + rows[: counts[part]]
    (folder / LAYOUTS[name].split_file).write_text(json.dumps(split, indent=4))
    for other in {
        "caltech101": ("101_ObjectCategories/BACKGROUND_Google", "101_ObjectCategories/Faces_easy"),
        "oxford_pets": ("annotations",),
        "stanford_cars": ("devkit",),
    }.get(name, ()):
        (folder / other).mkdir(exist_ok=True)
    if name == "caltech101":  # of no class
        write_image(images / "BACKGROUND_Google/image_0001.jpg")
        write_image(images / "Faces_easy/image_0001.jpg")


def _image_name(name: str, stem: str, part: str, number: int, running: dict[str, count]) -> str:
    match name:
        case "caltech101":
            return f"{stem}/image_{number:04d}.jpg"
        case "oxford_pets":
            return f"{stem}_{number}.jpg"
        case "stanford_cars":
            cars = "cars_test" if part == "test" else "cars_train"
            return f"{cars}/{next(running[cars]):05d}.jpg"
        case "oxford_flowers":
            return f"image_{next(running['flowers']):05d}.jpg"
        case "food101":
            return f"{stem}/{1_000_000 + number}.jpg"
        case "sun397":
            return f"{stem}/sun_a{number:06d}.jpg"
        case "dtd":
            return f"{stem}/{stem}_{number:04d}.jpg"
        case "eurosat":
            return f"{stem}/{stem}_{number}.jpg"
    return f"{stem}/v_{stem.replace('_', '')}_g{number:02d}_c01.jpg"


def _write_aircraft(folder: Path, images: Path, counts: dict[str, int]) -> None:
    (folder / "variants.txt").write_text("".join(f"{name}\n" for name in VARIANTS))
    number = count(34973)
    for part, wanted in counts.items():
        lines = []
        for i in range(wanted):
            for label, variant in enumerate(VARIANTS):
                image = f"{next(number):07d}"
                write_image(images / f"{image}.jpg", label, i)
                lines.append(f"{image} {variant}\n")
        (folder / f"images_variant_{part}.txt").write_text("".join(lines))


def _write_imagenet(folder: Path, images: Path, name: str, counts: dict[str, int]) -> None:
    lines = [f"{wnid} {classname}\n" for wnid, classname in WNIDS.items()]
    (folder / "classnames.txt").write_text("".join(lines))
    labels = {wnid: label for label, wnid in enumerate(WNIDS)}
    if name == "imagenet":
        for wnid, label in labels.items():
            for i in range(counts["train"]):
                write_image(images / "train" / wnid / f"{wnid}_{i * 7}.JPEG", label, i)
            for i in range(counts["test"]):
                number = label * counts["test"] + i + 1
                write_image(images / f"val/{wnid}/ILSVRC2012_val_{number:08d}.JPEG", label, i)
        return
    for wnid in DOMAIN_WNIDS.get(name, WNIDS):
        label = labels[wnid]
        for i in range(counts["test"]):
            path = {
                "imagenetv2": f"{label}/{label:02d}f{i:04x}.jpeg",
                "imagenet_sketch": f"{wnid}/sketch_{i}.JPEG",
                "imagenet_a": f"{wnid}/0.00{i}_digital clock _ {WNIDS[wnid]}_0.9{i}.jpg",
                "imagenet_r": f"{wnid}/art_{i}.jpg",
            }[name]
            write_image(images / path, label, i)
    if name in ("imagenet_a", "imagenet_r"):
        (images / "README.txt").write_text("about the images")
