"""Kept image features are those that encoding would give, or they are not used."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import make_tiny_model, squares_dataset
from tests.evaluation.test_evaluate import Turned
from vlfast.clip.models import wrap_clip
from vlfast.data.dataset import Split
from vlfast.data.folder import FileImages
from vlfast.evaluation.kept_features import KeptFeatures
from vlfast.ops.backends import reference_only
from vlfast.prompts import HardPrompt
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.trainers.images import encode_split


@pytest.fixture
def classifier(tiny_clip):
    data = squares_dataset()
    return PromptedClassifier(tiny_clip, HardPrompt(), data.classnames, data.template)


@pytest.fixture
def counted(monkeypatch):
    """How many images were encoded, a number a call."""
    calls = []

    def encode(classifier, split, **options):
        calls.append(len(split))
        return encode_split(classifier, split, **options)

    monkeypatch.setattr("vlfast.evaluation.kept_features.encode_split", encode)
    return calls


def test_another_process_reads_the_same_bits(classifier, tmp_path, counted):
    test = squares_dataset().test
    expected = encode_split(classifier, test)
    for _ in range(2):
        found = KeptFeatures(tmp_path / "f").encode(classifier, test)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert counted == [40]
    (file,) = (tmp_path / "f").iterdir()
    assert file.suffix == ".safetensors"


def test_other_images_orders_and_models_have_files_of_their_own(classifier, tmp_path, counted):
    test = squares_dataset().test
    kept = KeptFeatures(tmp_path)
    kept.encode(classifier, test)
    kept.encode(classifier, test.at(range(39, -1, -1)))
    kept.encode(classifier, test.of_classes(0, 3))
    clip = wrap_clip(make_tiny_model(), name="tiny")
    with torch.no_grad():
        next(clip.model.visual.parameters()).add_(1e-3)
    other = PromptedClassifier(clip, HardPrompt(), classifier.classnames, classifier.template)
    kept.encode(other, test)
    assert counted == [40, 40, 24, 40] and len(list(tmp_path.iterdir())) == 4
    # Labels are the split's, whatever was kept of its images.
    relabelled = Split(test.source, test.indices, (test.labels + 1) % 5)
    assert torch.equal(kept.encode(classifier, relabelled)[1], torch.from_numpy(relabelled.labels))
    assert len(counted) == 4


def test_precision_and_reference_have_files_of_their_own(classifier, tmp_path, counted):
    test, kept = squares_dataset().test, KeptFeatures(tmp_path)
    exact = kept.encode(classifier, test)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = kept.encode(classifier, test)[0]
    with reference_only():
        kept.encode(classifier, test)
    assert counted == [40, 40, 40] and len(list(tmp_path.iterdir())) == 3
    assert not torch.equal(exact, rounded)
    assert torch.equal(KeptFeatures(tmp_path).encode(classifier, test)[0], exact)
    assert len(counted) == 3


def test_prompts_in_the_image_tower_keep_nothing(classifier, tmp_path):
    turned = PromptedClassifier(
        classifier.clip, Turned(2.0), classifier.classnames, classifier.template
    )
    KeptFeatures(tmp_path).encode(turned, squares_dataset().test)
    assert not list(tmp_path.iterdir())


def test_the_same_names_elsewhere_are_other_images(classifier, tmp_path, counted):
    found = []
    for folder, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (32, 32), colour).save(tmp_path / folder / "0.png")
        split = Split(FileImages(tmp_path / folder, ["0.png"]), np.arange(1), np.zeros(1))
        found.append(KeptFeatures(tmp_path / "f").encode(classifier, split)[0])
    assert not torch.equal(*found) and counted == [1, 1]


def test_a_file_that_was_changed_is_read_again(classifier, tmp_path, counted):
    names = [f"{i}.png" for i in range(40)]
    for name in names:
        Image.new("RGB", (32, 32), "red").save(tmp_path / name)
    split = Split(FileImages(tmp_path, names), np.arange(40), np.zeros(40))
    first, _ = KeptFeatures(tmp_path / "f").encode(classifier, split, workers=0)
    Image.new("RGB", (32, 32), "blue").save(tmp_path / names[1])
    second, _ = KeptFeatures(tmp_path / "f").encode(classifier, split, workers=0)
    assert counted == [40, 40]
    assert [i for i in range(40) if not torch.equal(first[i], second[i])] == [1]


@pytest.mark.parametrize("damage", [b"", b"not tensors", None])
def test_a_damaged_file_is_made_anew(classifier, tmp_path, counted, damage):
    test = squares_dataset().test
    expected, _ = KeptFeatures(tmp_path).encode(classifier, test)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100] if damage is None else damage)
    for _ in range(2):
        assert torch.equal(KeptFeatures(tmp_path).encode(classifier, test)[0], expected)
    assert counted == [40, 40]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_can_not_be_written_to(classifier, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.warns(UserWarning, match="data.test_features: can't write"):
        KeptFeatures(tmp_path / "f").encode(classifier, squares_dataset().test)


def test_a_file_where_the_folder_should_be(classifier, tmp_path):
    (tmp_path / "f").write_text("")
    test = squares_dataset().test
    with pytest.warns(UserWarning, match="data.test_features: can't write"):
        found, _ = KeptFeatures(tmp_path / "f").encode(classifier, test)
    assert torch.equal(found, encode_split(classifier, test)[0])


def test_several_write_at_once(classifier, tmp_path):
    test = squares_dataset(test=400).test
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda _: KeptFeatures(tmp_path).encode(classifier, test)[0], range(4))
        )
    assert all(torch.equal(features, found[0]) for features in found)
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]
