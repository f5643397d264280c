"""Names in one block."""

import pickle

import pytest

from vlfast.data.listed import Listed, PackedNames

NAMES = ["a/1.jpg", "", "b/é ü.jpg", "b/\udc80.jpg", "日本.png"]


def test_it_is_the_sequence_that_it_was_made_of():
    packed = PackedNames(iter(NAMES))
    assert len(packed) == 5 and list(packed) == NAMES
    assert [packed[i] for i in range(-5, 5)] == NAMES * 2
    assert "日本.png" in packed and packed.index("") == 1
    assert list(pickle.loads(pickle.dumps(packed))) == NAMES
    assert list(PackedNames([])) == []


@pytest.mark.parametrize("index", [5, -6])
def test_beyond_its_ends(index):
    with pytest.raises(IndexError, match="there are 5"):
        PackedNames(NAMES)[index]


def test_the_first_image_of_every_class():
    assert Listed.of(NAMES, [2, 0, 2, 0, 7]).one_per_class() == ["", "a/1.jpg", "日本.png"]
    assert Listed.of([]).one_per_class() == []
