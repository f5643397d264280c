import shutil

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from vlfast.clip import bundled
from vlfast.clip.bundled import BUNDLED, load_bundled
from vlfast.data.glyphs import IMAGE_SIZE, THEMES, load_theme
from vlfast.errors import UnknownNameError, VlfastError


@pytest.fixture(scope="module")
def models():
    return {name: load_bundled(name) for name in BUNDLED}


@pytest.fixture(scope="module")
def tokenizer():
    return SimpleTokenizer(context_length=32)


def pictures_of(split, count, model):
    """``count`` images of a split, spread over it, normalised as the model asks; their labels."""
    positions = np.linspace(0, len(split) - 1, count).astype(int)
    indices = split.indices[positions].tolist()
    preprocess = open_clip.get_model_preprocess_cfg(model)
    mean, std = (torch.tensor(preprocess[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = split.source.load_batch(indices, [None] * count).float() / 255
    return (images - mean) / std, torch.from_numpy(split.labels[positions])


@torch.no_grad()
def zero_shot(model, tokenizer, data, split, count=200):
    images, labels = pictures_of(split, count, model)
    captions = tokenizer([data.template.format(name) for name in data.classnames])
    logits = model.encode_image(images, normalize=True) @ model.encode_text(captions, True).T
    return float((logits.argmax(-1) == labels).float().mean())


@pytest.fixture(scope="module")
def accuracy(models, tokenizer):
    """Zero-shot accuracy of each model, by theme and split."""
    scores = {name: {} for name in BUNDLED}
    for theme in ("nature", "places", "shapes"):
        data = load_theme(theme)
        for part in ("test", "fontawesome"):
            for name, (model, _) in models.items():
                split = data.splits()[part]
                scores[name][theme, part] = zero_shot(model, tokenizer, data, split)
    return scores


@pytest.mark.parametrize("name", BUNDLED)
def test_zero_shot_on_unseen_styles_is_far_above_chance(accuracy, name):
    for (theme, part), score in accuracy[name].items():
        assert score > 6 / load_theme(theme).num_classes, (theme, part)


def test_teacher_is_clearly_above_the_student(accuracy):
    student, teacher = (np.mean(list(accuracy[name].values())) for name in BUNDLED)
    assert teacher > student + 0.04


@pytest.mark.parametrize("name", BUNDLED)
def test_models_are_frozen_open_clip_models_in_fp32(models, name):
    model, known = models[name]
    assert isinstance(model, open_clip.CLIP)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.context_length == 32
    assert known.shape == (49408,) and known.dtype == torch.bool


def test_teacher_has_an_embedding_width_of_its_own(models):
    widths = {name: model.text_projection.shape for name, (model, _) in models.items()}
    assert len(set(widths.values())) == len(BUNDLED)


@pytest.mark.parametrize("name", BUNDLED)
def test_known_tokens_are_the_rows_that_are_not_zero(models, name):
    model, known = models[name]
    assert torch.equal(model.token_embedding.weight.abs().sum(1) > 0, known)
    assert 1000 < int(known.sum()) < 10000


@pytest.mark.parametrize("name", BUNDLED)
def test_every_word_of_the_themes_is_known(models, tokenizer, name):
    known = models[name][1]
    for theme in THEMES:
        data = load_theme(theme)
        for text in (*data.classnames, data.template.format("cloud"), "a photo of a cloud."):
            assert known[tokenizer.encode(text)].all(), text
    assert known[[tokenizer.sot_token_id, tokenizer.eot_token_id]].all()


@pytest.mark.parametrize("name", BUNDLED)
def test_preprocessing_travels_with_the_model(models, name):
    preprocess = open_clip.get_model_preprocess_cfg(models[name][0])
    size = preprocess["size"]
    assert (size if isinstance(size, int) else size[0]) == IMAGE_SIZE
    assert len(preprocess["mean"]) == len(preprocess["std"]) == 3
    assert tuple(preprocess["mean"]) != open_clip.OPENAI_DATASET_MEAN


@pytest.mark.parametrize("name", BUNDLED)
def test_style_words_move_the_text_features(models, tokenizer, name):
    model, _ = models[name]
    captions = tokenizer(["a filled icon of a cloud.", "a thin outline icon of a cloud."])
    with torch.no_grad():
        features = model.encode_text(captions, normalize=True)
    assert float(features[0] @ features[1]) < 0.995


def test_unknown_name():
    with pytest.raises(UnknownNameError, match="unknown bundled model 'ViT-B-32'"):
        load_bundled("ViT-B-32")


@pytest.mark.parametrize("damage", ["missing weights", "truncated", "missing config", "bad config"])
def test_damaged_files_give_one_clear_error(tmp_path, damage):
    name = BUNDLED[0]
    for suffix in (".json", ".safetensors"):
        shutil.copy(bundled._FOLDER / f"{name}{suffix}", tmp_path)
    weights, config = tmp_path / f"{name}.safetensors", tmp_path / f"{name}.json"
    if damage == "missing weights":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "missing config":
        config.unlink()
    else:
        config.write_text(config.read_text()[:100])
    with pytest.raises(VlfastError, match=f"could not read {name} from .*install vlfast again"):
        load_bundled(name, tmp_path)


def test_the_card_states_how_the_models_were_made():
    card = (bundled._FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    for stated in ("Seed", "Command", "Held out entirely", "zero-shot, test", "licence", "seconds"):
        assert stated in card
