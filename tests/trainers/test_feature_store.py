"""Stored features: what is written, what is refused, and that training from them is the same."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vlfast
from tests.conftest import Squares, squares_dataset
from vlfast import cli
from vlfast.data.views import Views
from vlfast.errors import VlfastError
from vlfast.trainers.feature_store import FeatureStore, FeatureWriter, hash_of_weights
from vlfast.trainers.images import view_config

DATA = {"shots": 4, "views": 2}


def store(clip, path, **options):
    options = {**DATA, **options}
    return vlfast.store_features(
        path, model=clip, data=squares_dataset(), show_progress=False, **options
    )


def fit(clip, output, recipe="coop", **options):
    options = {"shots": 4, "epochs": 4, "batch_size": 8, "n_ctx": 3, "lr": 0.1, **options}
    return vlfast.fit(
        recipe,
        model=clip,
        data=squares_dataset(),
        output=output,
        show_progress=False,
        **options,
    )


@pytest.fixture(scope="module")
def stored(tiny_clip, tmp_path_factory):
    return store(tiny_clip, tmp_path_factory.mktemp("stores") / "squares")


def test_what_is_written(stored, tiny_clip):
    files = {"manifest.json", "images.json", "view-0001.safetensors", "view-0002.safetensors"}
    assert {path.name for path in stored.iterdir()} == files
    drawn = squares_dataset().few_shot(4, 1)
    for view in (1, 2):
        views = Views(drawn.train, view_config(tiny_clip), seed=1, epoch=view)
        pixels = torch.stack([views[i][0] for i in range(len(views))])
        expected = tiny_clip.encode_images(pixels, normalize=False)
        found = load_file(stored / f"view-{view:04}.safetensors")["frozen"]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    manifest = json.loads((stored / "manifest.json").read_text())
    assert manifest["data"]["fingerprint"] == drawn.fingerprint()
    assert manifest["model"]["weights"] == hash_of_weights(tiny_clip.model.visual)
    assert manifest["teacher"] is None and manifest["classnames"] == list(drawn.classnames)
    keys = json.loads((stored / "images.json").read_text())
    assert keys == [drawn.train.source.key(int(i)) for i in drawn.train.indices]


@pytest.mark.parametrize("classes", ["all", "base", "new"])
def test_training_from_the_store_is_training_from_images(tiny_clip, tmp_path, stored, classes):
    """A run on half of the classes reads the store of all of them."""
    images = fit(tiny_clip, tmp_path / "images", views=2, classes=classes)
    read = fit(tiny_clip, tmp_path / "read", features=str(stored), classes=classes)
    for ours, theirs in zip(read.folder.read_metrics(), images.folder.read_metrics(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["train_accuracy"] == theirs["train_accuracy"]
    a, b = (run.folder.read_tensors("last")[0]["context"] for run in (read, images))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert read.result["accuracy"] == images.result["accuracy"]
    config = read.folder.read_config()
    assert config.data.views == 2 and config.data.features == str(stored)


def test_all_training_images(tiny_clip, tmp_path):
    """shots=0, and a batch size that does not divide them."""
    path = store(tiny_clip, tmp_path / "store", shots=0)
    options = {"shots": 0, "batch_size": 7, "epochs": 3}
    images = fit(tiny_clip, tmp_path / "images", views=2, **options)
    read = fit(tiny_clip, tmp_path / "read", features=str(path), **options)
    losses = [[row["loss"] for row in run.folder.read_metrics()] for run in (read, images)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert read.result["data"]["images"]["train"] == 40


def test_from_the_command_line(tmp_path, capsys):
    """`vlfast features` takes the options of `vlfast train`, which trains from its folder."""
    data = ["--data", "glyphs/shapes", "--data.shots", "1", "--data.classes", "new"]
    folder = str(tmp_path / "store")
    assert cli.main(["features", *data, "--views", "1", "--output", folder, "--dtype", "fp16"]) == 0
    assert capsys.readouterr().out == f"features: {folder}\n"
    assert FeatureStore(folder).manifest["dtype"] == "fp16"
    train = ["train", *data, "--data.features", folder, "--recipe.epochs", "1"]
    assert cli.main([*train, "--output", str(tmp_path / "run")]) == 0
    assert cli.main([*train, "--seed", "2", "--output", str(tmp_path / "other")]) == 2
    assert "data seed is 1 there, 2 here" in capsys.readouterr().err
    assert cli.main(["features", *data, "--views", "1"]) == 2
    assert "--output: expected the folder" in capsys.readouterr().err
    assert cli.main(["features", *data, "--output", folder]) == 2
    assert "Say so with --views N" in capsys.readouterr().err


def test_without_augmentation_the_test_views_are_stored(tiny_clip, tmp_path):
    path = store(tiny_clip, tmp_path / "store", augment=False, views=None)
    images = fit(tiny_clip, tmp_path / "images", augment=False)
    read = fit(tiny_clip, tmp_path / "read", augment=False, features=str(path))
    losses = [[row["loss"] for row in run.folder.read_metrics()] for run in (read, images)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_no_training_image_is_loaded(tiny_clip, tmp_path, stored, monkeypatch):
    loaded = []

    def load(self, index, view=None, load=Squares.load):
        loaded.append(index)
        return load(self, index, view)

    monkeypatch.setattr(Squares, "load", load)
    fit(tiny_clip, tmp_path / "run", features=str(stored))
    assert loaded and min(loaded) >= 40  # validation and test images


def test_fewer_views_than_stored_are_the_first(tiny_clip, tmp_path, stored):
    one = fit(tiny_clip, tmp_path / "one", features=str(stored), views=1)
    images = fit(tiny_clip, tmp_path / "images", views=1)
    losses = [[row["loss"] for row in run.folder.read_metrics()] for run in (one, images)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_half_precision_on_disk(tiny_clip, tmp_path, stored):
    path = store(tiny_clip, tmp_path / "half", dtype="fp16")
    half = FeatureStore(path).read("frozen", 2, np.arange(20))
    full = FeatureStore(stored).read("frozen", 2, np.arange(20))
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=1e-3, atol=1e-3)


def test_bf16_is_stored_as_it_is_computed_in_training(tiny_clip, tmp_path):
    path = store(tiny_clip, tmp_path / "store", precision="bf16")
    options = {"precision": "bf16", "epochs": 2}
    images = fit(tiny_clip, tmp_path / "images", views=2, **options)
    read = fit(tiny_clip, tmp_path / "read", features=str(path), **options)
    losses = [[row["loss"] for row in run.folder.read_metrics()] for run in (read, images)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    with pytest.raises(VlfastError, match="data precision is 'bf16' there, 'fp32' here"):
        fit(tiny_clip, tmp_path / "other", features=str(path))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_chunks_do_not_matter(tiny_clip, tmp_path, monkeypatch, precision):
    whole = store(tiny_clip, tmp_path / "whole", views=1, precision=precision)
    monkeypatch.setattr("vlfast.features.IMAGES_AT_ONCE", 3)
    parts = store(tiny_clip, tmp_path / "parts", views=1, precision=precision)
    a, b = (FeatureStore(path).read("frozen", 1, np.arange(20)) for path in (whole, parts))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 if precision == "fp32" else 2e-2)


class Killed(BaseException):
    pass


def test_goes_on_after_a_kill(tiny_clip, tmp_path, monkeypatch, stored):
    loads = []

    def load(self, index, view=None, load=Squares.load):
        loads.append(index)
        if len(loads) == 30:  # in the second view
            raise Killed
        return load(self, index, view)

    monkeypatch.setattr(Squares, "load", load)
    path = tmp_path / "store"
    with pytest.raises(Killed):
        store(tiny_clip, path)
    assert not list(path.glob(".*.tmp")) and FeatureStore(path).views == 1
    first = (path / "view-0001.safetensors").stat()
    with pytest.raises(VlfastError, match="has 1 finished views, but this run needs 2"):
        fit(tiny_clip, tmp_path / "run", features=str(path), views=2)
    store(tiny_clip, path)
    assert len(loads) == 30 + 20
    assert (path / "view-0001.safetensors").stat().st_mtime_ns == first.st_mtime_ns
    for file in stored.iterdir():
        assert (path / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("options", [{}, {"augment": False}])
def test_a_store_without_a_finished_view_is_refused(tiny_clip, tmp_path, monkeypatch, options):
    """What is left where `vlfast features` was stopped in its first view."""

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(FeatureWriter, "write_view", stop)
    views = {"views": None if options else 2}
    with pytest.raises(KeyboardInterrupt):
        store(tiny_clip, tmp_path / "store", **views, **options)
    with pytest.raises(VlfastError, match="has 0 finished views, but this run needs 1"):
        fit(tiny_clip, tmp_path / "run", features=str(tmp_path / "store"), **options)
    assert not (tmp_path / "run").exists()


def test_more_views_are_added(tiny_clip, tmp_path, stored):
    path = store(tiny_clip, tmp_path / "store", views=1)
    assert FeatureStore(store(tiny_clip, path, views=3)).views == 3
    for name in ("view-0001.safetensors", "view-0002.safetensors"):
        assert (path / name).read_bytes() == (stored / name).read_bytes()


def flip(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["view-0002.safetensors", "images.json"])
def test_a_flipped_bit_is_found_and_made_good(tiny_clip, tmp_path, name, stored):
    path = store(tiny_clip, tmp_path / "store")
    flip(path / name)
    with pytest.raises(VlfastError, match=f"{name} is missing or damaged, its checksum"):
        fit(tiny_clip, tmp_path / "run", features=str(path))
    assert not (tmp_path / "run").exists()
    store(tiny_clip, path)
    assert (path / name).read_bytes() == (stored / name).read_bytes()
    (path / name).unlink()
    with pytest.raises(VlfastError, match=f"{name} is missing or damaged"):
        fit(tiny_clip, tmp_path / "run", features=str(path))


def other_clip(model):
    torch.manual_seed(9)
    changed = type(model)(
        embed_dim=32,
        vision_cfg={"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        text_cfg={"context_length": 24, "width": 32, "heads": 2, "layers": 3},
    )
    return vlfast.wrap_clip(changed, name="other")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seed": 2}, "data fingerprint is .*; data seed is 1 there, 2 here"),
        ({"shots": 2}, "data shots is 4 there, 2 here"),
        ({"views": 3}, "has 2 finished views, but this run needs 3"),
        ({"augment": False}, "data augment is True there, False here"),
        ({"precision": "bf16"}, "data precision is 'fp32' there, 'bf16' here"),
    ],
)
def test_another_runs_store_is_refused(tiny_clip, tmp_path, stored, options, match):
    with pytest.raises(VlfastError, match=rf"data\.features: {stored}.*{match}"):
        fit(tiny_clip, tmp_path / "run", features=str(stored), **options)
    assert not (tmp_path / "run").exists()


def test_another_models_store_is_refused(tiny_clip, tiny_model, tmp_path, stored):
    with pytest.raises(VlfastError, match=r"model weights is '\w+' \(tiny\) there, .* \(other\)"):
        fit(other_clip(tiny_model), tmp_path / "run", features=str(stored))
    renamed = vlfast.wrap_clip(tiny_model, name="tiny under another name")
    fit(renamed, tmp_path / "run", features=str(stored), epochs=1)


def test_writing_over_another_runs_store_is_refused(tiny_clip, tmp_path, stored):
    with pytest.raises(VlfastError, match="output: .* data seed is 1 there, 2 here"):
        store(tiny_clip, stored, seed=2)
    with pytest.raises(VlfastError, match="made with dtype fp32, got fp16"):
        store(tiny_clip, stored, dtype="fp16")
    (tmp_path / "photo.png").write_text("mine")
    with pytest.raises(VlfastError, match="no empty folder, and no folder of stored features"):
        store(tiny_clip, tmp_path)
    with pytest.raises(VlfastError, match="no empty folder"):
        store(tiny_clip, tmp_path / "photo.png")


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        (None, FileNotFoundError, "no folder of `vlfast features`, it has no manifest"),
        ("{", VlfastError, "manifest.json is damaged"),
        ("[]", VlfastError, "was not written by this version"),
        ('{"format": "vlfast-features-1"}', VlfastError, r"damaged \(data, model, classnames"),
    ],
)
def test_foreign_folders(tmp_path, text, error, match):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(error, match=match):
        FeatureStore(tmp_path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"views": None}, "data.views: how many views"),
        ({"views": 0}, "data.views: expected at least 1, got 0"),
        ({"augment": False}, "without data.augment every epoch sees the test views, got 2"),
        ({"dtype": "bf16"}, "dtype: expected fp32 or fp16, got 'bf16'"),
        ({"features": "elsewhere"}, "expected models to compute them with"),
    ],
)
def test_what_can_not_be_stored(tiny_clip, tmp_path, options, match):
    with pytest.raises(VlfastError, match=match):
        store(tiny_clip, tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()


def test_numbers_that_are_not_finite_are_not_kept(tiny_clip, tmp_path, monkeypatch):
    clip_type = type(tiny_clip)
    encode = clip_type.encode_images
    monkeypatch.setattr(clip_type, "encode_images", lambda *a, **k: 1e6 * encode(*a, **k))
    with pytest.raises(VlfastError, match=r"frozen features of view 1 are infinite or NaN in fp16"):
        store(tiny_clip, tmp_path / "store", dtype="fp16")
    assert FeatureStore(tmp_path / "store").views == 0


def test_images_of_another_draw_are_named(stored):
    with pytest.raises(VlfastError, match=r"lacks the features of \d+ of 40 training images"):
        FeatureStore(stored).rows_of(squares_dataset().train)


def test_resumed_runs_read_the_store_again(tiny_clip, tmp_path, stored, monkeypatch):
    from tests.trainers.test_fit import Killed as KilledInFit
    from tests.trainers.test_fit import kill_in_epoch

    whole = fit(tiny_clip, tmp_path / "whole", features=str(stored))
    kill_in_epoch(monkeypatch, 3)
    with pytest.raises(KilledInFit):
        fit(tiny_clip, tmp_path / "parts", features=str(stored))
    monkeypatch.undo()
    parts = vlfast.resume(
        tmp_path / "parts", clip=tiny_clip, dataset=squares_dataset(), show_progress=False
    )
    a, b = (run.folder.read_tensors("last")[0]["context"] for run in (whole, parts))
    assert torch.equal(a, b)
