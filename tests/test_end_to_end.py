"""Training for real: the bundled student on icons, from few images to base and new classes."""

import pytest
from PIL import Image

import vlfast
from vlfast.clip.words import nearest_words
from vlfast.demo import run_demo

THEME = "glyphs/tools"
BASE = {"name": THEME, "classes": "base"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Zero-shot, CoOp and CoOp+PLPP on base classes, a tenth of the papers' epochs."""
    folder = tmp_path_factory.mktemp("runs")
    options = {"model": "glyphs-student", "data": BASE, "show_progress": False}
    return {
        "zeroshot": vlfast.fit("zeroshot", output=folder / "zeroshot", **options),
        "coop": vlfast.fit("coop", output=folder / "coop", epochs=20, lr=0.01, **options),
        "plpp": vlfast.fit("plpp", output=folder / "plpp", epochs=20, lr=0.01, **options),
    }


def test_zero_shot_is_far_above_chance(runs):
    accuracy = runs["zeroshot"].result["accuracy"]
    classes = runs["zeroshot"].result["data"]["classes"]
    for part in ("base", "new"):
        assert accuracy[part]["accuracy"] > 3 * 100 / classes


def test_coop_learns_base_classes(runs):
    base = {name: run.result["accuracy"]["base"]["accuracy"] for name, run in runs.items()}
    assert base["coop"] > base["zeroshot"]
    assert base["plpp"] > base["zeroshot"]


def test_losses_fall(runs):
    for name in ("coop", "plpp"):
        rows = runs[name].folder.read_metrics()
        assert rows[-1]["labels"] < rows[0]["labels"]


def test_perplexity_is_lower_where_it_is_minimised(runs):
    """PLPP's own term, not an accuracy: it must fall, or nothing is minimised."""
    rows = runs["plpp"].folder.read_metrics()
    last = rows[-1]["perplexity"] + rows[-1]["inverse_perplexity"]
    assert last < rows[0]["perplexity"] + rows[0]["inverse_perplexity"]


def test_context_began_as_the_datasets_words(runs):
    words = vlfast.load_dataset(THEME).context_init
    for name in ("coop", "plpp"):
        assert runs[name].folder.read_config().prompts.init == words
        context = runs[name].classifier.prompts.context_vectors()
        nearest = nearest_words(runs[name].classifier.clip, context)
        assert len(nearest) == len(words.split()) and all(len(found) == 3 for found in nearest)


def test_predicting_the_test_images_gives_the_reported_accuracy(runs):
    """Images through ``predict``, one by one as PIL images, against the evaluation's batches."""
    base = vlfast.load_dataset(THEME).restrict("base")
    images = [base.test.image(i) for i in range(len(base.test))]
    found = runs["coop"].predict(images, top_k=1)
    names = [base.classnames[label] for label in base.test.labels]
    right = sum(p.classnames[0] == name for p, name in zip(found, names, strict=True))
    reported = runs["coop"].result["accuracy"]["base"]["accuracy"]
    assert 100 * right / len(images) == pytest.approx(reported, abs=0.3)


def test_reference_trains_alike(runs, tmp_path):
    plain = vlfast.fit(
        "plpp",
        model="glyphs-student",
        data=BASE,
        output=tmp_path / "plain",
        epochs=2,
        reference=True,
        show_progress=False,
    )
    fused = vlfast.fit(
        "plpp",
        model="glyphs-student",
        data=BASE,
        output=tmp_path / "fused",
        epochs=2,
        show_progress=False,
    )
    for ours, theirs in zip(fused.folder.read_metrics(), plain.folder.read_metrics(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_demo_shows_table_words_and_pictures(tmp_path, capsys):
    run_demo("nature", tmp_path / "demo", epochs=1)
    out = capsys.readouterr().out
    for word in ("zero-shot", "CoOp", "CoOp+PLPP", "harmonic mean", "seconds", "nearest words"):
        assert word in out
    for picture in ("training.png", "predictions.png"):
        with Image.open(tmp_path / "demo" / picture) as image:
            assert min(image.size) > 300
    run_demo("nature", tmp_path / "demo", epochs=1)  # made anew, not refused
