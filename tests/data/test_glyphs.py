import importlib.util
import os
from collections import Counter

import numpy as np
import pytest
import torch

from vlfast.data.glyphs import (
    IMAGE_SIZE,
    NUM_UNIFORMS,
    THEMES,
    fonts,
    load_theme,
    render,
    themes,
)
from vlfast.errors import UnknownNameError, VlfastError


@pytest.fixture(scope="module")
def nature():
    return load_theme("nature")


def glyphs_of(split):
    return [split.source.glyph(int(i)) for i in split.indices]


def drawings_of(split):
    return {(glyph.family, glyph.drawing) for glyph in glyphs_of(split)}


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("theme", THEMES)
def test_theme_is_a_usable_task(theme):
    data = load_theme(theme)
    assert data.name == f"glyphs/{theme}"
    assert data.num_classes >= 30
    for part in ("train", "val", "test"):
        count = np.bincount(data.splits()[part].labels, minlength=data.num_classes)
        assert count.min() == count.max() >= (16 if part == "train" else 8)
    for domain in data.domains.values():
        assert len(set(domain.labels.tolist())) >= data.num_classes / 4
    assert all(name == name.lower() and name.replace(" ", "").isalpha() for name in data.classnames)


@pytest.mark.parametrize("theme", THEMES)
def test_no_drawing_is_in_two_splits(theme):
    splits = load_theme(theme).splits()
    for one in splits:
        for other in splits:
            if one < other:
                assert not drawings_of(splits[one]) & drawings_of(splits[other]), (one, other)


def test_no_mask_is_in_training_and_elsewhere(nature):
    def masks(split):
        source = split.source
        return {source._masks[source._images[int(i)][0]].numpy().tobytes() for i in split.indices}

    training = masks(nature.train)
    for part in ("val", "test", "remix", "fontawesome"):
        assert not training & masks(nature.splits()[part]), part


def test_styles_of_training_and_test_differ(nature):
    train = Counter(glyph.family for glyph in glyphs_of(nature.train))
    test = Counter(glyph.family for glyph in glyphs_of(nature.test))
    assert set(train) == {"phosphor", "bootstrap"}
    assert test["lucide"] > 0.8 * sum(test.values())
    for family, split in nature.domains.items():
        assert {glyph.family for glyph in glyphs_of(split)} == {family}


def test_pretraining_never_sees_the_families_of_the_themes():
    pretraining = {font.family for font in fonts.PRETRAINING_FONTS}
    assert not pretraining & {font.family for font in fonts.UNSEEN_FONTS}
    assert {"phosphor", "bootstrap", "lucide", "remix", "fontawesome"} == {
        font.family for font in fonts.UNSEEN_FONTS
    }


def test_loading_twice_gives_the_same_data(nature):
    again = load_theme("nature")
    assert again.fingerprint() == nature.fingerprint()
    assert again.classnames == nature.classnames
    for view in (None, 3):
        one, other = nature.train.image(5, view), again.train.image(5, view)
        assert (pixels(one) == pixels(other)).all()


def test_views_differ_and_are_repeatable(nature):
    canonical, one, other = (nature.train.image(0, view) for view in (None, 0, 1))
    assert canonical.mode == "RGB" and canonical.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert np.abs(pixels(one) - pixels(other)).mean() > 5
    assert np.abs(pixels(one) - pixels(canonical)).mean() > 5
    assert (pixels(nature.train.image(0, 1)) == pixels(other)).all()


def test_batches_hold_what_single_images_are(nature):
    source = nature.train.source
    batch = source.load_batch([3, 0, 3], [None, 7, 8])
    for row, (index, view) in zip(batch, [(3, None), (0, 7), (3, 8)], strict=True):
        single = pixels(source.load(index, view))
        # vectorised loops may round the last bit of a float elsewhere
        assert np.abs(row.permute(1, 2, 0).numpy().astype(int) - single).max() <= 1


def test_base_and_new_halves_divide_the_classes(nature):
    base, new = nature.restrict("base"), nature.restrict("new")
    assert base.classnames + new.classnames == nature.classnames
    assert 0 <= base.num_classes - new.num_classes <= 1
    assert nature.classnames != tuple(sorted(nature.classnames))
    assert len(base.test) + len(new.test) == len(nature.test)
    assert set(base.domains) == {"remix", "fontawesome"}


def test_few_shot_draws_sixteen_of_every_class(nature):
    few = nature.few_shot(16, seed=1)
    assert np.bincount(few.train.labels).tolist() == [16] * nature.num_classes
    assert np.bincount(few.val.labels).tolist() == [4] * nature.num_classes
    assert few.fingerprint() == nature.few_shot(16, seed=1).fingerprint()
    assert few.fingerprint() != nature.few_shot(16, seed=2).fingerprint()


def test_no_brands():
    brands = {"github", "twitter", "android", "apple-logo", "whatsapp", "facebook", "bluetooth"}
    drawings = {glyph.drawing for glyph in fonts.read_glyphs(fonts.UNSEEN_FONTS)}
    assert not brands & drawings
    assert not any(drawing.endswith("-logo") for drawing in drawings)


def test_names_become_human_words():
    assert fonts.human_words("shopping-cart-2") == ("shopping", "cart")
    assert fonts.human_words("weather-sunny") == ("sunny",)
    assert fonts.human_words("house-simple") == ("house",)


def test_render_is_a_function_of_its_rows():
    masks = torch.zeros(4, 48, 48, dtype=torch.uint8)
    masks[:, 12:36, 20:28] = 255
    uniforms = torch.rand(4, NUM_UNIFORMS, generator=torch.Generator().manual_seed(0))
    pictures = render(masks, uniforms)
    assert pictures.shape == (4, 3, 48, 48) and pictures.dtype == torch.uint8
    assert torch.equal(pictures, render(masks, uniforms))
    clean = render(masks, uniforms, strength=0.0).float()
    inside, outside = clean[:, :, 18:30, 22:26].mean((2, 3)), clean[:, :, :8, :8].mean((2, 3))
    assert ((inside - outside).abs().amax(1) > 40).all()


@pytest.mark.parametrize(
    ("masks", "uniforms", "named"),
    [((2, 32, 32), (2, NUM_UNIFORMS), "masks"), ((2, 48, 48), (3, NUM_UNIFORMS), "uniforms")],
)
def test_render_refuses_other_shapes(masks, uniforms, named):
    with pytest.raises(ValueError, match=rf"^{named}: expected"):
        render(torch.zeros(masks, dtype=torch.uint8), torch.zeros(uniforms))


def test_unknown_theme_is_named():
    with pytest.raises(UnknownNameError, match="unknown theme 'brands'"):
        load_theme("brands")


def test_missing_fonts_say_what_to_install(monkeypatch):
    found = importlib.util.find_spec

    def hidden(name, *rest):
        return None if name in ("tkinter_icons_bs", "qtawesome") else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    for cached in (themes.theme_classes, themes._unseen_glyphs, fonts.read_glyphs):
        cached.cache_clear()
    with pytest.raises(VlfastError, match=r'pip install "vlfast\[demo\]"'):
        load_theme("nature")


@pytest.fixture
def few_glyphs():
    return fonts.read_glyphs(fonts.UNSEEN_FONTS[-1:])[:5]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "another shape"])
def test_a_corrupt_cache_is_drawn_again(tmp_path, few_glyphs, damage):
    masks = fonts.load_masks(few_glyphs, "few", tmp_path)
    (path,) = (tmp_path / "glyphs").iterdir()
    content = path.read_bytes()
    if damage == "another shape":
        with open(path, "wb") as file:
            np.savez(file, masks=masks[:2])
    else:
        damaged = {
            "truncated": content[: len(content) // 2],
            "garbage": b"icons" * 50,
            "empty": b"",
        }
        path.write_bytes(damaged[damage])
    again = fonts.load_masks(few_glyphs, "few", tmp_path)
    assert (again == masks).all() and again.max() == 255
    assert os.listdir(tmp_path / "glyphs") == [path.name]
    with np.load(path, allow_pickle=False) as stored:
        assert (stored["masks"] == masks).all()


def test_the_cache_is_read_when_it_is_sound(tmp_path, few_glyphs, monkeypatch):
    masks = fonts.load_masks(few_glyphs, "few", tmp_path)
    monkeypatch.setattr(fonts, "_draw_masks", lambda glyphs: pytest.fail("drew again"))
    assert (fonts.load_masks(few_glyphs, "few", tmp_path) == masks).all()


def test_other_font_versions_have_a_cache_of_their_own(tmp_path, few_glyphs, monkeypatch):
    fonts.load_masks(few_glyphs, "few", tmp_path)
    monkeypatch.setattr(fonts, "installed_version", lambda font: "0.0")
    fonts.load_masks(few_glyphs, "few", tmp_path)
    assert len(os.listdir(tmp_path / "glyphs")) == 2


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("VLFAST_CACHE", str(tmp_path))
    assert fonts.default_cache_dir() == tmp_path
