"""Images without labels: what is read, and what trains on them."""

import json
from dataclasses import replace

import numpy as np
import pytest

import vlfast
from tests.conftest import squares_dataset
from tests.data.image_files import write_image
from vlfast.data.catalog import load_dataset
from vlfast.data.dataset import UNKNOWN, Split
from vlfast.data.dictionary import read_dictionary
from vlfast.data.folder import load_folder
from vlfast.data.unlabelled import load_unlabelled
from vlfast.errors import VlfastError
from vlfast.features import store_features
from vlfast.run import resolve_given, resume, train

NAMES = ("hammer", "key", "wrench")


@pytest.fixture
def root(tmp_path):
    images = tmp_path / "images"
    for i in range(6):
        write_image(images / ("deep/er" if i % 2 else "") / f"{i}.png", seed=i)
    write_image(images / ".thumbnails" / "0.png")
    (images / "notes.txt").write_text("not an image")
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    return tmp_path


def options(root, recipe, **data):
    return {
        "recipe": recipe,
        "model": "glyphs-student",
        "teacher": "glyphs-teacher",
        "data": {
            "name": "unlabelled",
            "root": str(root / "images"),
            "classnames": str(root / "names.txt"),
            "workers": 0,
            **data,
        },
        "epochs": 2,
        "batch_size": 4,
        "show_progress": False,
    }


def test_a_folder(root):
    data = load_dataset("unlabelled", str(root / "images"), str(root / "names.txt"))
    assert data.train.image_keys() == [
        "0.png",
        "2.png",
        "4.png",
        *(f"deep/er/{i}.png" for i in (1, 3, 5)),
    ]
    assert data.train.labels.tolist() == [UNKNOWN] * 6 == [-1] * 6
    assert not data.labelled
    assert data.classnames == NAMES
    assert len(data.val) == len(data.test) == 0
    assert data.restrict("new").classnames == ("wrench",)
    assert len(data.restrict("new").train) == 6


def test_paths_below_the_home_folder(root, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = load_dataset("unlabelled", "~/images", "~/names.txt")
    assert data.classnames == NAMES
    assert data.train.image(0).size == (36, 40)
    assert read_dictionary("~/names.txt") == NAMES


def test_links_to_folders(root):
    write_image(root / "elsewhere" / "x.png")
    (root / "images" / "linked").symlink_to(root / "elsewhere")
    (root / "images" / "deep" / "loop").symlink_to(root / "images")
    keys = load_unlabelled(root / "images", NAMES).train.image_keys()
    assert len(keys) == 7 and "linked/x.png" in keys


def test_a_list(root):
    file = root / "list.txt"
    lines = ["images/4.png", "", f"{root}/images/0.png", "images/4.png", "images/deep/er/1.png"]
    file.write_text("\n".join(lines))
    data = load_unlabelled(file, NAMES)
    assert data.train.image_keys() == [
        "images/4.png",
        f"{root}/images/0.png",
        "images/deep/er/1.png",
    ]
    assert data.train.image(1).size == (36, 40)


def test_what_is_wrong_is_named(root):
    with pytest.raises(VlfastError, match=r"data\.classnames: images without labels need class na"):
        load_dataset("unlabelled", str(root / "images"))
    with pytest.raises(FileNotFoundError, match="there is no folder or list of images"):
        load_unlabelled(root / "gone", NAMES)
    (root / "empty").mkdir()
    with pytest.raises(VlfastError, match="no images under"):
        load_unlabelled(root / "empty", NAMES)
    (root / "list.txt").write_text("images/0.png\nimages/gone.png\n")
    with pytest.raises(VlfastError, match=r"line 2 of .*list\.txt: there is no image 'images/gone"):
        load_unlabelled(root / "list.txt", NAMES)
    with pytest.raises(VlfastError, match="is not UTF-8"):
        load_unlabelled(root / "images" / "0.png", NAMES)
    with pytest.raises(FileNotFoundError, match=r"data\.classnames: there is no file"):
        load_dataset("unlabelled", str(root / "images"), str(root / "gone.txt"))


def test_no_images_are_drawn_by_class(root):
    data = load_unlabelled(root / "images", NAMES)
    with pytest.raises(VlfastError, match=r"data\.shots: the training images .* have no labels"):
        data.few_shot(2, seed=1)


def test_only_training_images_may_be_without_labels():
    data = squares_dataset()
    unknown = Split(data.test.source, data.test.indices, np.full(len(data.test), UNKNOWN))
    for name in ("val", "test"):
        with pytest.raises(ValueError, match=f"{name}: labels run from -1"):
            replace(data, **{name: unknown})
    some = np.where(np.arange(len(data.train)) % 2, data.train.labels, UNKNOWN)
    mixed = Split(data.train.source, data.train.indices, some)
    with pytest.raises(ValueError, match="train: labels run from -1 to 4"):
        replace(data, train=mixed)


@pytest.mark.parametrize("recipe", ["kdpl", "promptkd"])
def test_training(root, recipe):
    run = vlfast.fit(**options(root, recipe), output=root / "run")
    assert (run.config.data.shots, run.config.data.unlabelled) == (0, True)
    assert run.result["accuracy"] == {}
    assert run.result["data"]["images"] == {"train": 6, "val": 0, "test": 0}
    rows = run.folder.read_metrics()
    assert len(rows) == 2 and "train_accuracy" not in rows[0]
    assert vlfast.load(root / "run").evaluate() == {}
    # Elsewhere there are labels.
    for part in ("train", "test"):
        for name in ("book", "hammer"):
            write_image(root / "own" / part / name / "0.png")
    found = vlfast.load(root / "run").evaluate("folder", root=str(root / "own"))
    assert found["test"]["images"] == 2


def test_the_dictionarys_names_stand_for_class_names(root):
    (root / "dictionary.txt").write_text("hammer\nkey\nwrench\nlamp\nhammer\n")
    given = options(root, "kdpl-ca", classnames=None, dictionary=str(root / "dictionary.txt"))
    with pytest.warns(UserWarning, match="names twice"):
        run = vlfast.fit(**given, output=root / "run")
    assert run.classnames == ("hammer", "key", "wrench", "lamp")
    loaded = vlfast.load(root / "run")
    (guess,) = loaded.predict(root / "images/0.png", classnames=("scissors", "book"), top_k=1)
    assert guess.classnames[0] in ("scissors", "book")
    for part in ("train", "test"):
        for name in ("book", "cup"):
            write_image(root / "own" / part / name / "0.png")
    assert loaded.evaluate("folder", root=str(root / "own"))["test"]["images"] == 2


def test_resumed_runs_and_stored_features(root):
    whole = vlfast.fit(**options(root, "kdpl"), output=root / "whole")

    def stop(training, step):
        raise KeyboardInterrupt

    given = options(root, "kdpl")
    given.pop("show_progress")
    recipe, model, data = (given.pop(key) for key in ("recipe", "model", "data"))
    config, _, _ = resolve_given(recipe, model, data, {**given, "output": str(root / "part")})
    with pytest.raises(KeyboardInterrupt):
        train(config, show_progress=False, on_step=stop)
    resumed = resume(root / "part", show_progress=False)
    assert resumed.folder.read_metrics()[-1]["loss"] == whole.folder.read_metrics()[-1]["loss"]

    given = options(root, "kdpl", views=2)
    given = {key: given[key] for key in ("recipe", "model", "teacher", "data", "show_progress")}
    path = store_features(root / "features", **given)
    stored = vlfast.fit(**options(root, "kdpl", features=str(path)), output=root / "stored")
    assert stored.folder.read_metrics()[-1]["loss"] == pytest.approx(
        whole.folder.read_metrics()[-1]["loss"], rel=1e-5
    )
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["data"]["dataset"] == "unlabelled"


@pytest.mark.parametrize("recipe", ["coop", "plpp", "kgcoop", "mopd"])
def test_recipes_that_learn_from_labels(root, recipe):
    with pytest.raises(
        VlfastError, match="images of unlabelled have no labels, and the .* needs la"
    ):
        vlfast.fit(**options(root, recipe), output=root / "run")


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ({"shots": 4}, r"data\.shots: images without labels can't be drawn by class, .* got 4"),
        ({"unlabelled": False}, r"data\.unlabelled: the images of unlabelled have no labels"),
    ],
)
def test_options_that_need_labels(root, data, wanted):
    with pytest.raises(VlfastError, match=wanted):
        vlfast.fit(**options(root, "kdpl", **data), output=root / "run")


def test_unlabelled_training_images_beside_labelled_test_images(root):
    """A flat train/ and a test/ with class folders."""
    own = root / "own"
    for i in range(5):
        write_image(own / "train" / f"{i}.png", seed=i)
    for name in ("hammer", "wrench"):
        write_image(own / "test" / name / "0.png")
    data = load_folder(own)
    assert data.classnames == ("hammer", "wrench")
    assert data.train.labels.tolist() == [UNKNOWN] * 5
    assert data.test.labels.tolist() == [0, 1]
    given = {**options(root, "kdpl"), "data": {"name": "folder", "root": str(own), "workers": 0}}
    with pytest.raises(VlfastError, match=r"data\.shots: the training images of folder have no la"):
        vlfast.fit(**given, output=root / "run")
    given["data"]["shots"] = 0
    run = vlfast.fit(**given, output=root / "run")
    assert run.config.data.unlabelled
    assert run.result["accuracy"]["test"]["images"] == 2
    given["recipe"] = "coop"
    with pytest.raises(VlfastError, match="images of folder have no labels"):
        vlfast.fit(**given, output=root / "coop")


def test_a_dataset_of_the_users_own(root, tiny_clip):
    data = load_unlabelled(root / "images", NAMES)
    run = vlfast.fit(
        "kdpl",
        model=tiny_clip,
        data=data,
        teacher="glyphs-teacher",
        workers=0,
        epochs=1,
        output=root / "run",
        show_progress=False,
    )
    assert (run.config.data.shots, run.config.data.unlabelled) == (0, True)
    assert run.result["accuracy"] == {}
