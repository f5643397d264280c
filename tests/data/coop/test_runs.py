"""The papers' datasets from the command line and from Python: training, halves, domains."""

import json
import re

import pytest

import vlfast
from tests.data.coop.folders import make_coop_root
from vlfast.cli.commands import main
from vlfast.errors import VlfastError

# The bundled model never learned these words.
pytestmark = pytest.mark.filterwarnings("ignore:classnames")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_coop_root(
        tmp_path_factory.mktemp("coop"), ("oxford_pets", "imagenet", "imagenet_a", "imagenetv2")
    )


def test_train_on_a_half_from_the_command_line(root, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--data", "OxfordPets", "--data.root", str(root), "--data.classes", "base"]
    small = ["--data.shots", "2", "--recipe.epochs", "1", "--output", str(run)]
    assert not main(["train", "--recipe", "coop", *options, *small])
    assert re.search(r"coop on oxford_pets: 3 classes, 6 training images", capsys.readouterr().out)
    result = json.loads((run / "result.json").read_text())
    assert result["data"]["name"] == "oxford_pets"
    assert result["data"]["images"] == {"train": 6, "val": 6, "test": 9}
    assert result["data"]["few_shot"] == "drawn"
    assert {"base", "new", "harmonic_mean"} <= set(result["accuracy"])
    assert result["accuracy"]["new"]["images"] == 6


def test_prompts_of_imagenet_on_its_domains(root, tmp_path):
    run = vlfast.fit(
        "coop",
        data={"name": "imagenet", "root": str(root)},
        shots=1,
        epochs=1,
        output=tmp_path / "run",
        show_progress=False,
    )
    assert run.result["data"]["images"] == {"train": 6, "val": 0, "test": 18}
    assert run.evaluate("imagenet_a")["test"]["images"] == 6
    assert run.evaluate("ImageNetV2", root=str(root))["test"]["images"] == 18


def test_all_images_are_no_subset(root, tmp_path):
    data = {"name": "oxford_pets", "root": str(root), "shots": 0}
    output = tmp_path / "run"
    run = vlfast.fit("coop", data=data, epochs=1, output=output, show_progress=False)
    assert run.result["data"]["images"]["train"] == 25
    assert run.result["data"]["few_shot"] is None


def test_a_domain_is_tested_on_and_not_trained_on(root, tmp_path):
    data = {"name": "imagenet_a", "root": str(root)}
    run = vlfast.fit("zeroshot", data=data, output=tmp_path / "run", show_progress=False)
    assert run.result["accuracy"]["test"]["images"] == 6
    for shots in (0, 16):
        with pytest.raises(VlfastError, match="imagenet_a has no training images; train on anoth"):
            vlfast.fit("coop", data={**data, "shots": shots}, output=tmp_path / str(shots))
        assert not (tmp_path / str(shots)).exists()


def test_without_labels_a_domain_is_learned_from_its_test_images(root, tmp_path):
    """As PromptKD does on ImageNet's variants ([PromptKD] datasets/imagenet_a.py)."""
    run = vlfast.fit(
        "kdpl",
        data={"name": "imagenet_a", "root": str(root), "unlabelled": True, "shots": 0},
        teacher={"name": "glyphs-teacher"},
        epochs=1,
        output=tmp_path / "run",
        show_progress=False,
    )
    assert run.result["data"]["images"] == {"train": 6, "val": 0, "test": 6}
    assert run.result["accuracy"]["test"]["images"] == 6
