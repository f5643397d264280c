"""Datasets as prompt learning needs them: class names, a template, splits of labelled images."""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image
from torch import Tensor

from vlfast.errors import VlfastError

ClassSubset = Literal["all", "base", "new"]
CLASS_SUBSETS: tuple[ClassSubset, ...] = ("all", "base", "new")

UNKNOWN = -1  # the label of an image without one


class ImageSource(Protocol):
    """Images by index.

    ``renders_views`` says who makes training views: True, the source draws a new one for each
    ``view``; False, it returns the stored image and the trainer crops and flips it.
    """

    renders_views: bool

    def __len__(self) -> int: ...

    def load(self, index: int, view: int | None = None) -> Image.Image:
        """The image at ``index``, RGB. ``view=None`` is the canonical one that tests use; an
        integer seeds a random training view where ``renders_views`` is True."""
        ...

    def key(self, index: int) -> str:
        """A name of the image that is the same on every machine (it enters the split's hash)."""
        ...


@runtime_checkable
class RendersBatches(Protocol):
    """An ImageSource that can render many images at once.

    image_size: the side of its square images, in pixels.
    """

    image_size: int

    def load_batch(self, indices: Sequence[int], views: Sequence[int | None]) -> Tensor:
        """uint8 [B, 3, image_size, image_size]: what ``load`` gives for each index and view."""
        ...


class FewShotSubsets(Protocol):
    """Few-shot subsets of a dataset that are kept somewhere; of all its classes."""

    def read(self, dataset: Dataset, shots: int, seed: int) -> tuple[Split, Split, str] | None:
        """Train, val, and where they come from; None where nothing is kept."""
        ...

    def write(self, dataset: Dataset, shots: int, seed: int, train: Split, val: Split) -> None:
        """Keep a subset that was drawn."""
        ...


@dataclass(frozen=True)
class Split:
    """Some images of a source and their labels. ``indices`` and ``labels`` are int64 [N]; a label
    is UNKNOWN (-1) where there is none."""

    source: ImageSource
    indices: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        indices = np.asarray(self.indices, dtype=np.int64)
        labels = np.asarray(self.labels, dtype=np.int64)
        if indices.ndim != 1 or indices.shape != labels.shape:
            raise ValueError(
                f"labels: expected one label an image, got {labels.shape} labels "
                f"for {indices.shape} indices"
            )
        object.__setattr__(self, "indices", indices)
        object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, position: int, view: int | None = None) -> Image.Image:
        """The image at ``position`` of this split (see ImageSource.load)."""
        return self.source.load(int(self.indices[position]), view)

    def image_keys(self) -> list[str]:
        """The names of its images (see ImageSource.key)."""
        return list(map(self.source.key, self.indices.tolist()))

    def at(self, positions: Sequence[int] | np.ndarray) -> Split:
        """The images at these positions, in this order."""
        chosen = np.asarray(positions, dtype=np.int64)
        return Split(self.source, self.indices[chosen], self.labels[chosen])

    def of_classes(self, first: int, last: int) -> Split:
        """The images with first <= label < last, labels renumbered from 0."""
        kept = np.flatnonzero((self.labels >= first) & (self.labels < last))
        return Split(self.source, self.indices[kept], self.labels[kept] - first)


@dataclass(frozen=True)
class Dataset:
    """A classification task.

    name: how configs refer to it. classnames: in label order; two classes may share a name, as in
    ImageNet. template: with one ``{}`` for the class name. train, val, test: the splits; the labels
    of ``train`` may be unknown, all of them. domains: other test sets with the same classes (unseen
    styles, other photographers), by name. context_init: the words that a learned context starts
    from where a recipe says "auto". few_shot_files: subsets that ``few_shot`` takes instead
    of drawing. few_shot_from: of what ``few_shot`` gave, where it comes from: "drawn", or a file.
    """

    name: str
    classnames: tuple[str, ...]
    template: str
    train: Split
    val: Split
    test: Split
    domains: Mapping[str, Split] = field(default_factory=dict)
    context_init: str = "a photo of a"
    few_shot_files: FewShotSubsets | None = None
    few_shot_from: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "classnames", tuple(self.classnames))
        if not self.classnames:
            raise ValueError("classnames: expected at least one, got none")
        if reserved := {"train", "val", "test"} & set(self.domains):
            raise ValueError(f"domains: {', '.join(sorted(reserved))} can't be a domain's name")
        if self.template.count("{}") != 1:
            raise ValueError(f"template: expected exactly one {{}}, got {self.template!r}")
        for name, split in self.splits().items():
            if name == "train" and not self.labelled and (split.labels == UNKNOWN).all():
                continue
            if len(split) and not 0 <= split.labels.min() <= split.labels.max() < self.num_classes:
                raise ValueError(
                    f"{name}: labels run from {split.labels.min()} to {split.labels.max()}, "
                    f"expected 0 to {self.num_classes - 1} ({self.num_classes} class names)"
                )

    @property
    def num_classes(self) -> int:
        return len(self.classnames)

    @property
    def labelled(self) -> bool:
        """Whether the labels of the training images are known."""
        return UNKNOWN not in self.train.labels

    def splits(self) -> dict[str, Split]:
        """Every split by name; domains by their own names."""
        return {"train": self.train, "val": self.val, "test": self.test, **self.domains}

    def restrict(self, classes: ClassSubset) -> Dataset:
        """The base half (first ceil(n/2) classes), the new half (the rest), or all of it.

        Labels are renumbered from 0, so each half is a closed label set ([CoOp]
        datasets/oxford_pets.py, base-to-new protocol). Training images without labels stay, all
        of them, in either half.
        """
        if classes not in CLASS_SUBSETS:
            raise ValueError(
                f"classes: expected one of {', '.join(CLASS_SUBSETS)}, got {classes!r}"
            )
        if classes == "all":
            return self
        half = (self.num_classes + 1) // 2
        first, last = (0, half) if classes == "base" else (half, self.num_classes)
        if first == last:
            raise ValueError(f"classes: {self.name} has {self.num_classes} class, so no new half")
        return replace(
            self,
            classnames=self.classnames[first:last],
            train=self.train.of_classes(first, last) if self.labelled else self.train,
            val=self.val.of_classes(first, last),
            test=self.test.of_classes(first, last),
            domains={name: split.of_classes(first, last) for name, split in self.domains.items()},
            few_shot_files=None,  # they are of all classes
        )

    def few_shot(self, shots: int, seed: int) -> Dataset:
        """``shots`` training images a class and min(shots, 4) validation images a class.

        Drawn as Dassl draws them (one generator seeded once, classes in order of first
        appearance, train before val), so a seed names the same images there and here. A class
        with fewer images gives all it has, with a warning; that no class has enough is an error.
        A subset that is stored for these shots and this seed is taken instead; what is drawn is
        stored where ``few_shot_files`` says how.
        """
        if shots < 1:
            raise ValueError(f"shots: expected at least 1 image a class, got {shots}")
        if not self.labelled:
            raise VlfastError(
                f"data.shots: the training images of {self.name} have no labels, so none can be "
                f"drawn by class; 0 takes all of them, got {shots}"
            )
        if not len(self.train):
            raise VlfastError(no_training_images(self))
        counts = np.bincount(self.train.labels, minlength=self.num_classes)
        if shots > counts.max():
            raise ValueError(
                f"shots: {shots} images a class asked for, but {self.name} has at most "
                f"{counts.max()} training images in a class"
            )
        short = [self.classnames[c] for c in np.flatnonzero(counts < shots)]
        if short:
            named = ", ".join(repr(name) for name in short[:3])
            warnings.warn(
                f"{self.name}: {len(short)} of {self.num_classes} classes have fewer than {shots} "
                f"images ({named}{', ...' if len(short) > 3 else ''}); they give all they have",
                stacklevel=2,
            )
        stored = self.few_shot_files and self.few_shot_files.read(self, shots, seed)
        if stored:
            train, val, origin = stored
        else:
            generator = random.Random(seed)
            train = _sample_per_class(self.train, shots, generator)
            val = _sample_per_class(self.val, min(shots, 4), generator)
            origin = "drawn"
            if self.few_shot_files:
                self.few_shot_files.write(self, shots, seed, train, val)
        return replace(self, train=train, val=val, few_shot_files=None, few_shot_from=origin)

    def fingerprint(self) -> str:
        """A hash of class names, image keys and labels of every split: equal hashes mean that two
        runs saw the same data. 16 hexadecimal digits."""
        digest = hashlib.sha256(json.dumps(self.classnames).encode())
        for name, split in self.splits().items():
            hash_split(digest, name, split)
        return digest.hexdigest()[:16]


def hash_split(digest: hashlib._Hash, name: str, split: Split) -> None:
    """Add the names and labels of a split's images."""
    digest.update(json.dumps([name, split.image_keys(), split.labels.tolist()]).encode())


def no_training_images(dataset: Dataset) -> str:
    """Why nothing can be trained on it."""
    return (
        f"data: {dataset.name} has no training images; train on another dataset, and test on this "
        f"one: `vlfast evaluate RUN --data {dataset.name}`"
    )


def _sample_per_class(split: Split, count: int, generator: random.Random) -> Split:
    positions_of: dict[int, list[int]] = {}
    for position, label in enumerate(split.labels.tolist()):
        positions_of.setdefault(label, []).append(position)
    chosen: list[int] = []
    for positions in positions_of.values():
        chosen += positions if len(positions) < count else generator.sample(positions, count)
    return split.at(chosen)
