"""Template pools."""

import pytest

from vlfast.data.templates import (
    IMAGENET_60,
    NOISY,
    VARIED,
    kgcoop_template,
    own_template,
    prograd_template,
    read_templates,
    template_pool,
)
from vlfast.errors import VlfastError


def test_templates_of_datasets():
    assert own_template("oxford_pets", "x {}") == "a photo of a {}, a type of pet."
    assert own_template("mine", "x {}") == "x {}"
    assert own_template("dtd", "x {}") == "{} texture."
    assert kgcoop_template("dtd", "x {}") == "a photo of a {}, a type of texture."
    assert kgcoop_template("food101", "x {}") == "a photo of {}, a type of food."
    assert prograd_template("OxfordPets", "x {}") == "a type of pet, a photo of a {}."
    assert prograd_template("eurosat", "x {}") == "a centered satellite photo of {}."
    assert prograd_template("mine", "x {}") == "x {}"


def test_pools_of_the_paper():
    """[MoPD] trainers/mopd_templates.py, three nouns by four forms."""
    pets = template_pool("dataset", "oxford_pets", "")
    assert len(pets) == 12 and pets[0] == "a photo of a {}, a type of pet."
    assert "an image of a pet, labeled as {}." in pets
    eurosat = template_pool("dataset", "eurosat", "")
    assert "a centered satellite picture, categorized as {}." in eurosat
    imagenet = template_pool("dataset", "imagenet", "a photo of a {}.")
    assert imagenet[3] == "a photo, classified as {}."


@pytest.mark.parametrize(
    ("dataset", "template"),
    [("mine", "a photo of a {}."), ("mine", "a {} square."), ("mine", "an image of {}, blurred.")],
)
def test_pool_of_another_dataset_begins_with_its_own(dataset, template):
    pool = template_pool("dataset", dataset, template)
    assert pool[0] == template and len(set(pool)) == 12


def test_every_template_has_one_name():
    for pool in (VARIED, NOISY, IMAGENET_60, template_pool("dataset", "glyphs/tools", "{}.")):
        assert all(template.count("{}") == 1 for template in pool)
        assert len(set(pool)) == len(pool)
    assert [len(pool) for pool in (VARIED, NOISY, IMAGENET_60)] == [36, 12, 60]


def test_bundled_models_know_the_words_of_their_pool():
    from vlfast.clip.models import load_clip

    clip = load_clip("glyphs-student")
    for template in template_pool("dataset", "glyphs/tools", "an icon of a {}."):
        assert not clip.unknown_words(template.replace("{}", ""))


def test_file(tmp_path):
    file = tmp_path / "pool.txt"
    file.write_text("\ufeffa {}.\r\n\r\nthe {}, große Fläche.\n", encoding="utf-8")
    assert read_templates(file) == ("a {}.", "the {}, große Fläche.")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"a {}.\nno name\n", "line 2 of .*: expected exactly one {}, got 'no name'"),
        (b"{} and {}\n", "line 1 of"),
        (b"{name}\n", "line 1 of"),
        (b"\n \n", "holds no template"),
        (b"\xff\xfe{}", "is not UTF-8"),
    ],
)
def test_bad_file(tmp_path, text, match):
    (tmp_path / "pool.txt").write_bytes(text)
    with pytest.raises(VlfastError, match=match):
        read_templates(tmp_path / "pool.txt")
