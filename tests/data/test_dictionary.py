"""A user's dictionary of class names."""

import pytest

from vlfast.data.dictionary import read_dictionary
from vlfast.errors import VlfastError


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.txt", "cat\nGroße Katze, rot\ncricket (insect)\n"),
        ("names.txt", "\ufeffcat\r\nGroße Katze, rot\r\n  cricket (insect)"),
        ("names.csv", 'ClassName\ncat\n"Große Katze, rot"\ncricket (insect)\n'),
        ("names.CSV", '"ClassName"\r\n"cat"\r\n"Große Katze, rot"\r\n"cricket (insect)"\r\n'),
    ],
)
def test_files(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert read_dictionary(tmp_path / name) == ("cat", "Große Katze, rot", "cricket (insect)")


@pytest.mark.parametrize("ending", ["txt", "csv"])
def test_only_line_ends_part_names(tmp_path, ending):
    """Other separators stay what they are: a part of a name."""
    names = ("red\u2028fox", "a\x0bcat", "hen")
    path = tmp_path / f"names.{ending}"
    path.write_text("\n".join(("name", *names) if ending == "csv" else names), encoding="utf-8")
    assert read_dictionary(path) == names


def test_repeats_count_once(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\ncat\nCat\n")
    with pytest.warns(UserWarning, match=r"1 names twice.*'cat' \(lines 1 and 3\)"):
        assert read_dictionary(tmp_path / "names.txt") == ("cat", "dog", "Cat")


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.txt", b"cat\n\ndog\n", "line 2 of .* is blank"),
        ("a.txt", b"cat\n__\ndog\n", "line 2 of .* is blank"),
        ("a.csv", b"name\ncat\n\ndog\n", "line 3 of .* is blank"),
        ("a.csv", b"name,wordnet\ncat,n1\n", "line 1 of .* has 2 columns, expected one"),
        ("a.csv", b'name\n"cat\n', "is not CSV"),
        ("a.csv", b"name\ncat\n", "at least two names to choose from, .* holds 1"),
        ("a.txt", b"", "line 1 of .* is blank"),
        ("a.txt", b"caf\xe9\ndog\n", "is not UTF-8"),
    ],
)
def test_bad_files(tmp_path, name, text, match):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(VlfastError, match=match):
        read_dictionary(tmp_path / name)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.dictionary: there is no file"):
        read_dictionary(tmp_path / "names.txt")
