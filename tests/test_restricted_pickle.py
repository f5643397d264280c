"""Only what is admitted is built."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict

import pytest

from vlfast.errors import VlfastError
from vlfast.restricted_pickle import RestrictedUnpickler, admit_only

ORDERED = admit_only({("collections", "OrderedDict"): OrderedDict})


def read(pickled, admit=ORDERED):
    return RestrictedUnpickler(io.BytesIO(pickled), admit, "the file x").load()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_is_admitted_is_read(protocol):
    value = OrderedDict(a=[1, 2.5, "three", None, (True, b"bytes")])
    admit = admit_only(
        {
            ("collections", "OrderedDict"): OrderedDict,
            ("_codecs", "encode"): lambda text, encoding: text.encode("latin-1"),
        }
    )
    assert read(pickle.dumps(value, protocol), admit) == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_anything_else_is_refused_by_its_name(protocol):
    with pytest.raises(VlfastError, match="the file x asks for .*getcwd, which has no place"):
        read(pickle.dumps(os.getcwd, protocol))
    with pytest.raises(VlfastError, match=r"OrderedDict\.fromkeys, which has no place"):
        read(b"ccollections\nOrderedDict.fromkeys\n.")


def test_what_stands_for_a_name_is_given():
    built = read(pickle.dumps(OrderedDict(a=1)), admit_only({("collections", "OrderedDict"): dict}))
    assert type(built) is dict and built == {"a": 1}


def test_damaged_pickles_are_one_error():
    whole = pickle.dumps(OrderedDict(a=list(range(9))))
    for length in range(len(whole)):
        with pytest.raises(VlfastError, match="the file x is damaged or is no pickle"):
            read(whole[:length])
    with pytest.raises(VlfastError, match="is damaged or is no pickle"):
        read(b"no pickle at all")
