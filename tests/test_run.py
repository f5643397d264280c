"""The Python face: fit, load, predict, save."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import vlfast
from tests.conftest import COLOURS, squares_dataset
from vlfast.errors import VlfastError


@pytest.fixture(scope="module")
def run(tiny_clip, tmp_path_factory):
    return vlfast.fit(
        "coop",
        model=tiny_clip,
        data=squares_dataset(),
        output=tmp_path_factory.mktemp("runs") / "coop",
        shots=4,
        epochs=2,
        n_ctx=3,
        lr=0.1,
        show_progress=False,
    )


@pytest.fixture
def image_files(tmp_path):
    paths = []
    for name, colour in list(COLOURS.items())[:3]:
        paths.append(tmp_path / f"{name}.png")
        Image.new("RGB", (50, 40), colour).save(paths[-1])
    return paths


def test_loaded_run_answers_alike(run, tiny_clip, image_files):
    loaded = vlfast.load(run.folder.path, clip=tiny_clip)
    assert loaded.classnames == run.classnames == tuple(COLOURS)
    assert loaded.predict(image_files) == run.predict(image_files)
    assert loaded.evaluate(squares_dataset()) == run.result["accuracy"]


def test_predictions_are_probabilities_in_order(run, image_files):
    for found in run.predict(image_files, top_k=5):
        assert set(found.classnames) == set(COLOURS)
        assert sum(found.probabilities) == pytest.approx(1.0, abs=1e-5)
        assert list(found.probabilities) == sorted(found.probabilities, reverse=True)


def test_one_image_a_path_or_a_picture(run, image_files):
    by_path = run.predict(image_files[0])
    by_name = run.predict(str(image_files[0]))
    by_picture = run.predict(Image.open(image_files[0]))
    assert by_path == by_name == by_picture and len(by_path) == 1
    assert run.predict([]) == []


def test_other_class_names_can_be_asked_for(run, image_files):
    (found,) = run.predict(image_files[0], classnames=["cat", "dog"], top_k=9)
    assert set(found.classnames) == {"cat", "dog"}


def test_one_name_is_no_list_of_names(run, image_files):
    with pytest.raises(TypeError, match="classnames: expected a sequence of names, got 'cat'"):
        run.predict(image_files[0], classnames="cat")


def test_many_images_go_through_in_batches(run, image_files, monkeypatch):
    monkeypatch.setattr(vlfast.run, "TEST_BATCH", 2)
    assert len(run.predict(image_files * 3)) == 9
    for together, path in zip(run.predict(image_files), image_files, strict=True):
        (alone,) = run.predict(path)
        assert together.classnames == alone.classnames
        assert together.probabilities == pytest.approx(alone.probabilities, rel=1e-5)


def test_bad_images_are_named(run, image_files, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*gone\.png"):
        run.predict([image_files[0], tmp_path / "gone.png"])
    image_files[1].write_bytes(b"\x89PNG but not really")
    with pytest.raises(VlfastError, match=r"green\.png can't be read"):
        run.predict(image_files)
    with pytest.raises(TypeError, match="images: expected paths or PIL images, got ndarray"):
        run.predict([np.zeros((4, 4, 3))])
    with pytest.raises(ValueError, match="top_k: expected at least 1"):
        run.predict(image_files[0], top_k=0)


def test_saved_copy_is_a_run(run, tiny_clip, tmp_path, image_files):
    path = run.save(tmp_path / "copy")
    copy = vlfast.load(path, clip=tiny_clip)
    assert copy.predict(image_files) == run.predict(image_files)
    assert copy.result == run.result
    with pytest.raises(VlfastError, match="holds a finished run"):
        run.save(path)


def test_best_checkpoint_can_be_loaded(run, tiny_clip):
    best = vlfast.load(run.folder.path, checkpoint="best", clip=tiny_clip)
    assert best.classifier.prompts.context.shape == (3, 32)
    with pytest.raises(ValueError, match="checkpoint: expected 'last' or 'best'"):
        vlfast.load(run.folder.path, checkpoint="first")


def test_a_run_on_your_own_model_and_data_says_what_it_needs(run, tiny_model, tmp_path):
    with pytest.raises(VlfastError, match=r"unknown model 'tiny'.*pass clip="):
        vlfast.load(run.folder.path)
    other = vlfast.wrap_clip(tiny_model, name="other")
    with pytest.raises(VlfastError, match=r"trained on tiny .*, got other"):
        vlfast.load(run.folder.path, clip=other)
    loaded = vlfast.load(run.folder.path, clip=run.classifier.clip)
    with pytest.raises(VlfastError, match=r"unknown dataset 'squares'.*evaluate\(data\)"):
        loaded.evaluate()


def test_another_dataset_is_tested_with_all_its_classes(tiny_clip, tmp_path):
    from dataclasses import replace

    run = vlfast.fit(
        "coop",
        model=tiny_clip,
        data=squares_dataset(),
        output=tmp_path / "run",
        classes="base",
        shots=2,
        epochs=1,
        show_progress=False,
    )
    other = replace(squares_dataset(), name="other squares")
    assert set(run.evaluate(other)) == {"test", "domains"}
    assert set(run.evaluate(squares_dataset())) == {"base", "new", "harmonic_mean", "domains"}


@pytest.mark.parametrize(
    "options",
    [
        {"add": "guidance"},
        {"add": "mixture"},
        {"objective": "teacher", "teacher": "glyphs-teacher"},
        {"prompts": "ensemble"},
        {"projection": 1.0},
    ],
)
def test_template_that_something_reads_is_not_warned_of(tiny_clip, tmp_path, options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vlfast.fit(
            "coop",
            model=tiny_clip,
            data=squares_dataset(),
            output=tmp_path / "run",
            template="a drawing of {}.",
            shots=2,
            epochs=0,
            show_progress=False,
            **options,
        )
    assert not [w for w in caught if "data.template" in str(w.message)]


def test_template_of_learned_prompts_is_warned_of(tiny_clip, tmp_path):
    with pytest.warns(UserWarning, match="'a drawing of {}.' changes nothing"):
        vlfast.fit(
            "coop",
            model=tiny_clip,
            data=squares_dataset(),
            output=tmp_path / "run",
            template="a drawing of {}.",
            shots=2,
            epochs=1,
            n_ctx=2,
            show_progress=False,
        )


def test_a_finished_run_on_your_own_data_is_resumed_with_them(run, tiny_clip):
    path, data = run.folder.path, squares_dataset()
    resumed = vlfast.resume(path, clip=tiny_clip, dataset=data, show_progress=False)
    assert resumed.dataset is data
    assert resumed.evaluate() == run.result["accuracy"]


def test_a_teacher_that_nothing_learns_from_is_warned_of(tiny_clip, tmp_path):
    with pytest.warns(UserWarning, match="teacher: nothing learns from it; --objective teacher"):
        vlfast.fit(
            "coop",
            model=tiny_clip,
            data=squares_dataset(),
            output=tmp_path / "run",
            teacher="glyphs-teacher",
            shots=2,
            epochs=1,
            show_progress=False,
        )


def test_files_of_templates_are_found_from_another_folder(tiny_clip, tmp_path, monkeypatch):
    (tmp_path / "pool.txt").write_text("a photo of a {}.\na drawing of a {}.\n")
    monkeypatch.chdir(tmp_path)
    mixture = {"kind": "mixture", "pool": "pool.txt"}
    regulation = {"kind": "self_regulation", "templates": "imagenet"}
    run = vlfast.fit(
        "coop",
        model=tiny_clip,
        data=squares_dataset(),
        output=tmp_path / "run",
        add=[mixture, regulation],
        shots=2,
        epochs=1,
        show_progress=False,
    )
    _, mixture, regulation = run.folder.read_config().objectives
    assert mixture["pool"] == str(tmp_path / "pool.txt")
    assert regulation["templates"] == "imagenet"


def test_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a run's folder, it has no config\.yaml"):
        vlfast.load(tmp_path)
    (tmp_path / "config.yaml").write_text("- a\n- list\n")
    with pytest.raises(VlfastError, match="does not hold a run's config"):
        vlfast.load(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(VlfastError, match="not valid YAML"):
        vlfast.load(tmp_path)


def test_config_records_where_the_words_came_from(tiny_clip, tmp_path):
    run = vlfast.fit(
        "plpp",
        model=tiny_clip,
        data=squares_dataset(),
        output=tmp_path / "run",
        classes="base",
        shots=4,
        epochs=1,
        show_progress=False,
    )
    assert run.folder.read_config().prompts.init == "a photo of a"
    assert run.classnames == tuple(COLOURS)[:3]
    assert set(run.result["accuracy"]) == {"base", "new", "harmonic_mean", "domains"}


def test_folder_dataset_trains(tiny_clip, tmp_path, monkeypatch):
    """A user's own images, with CoOp's crops and flips, read by worker processes."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 3), ("test", 2)):
        for name, colour in list(COLOURS.items())[:2]:
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                noise = generator.integers(-20, 20, (40, 50, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    options = {
        "model": tiny_clip,
        "data": {"name": "folder", "root": "."},
        "shots": 2,
        "epochs": 2,
        "n_ctx": 2,
        "show_progress": False,
    }
    monkeypatch.chdir(tmp_path)
    alone = vlfast.fit("coop", output=tmp_path / "alone", workers=0, **options)
    helped = vlfast.fit("coop", output=tmp_path / "helped", workers=2, **options)
    rows = [r.folder.read_metrics() for r in (alone, helped)]
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]
    monkeypatch.chdir("/")
    again = vlfast.load(tmp_path / "alone", clip=tiny_clip)
    assert again.evaluate() == alone.result["accuracy"]
    assert "val_accuracy" not in rows[0][0] and alone.result["best_epoch"] is None
    assert alone.result["accuracy"]["test"]["images"] == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_training_image_stops_with_its_name(tiny_clip, tmp_path, workers):
    for part in ("train", "test"):
        for name in ("red", "blue"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (40, 40), name).save(tmp_path / part / name / "0.png")
    (tmp_path / "train" / "red" / "0.png").write_bytes(b"broken")
    with pytest.raises(VlfastError, match=r"^image: \S*red.0\.png can't be read.*$"):
        vlfast.fit(
            "coop",
            model=tiny_clip,
            data={"name": "folder", "root": str(tmp_path)},
            output=tmp_path / "run",
            shots=1,
            epochs=1,
            n_ctx=2,
            workers=workers,
            show_progress=False,
        )


def test_memory_for_the_class_names_changes_no_number(squares, tiny_clip, tmp_path):
    """With less than it takes at once, the classes are encoded one by one."""
    options = {"data": squares, "model": tiny_clip, "shots": 2, "epochs": 2, "n_ctx": 2}
    at_once = vlfast.fit("coop", output=tmp_path / "at-once", show_progress=False, **options)
    try:
        in_chunks = vlfast.fit(
            "coop", output=tmp_path / "chunks", show_progress=False, max_memory="1kB", **options
        )
        assert tiny_clip.text_tower.max_memory == 1000
    finally:
        tiny_clip.text_tower.max_memory = None
    torch.testing.assert_close(
        in_chunks.classifier.prompts.context,
        at_once.classifier.prompts.context,
        atol=1e-6,
        rtol=1e-4,
    )


def test_best_and_last_are_both_reported(tiny_clip, tmp_path):
    """And the run holds the last."""
    run = vlfast.fit(
        "coop",
        model=tiny_clip,
        data=squares_dataset(),
        output=tmp_path / "run",
        classes="base",
        shots=8,
        epochs=6,
        n_ctx=3,
        lr=2.0,
        show_progress=False,
    )
    result = run.result
    assert result["best"]["epoch"] == result["best_epoch"] < 6
    best = vlfast.load(tmp_path / "run", checkpoint="best", clip=tiny_clip)
    assert result["best"]["accuracy"] == best.evaluate(squares_dataset())
    last = vlfast.load(tmp_path / "run", clip=tiny_clip)
    assert result["accuracy"] == last.evaluate(squares_dataset()) == run.evaluate()
    context = run.folder.read_tensors("last")[0]["context"]
    assert torch.equal(run.classifier.prompts.context, context)
    assert not torch.equal(best.classifier.prompts.context, context)


def test_without_validation_images_there_is_no_best(tiny_clip, tmp_path):
    data = squares_dataset(val=0)
    options = {"shots": 2, "epochs": 1, "n_ctx": 2, "show_progress": False}
    run = vlfast.fit("coop", model=tiny_clip, data=data, output=tmp_path / "run", **options)
    assert run.result["best"] is None and run.result["best_epoch"] is None
