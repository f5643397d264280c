"""Objectives in whole runs: training, resuming, loading."""

import pytest
import torch

import vlfast
from tests.conftest import squares_dataset
from tests.trainers.test_fit import Killed, kill_in_epoch
from vlfast.errors import VlfastError

pytestmark = pytest.mark.filterwarnings("ignore:.*never trained the words")

PROMPTSRC = {"kind": "self_regulation", "templates": "dataset"}


def fit(clip, output, **options):
    options = {"shots": 4, "epochs": 2, "batch_size": 8, "n_ctx": 3, "lr": 0.1, **options}
    return vlfast.fit(
        "coop", model=clip, data=squares_dataset(), output=output, show_progress=False, **options
    )


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ({"objective": "teacher"}, {"teacher"}),
        ({"add": "teacher"}, {"teacher", "labels"}),
        ({"add": "guidance"}, {"guidance", "labels"}),
        ({"add": "mixture"}, {"mixture", "selection", "labels"}),
        ({"add": PROMPTSRC}, {"text_regulation", "logit_regulation", "labels"}),
        ({"objective": "teacher", "add": PROMPTSRC}, {"teacher", "text_regulation"}),
        ({"objective": "teacher", "add": "perplexity"}, {"teacher", "inverse_perplexity"}),
    ],
)
def test_fused_and_reference(tiny_clip, tmp_path, options, terms):
    """The same losses, epoch by epoch."""
    rows = []
    for reference in (False, True):
        output = tmp_path / str(reference)
        options = {**options, "teacher": "glyphs-teacher", "reference": reference}
        rows.append(fit(tiny_clip, output, **options).folder.read_metrics())
    for ours, theirs in zip(*rows, strict=True):
        assert terms <= set(ours)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_a_learned_gate_is_resumed_and_left_out_of_the_loaded_prompts(
    tiny_clip, tmp_path, monkeypatch
):
    whole = fit(tiny_clip, tmp_path / "whole", add="mixture")
    kill_in_epoch(monkeypatch, 2)
    with pytest.raises(Killed):
        fit(tiny_clip, tmp_path / "parts", add="mixture")
    monkeypatch.undo()
    resumed = vlfast.resume(
        tmp_path / "parts", clip=tiny_clip, dataset=squares_dataset(), show_progress=False
    )
    ours, theirs = (run.folder.read_tensors("last")[0] for run in (resumed, whole))
    assert set(ours) == {"context", "objectives.mixture.gate"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = vlfast.load(tmp_path / "whole", clip=tiny_clip)
    assert again.evaluate(squares_dataset()) == whole.result["accuracy"]


def test_unlabelled_images(tiny_clip, tmp_path):
    """Of all classes, though the labels would be of the base half."""
    options = {"teacher": "glyphs-teacher", "unlabelled": True, "classes": "base"}
    run = fit(tiny_clip, tmp_path / "run", objective="teacher", **options)
    assert run.result["data"]["images"]["train"] == 20
    assert "train_accuracy" not in run.folder.read_metrics()[0]
    wanted = r"data\.unlabelled: the mixture objective needs labels; selection_weight: 0\.0"
    with pytest.raises(VlfastError, match=wanted):
        fit(tiny_clip, tmp_path / "other", objective="mixture", **options)
    without = {"kind": "mixture", "selection_weight": 0.0}
    fit(tiny_clip, tmp_path / "free", objective=without, **options)


def test_a_teacher_is_asked_for(tiny_clip, tmp_path):
    with pytest.raises(VlfastError, match="teacher: the teacher objective needs one"):
        fit(tiny_clip, tmp_path / "run", objective="teacher")
    assert not (tmp_path / "run").exists()


def test_a_file_of_templates_is_found_from_elsewhere(tiny_clip, tmp_path, monkeypatch):
    """Resuming starts in another working directory."""
    (tmp_path / "pool.txt").write_text("a photo of a {}.\na picture of a {}.\n")
    monkeypatch.chdir(tmp_path)
    added = [
        {"kind": "mixture", "pool": "pool.txt"},
        {"kind": "self_regulation", "templates": "pool.txt"},
    ]
    with monkeypatch.context() as patched:
        kill_in_epoch(patched, 2)
        with pytest.raises(Killed):
            fit(tiny_clip, tmp_path / "run", add=added)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    data = squares_dataset()
    run = vlfast.resume(tmp_path / "run", clip=tiny_clip, dataset=data, show_progress=False)
    assert len(run.folder.read_metrics()) == 2
