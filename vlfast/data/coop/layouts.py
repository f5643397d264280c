"""CoOp's folders of the papers' datasets: where files are, and how many images there must be.

[CoOp] DATASETS.md and datasets/*.py; the counts are those of METHODS' sources: train, val and test
of the published split files, base and new of [PromptKD] table 8.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlfast.data.templates import dataset_key


@dataclass(frozen=True)
class Counts:
    """What a complete dataset holds: classes, and images by split; None where it has no such split
    (or, for base and new test images, where no paper gives the number)."""

    classes: int
    train: int | None
    val: int | None
    test: int
    base_test: int | None = None
    new_test: int | None = None


@dataclass(frozen=True)
class Layout:
    """One dataset below the data root.

    name: as CoOp's config files have it. title: as the papers and CoOp's code have it. folder:
    below the root. images: what the split's paths are relative to, below ``folder``. split_file:
    the JSON with the splits, below ``folder``; None where other files say it. needs: other files
    below ``folder``, without which it can't be read.
    """

    name: str
    title: str
    folder: str
    images: str
    counts: Counts
    split_file: str | None = None
    needs: tuple[str, ...] = ()


_VARIANTS = ("variants.txt", *(f"images_variant_{part}.txt" for part in ("train", "val", "test")))

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "imagenet",
            "ImageNet",
            "imagenet",
            "images",
            Counts(1000, 1_281_167, None, 50_000, 25_000, 25_000),
            needs=("classnames.txt",),
        ),
        Layout(
            "caltech101",
            "Caltech101",
            "caltech-101",
            "101_ObjectCategories",
            Counts(100, 4_128, 1_649, 2_465, 1_549, 916),
            "split_zhou_Caltech101.json",
        ),
        Layout(
            "oxford_pets",
            "OxfordPets",
            "oxford_pets",
            "images",
            Counts(37, 2_944, 736, 3_669, 1_881, 1_788),
            "split_zhou_OxfordPets.json",
        ),
        Layout(
            "stanford_cars",
            "StanfordCars",
            "stanford_cars",
            "",
            Counts(196, 6_509, 1_635, 8_041, 4_002, 4_039),
            "split_zhou_StanfordCars.json",
        ),
        Layout(
            "oxford_flowers",
            "OxfordFlowers",
            "oxford_flowers",
            "jpg",
            Counts(102, 4_093, 1_633, 2_463, 1_053, 1_410),
            "split_zhou_OxfordFlowers.json",
        ),
        Layout(
            "food101",
            "Food101",
            "food-101",
            "images",
            Counts(101, 50_500, 20_200, 30_300, 15_300, 15_000),
            "split_zhou_Food101.json",
        ),
        Layout(
            "fgvc_aircraft",
            "FGVCAircraft",
            "fgvc_aircraft",
            "images",
            Counts(100, 3_334, 3_333, 3_333, 1_666, 1_667),
            needs=_VARIANTS,
        ),
        Layout(
            "sun397",
            "SUN397",
            "sun397",
            "SUN397",
            Counts(397, 15_880, 3_970, 19_850, 9_950, 9_900),
            "split_zhou_SUN397.json",
        ),
        Layout(
            "dtd",
            "DescribableTextures",
            "dtd",
            "images",
            Counts(47, 2_820, 1_128, 1_692, 864, 828),
            "split_zhou_DescribableTextures.json",
        ),
        Layout(
            "eurosat",
            "EuroSAT",
            "eurosat",
            "2750",
            Counts(10, 13_500, 5_400, 8_100, 4_200, 3_900),
            "split_zhou_EuroSAT.json",
        ),
        Layout(
            "ucf101",
            "UCF101",
            "ucf101",
            "UCF-101-midframes",
            Counts(101, 7_639, 1_898, 3_783, 1_934, 1_849),
            "split_zhou_UCF101.json",
        ),
        Layout(
            "imagenetv2",
            "ImageNetV2",
            "imagenetv2",
            "imagenetv2-matched-frequency-format-val",
            Counts(1000, None, None, 10_000),
            needs=("classnames.txt",),
        ),
        Layout(
            "imagenet_sketch",
            "ImageNetSketch",
            "imagenet-sketch",
            "images",
            Counts(1000, None, None, 50_889),
            needs=("classnames.txt",),
        ),
        Layout(
            "imagenet_a",
            "ImageNetA",
            "imagenet-adversarial",
            "imagenet-a",
            Counts(200, None, None, 7_500),
            needs=("classnames.txt",),
        ),
        Layout(
            "imagenet_r",
            "ImageNetR",
            "imagenet-rendition",
            "imagenet-r",
            Counts(200, None, None, 30_000),
            needs=("classnames.txt",),
        ),
    )
}

# The 11 of base-to-new and few-shot learning, in the papers' order, and ImageNet's four domains.
ELEVEN = tuple(LAYOUTS)[:11]
IMAGENET_DOMAINS = tuple(LAYOUTS)[11:]


def layout_of(name: str) -> Layout | None:
    """The layout of a dataset, however its name is written ("OxfordPets", "oxford_pets", "dtd",
    "DescribableTextures"); None if it is not one of these."""
    key = dataset_key(name)
    return next((x for x in LAYOUTS.values() if key in map(dataset_key, (x.name, x.title))), None)
