"""Splits, base and new halves, and the few-shot draw."""

import random

import numpy as np
import pytest

from tests.conftest import Squares, squares_dataset
from vlfast.data.dataset import Dataset, Split


def dataset(labels, classes=5, **changes) -> Dataset:
    source = Squares(len(labels))
    train = Split(source, np.arange(len(labels)), np.array(labels))
    given = {
        "name": "toy",
        "classnames": tuple(f"class {c}" for c in range(classes)),
        "template": "a {}.",
        "train": train,
        "val": train,
        "test": train,
        **changes,
    }
    return Dataset(**given)


def test_base_is_the_first_half_rounded_up():
    toy = dataset([0, 1, 2, 3, 4, 4, 3])
    base, new = toy.restrict("base"), toy.restrict("new")
    assert base.classnames == ("class 0", "class 1", "class 2")
    assert new.classnames == ("class 3", "class 4")
    assert base.train.labels.tolist() == [0, 1, 2]
    assert new.train.labels.tolist() == [0, 1, 1, 0]
    assert new.train.indices.tolist() == [3, 4, 5, 6]
    assert toy.restrict("all") is toy


def test_domains_are_restricted_too():
    toy = dataset([0, 1, 2, 3, 4])
    toy = dataset([0, 1, 2, 3, 4], domains={"sketch": toy.test})
    assert toy.restrict("new").domains["sketch"].labels.tolist() == [0, 1]


def test_one_class_has_no_new_half():
    with pytest.raises(ValueError, match="no new half"):
        dataset([0, 0], classes=1).restrict("new")


def test_few_shot_draws_as_dassl_does():
    """One generator for train then val; classes in order of first appearance."""
    labels = [2, 0, 1, 2, 0, 1, 0, 1, 2, 2, 0, 1] * 2
    drawn = dataset(labels, classes=3).few_shot(3, seed=7)
    generator = random.Random(7)
    groups = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    train = [i for label in (2, 0, 1) for i in generator.sample(groups[label], 3)]
    val = [i for label in (2, 0, 1) for i in generator.sample(groups[label], 3)]
    assert drawn.train.indices.tolist() == train
    assert drawn.val.indices.tolist() == val
    assert len(drawn.test) == len(labels)


def test_a_class_with_exactly_as_many_images_still_draws():
    """Dassl samples at equality too, so later classes see the generator where Dassl has it."""
    labels = [0] * 3 + [1] * 6
    drawn = dataset(labels, classes=2).few_shot(3, seed=5)
    generator = random.Random(5)
    first = generator.sample([0, 1, 2], 3)
    assert drawn.train.indices.tolist() == first + generator.sample([3, 4, 5, 6, 7, 8], 3)


def test_validation_takes_at_most_four():
    drawn = dataset([0, 1] * 20, classes=2).few_shot(16, seed=1)
    assert np.bincount(drawn.train.labels).tolist() == [16, 16]
    assert np.bincount(drawn.val.labels).tolist() == [4, 4]


def test_other_seed_other_images():
    toy = dataset([0, 1] * 20, classes=2)
    assert toy.few_shot(4, 1).train.indices.tolist() == toy.few_shot(4, 1).train.indices.tolist()
    assert toy.few_shot(4, 1).train.indices.tolist() != toy.few_shot(4, 2).train.indices.tolist()


def test_a_short_class_gives_all_it_has_with_a_warning():
    with pytest.warns(UserWarning, match="1 of 2 classes have fewer than 3.*'class 1'"):
        drawn = dataset([0, 0, 0, 0, 1, 1], classes=2).few_shot(3, seed=1)
    assert np.bincount(drawn.train.labels).tolist() == [3, 2]


@pytest.mark.parametrize(
    ("shots", "match"),
    [(0, "at least 1"), (9, "9 images a class asked for, but toy has at most 4")],
)
def test_shots_that_can_not_be_had(shots, match):
    with pytest.raises(ValueError, match=match):
        dataset([0, 0, 0, 0, 1, 1], classes=2).few_shot(shots, seed=1)


def test_fingerprint_follows_images_labels_and_names():
    toy = dataset([0, 1, 2, 3, 4])
    assert toy.fingerprint() == dataset([0, 1, 2, 3, 4]).fingerprint()
    assert len(toy.fingerprint()) == 16
    others = [
        dataset([0, 1, 2, 4, 3]),
        dataset([0, 1, 2, 3, 4], classnames=("a", "b", "c", "d", "e")),
        dataset([0, 1, 2, 3, 4], val=toy.train.at([0])),
    ]
    assert len({d.fingerprint() for d in [toy, *others]}) == 4


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"template": "a photo."}, r"template: expected exactly one \{\}"),
        ({"classnames": ()}, "classnames: expected at least one"),
        ({"domains": {"test": None}}, "domains: test can't be a domain's name"),
        ({"classnames": ("a", "b")}, r"train: labels run from 0 to 4, expected 0 to 1"),
    ],
)
def test_bad_dataset(changes, match):
    with pytest.raises(ValueError, match=match):
        dataset([0, 1, 2, 3, 4], **changes)


def test_two_classes_may_share_a_name():
    """ImageNet's names hold two of "missile" and two of "sunglasses"."""
    assert dataset([0, 1, 2, 3, 4], classnames=("a", "b", "a", "d", "e")).num_classes == 5


def test_labels_for_every_image():
    with pytest.raises(ValueError, match="one label an image"):
        Split(Squares(3), np.arange(3), np.zeros(2))


def test_unknown_subset():
    with pytest.raises(ValueError, match="classes: expected one of all, base, new, got 'novel'"):
        dataset([0, 1, 2, 3, 4]).restrict("novel")


def test_the_fingerprint_does_not_change_between_versions():
    """Results record it."""
    assert squares_dataset().fingerprint() == "e9fdf5e6ade33e9b"
