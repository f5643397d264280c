"""The context of every epoch, from before the first step to the last checkpoint."""

import pytest
import torch

import vlfast
from tests.conftest import squares_dataset
from tests.trainers.test_fit import Killed, fit, kill_in_epoch
from vlfast.trainers.context_history import CLASSES_KEPT, read_history
from vlfast.trainers.run_folder import RunFolder


def test_begins_with_the_initial_context_and_ends_with_the_last(tiny_clip, tmp_path):
    run = fit(tiny_clip, tmp_path / "run", lr=0.1)
    contexts, names = read_history(run.folder)
    assert contexts.shape == (5, 3, 32) and names is None
    torch.manual_seed(1)
    assert torch.equal(contexts[0], torch.randn(3, 32) * 0.02)
    assert torch.equal(contexts[-1], run.folder.read_tensors("last")[0]["context"])
    best = run.folder.read_tensors("best")
    assert torch.equal(contexts[best[1]["epoch"]], best[0]["context"])


@pytest.mark.parametrize("after", [0, 2])
def test_a_resumed_run_has_the_same(tiny_clip, tmp_path, monkeypatch, after):
    whole = fit(tiny_clip, tmp_path / "whole", lr=0.1)
    kill_in_epoch(monkeypatch, after + 1)
    with pytest.raises(Killed):
        fit(tiny_clip, tmp_path / "parts", lr=0.1)
    monkeypatch.undo()
    data = squares_dataset()
    vlfast.resume(tmp_path / "parts", clip=tiny_clip, dataset=data, show_progress=False)
    assert torch.equal(
        read_history(RunFolder(tmp_path / "parts"))[0], read_history(whole.folder)[0]
    )


def test_the_first_classes_of_class_specific_contexts(tiny_clip, tmp_path):
    run = fit(tiny_clip, tmp_path / "run", "coop", prompts={"kind": "class_specific"}, epochs=2)
    contexts, names = read_history(run.folder)
    assert contexts.shape == (3, CLASSES_KEPT, 3, 32)
    assert names == list(run.classnames[:CLASSES_KEPT])


def test_without_context_there_is_none(tiny_clip, tmp_path):
    fit(tiny_clip, tmp_path / "run", "zeroshot", epochs=0, n_ctx=None)
    with pytest.raises(FileNotFoundError):
        read_history(RunFolder(tmp_path / "run"))
