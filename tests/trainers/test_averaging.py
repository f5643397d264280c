"""PromptSRC's Gaussian averaging over epochs."""

import math

import pytest
import torch

import vlfast
from tests.conftest import squares_dataset
from tests.trainers.test_fit import Killed, kill_in_epoch
from vlfast.errors import VlfastError
from vlfast.trainers import averaging as averaging_module
from vlfast.trainers.averaging import epoch_weights

AVERAGED = {"average_mean": 3.0, "average_std": 1.0}


def fit(clip, output, **options):
    options = {"shots": 8, "epochs": 4, "batch_size": 8, "n_ctx": 3, "lr": 0.3, **options}
    return vlfast.fit(
        "plpp", model=clip, data=squares_dataset(), output=output, show_progress=False, **options
    )


def test_weights():
    """PromptSRC's base-to-new setting."""
    weights = epoch_weights(20, 15.0, 1.0)
    density = [math.exp(-((e - 15) ** 2) / 2) for e in range(1, 21)]
    expected = torch.tensor([d / sum(density) for d in density], dtype=torch.float64)
    torch.testing.assert_close(weights, expected)
    far = epoch_weights(2, 1000.0, 0.1)
    assert far.tolist() == [0.0, 1.0]


def test_last_is_the_weighted_sum_of_the_epochs(tiny_clip, tmp_path, monkeypatch):
    """What is saved, validated and tested after the last epoch."""
    epochs = []
    epoch_done = averaging_module.Averaging.epoch_done

    def recording(self, epoch):
        epochs.append({name: p.detach().double() for name, p in self._parameters.items()})
        epoch_done(self, epoch)

    monkeypatch.setattr(averaging_module.Averaging, "epoch_done", recording)
    options = {"add": {"kind": "mixture"}}
    run = fit(tiny_clip, tmp_path / "run", **AVERAGED, **options)
    weights = epoch_weights(4, 3.0, 1.0)
    last = run.folder.read_tensors("last")[0]
    for saved, name in (
        ("context", "prompts.context"),
        ("objectives.mixture.gate", "objectives.mixture.gate"),
    ):
        expected = sum(w * epoch[name] for w, epoch in zip(weights, epochs, strict=True))
        torch.testing.assert_close(last[saved].double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(run.classifier.prompts.context, last["context"])
    again = vlfast.load(tmp_path / "run", clip=tiny_clip)
    assert again.evaluate(squares_dataset()) == run.result["accuracy"]
    # Until the last epoch training goes as it would without.
    free = fit(tiny_clip, tmp_path / "free", **options)
    rows = [run.folder.read_metrics(), free.folder.read_metrics()]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert not torch.equal(free.folder.read_tensors("last")[0]["context"], last["context"])


@pytest.mark.parametrize("after", [0, 1, 3])
def test_resume_is_bit_exact(tiny_clip, tmp_path, monkeypatch, after):
    whole = fit(tiny_clip, tmp_path / "whole", **AVERAGED)
    kill_in_epoch(monkeypatch, after + 1)
    with pytest.raises(Killed):
        fit(tiny_clip, tmp_path / "parts", **AVERAGED)
    monkeypatch.undo()
    resumed = vlfast.resume(
        tmp_path / "parts", clip=tiny_clip, dataset=squares_dataset(), show_progress=False
    )
    for name in ("last", "best"):
        ours, theirs = resumed.folder.read_tensors(name), whole.folder.read_tensors(name)
        assert torch.equal(ours[0]["context"], theirs[0]["context"]) and ours[1] == theirs[1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"average_mean": 3.0}, r"recipe\.average_std: averaging takes both .* got only average_m"),
        ({"average_std": 3.0}, r"recipe\.average_mean: averaging takes both .* got only average_s"),
        ({"average_mean": 3.0, "average_std": 0.0}, r"average_std: expected a positive number"),
        ({"average_mean": float("nan"), "average_std": 1.0}, "average_mean: expected a number"),
    ],
)
def test_bad_options(tiny_clip, tmp_path, options, match):
    with pytest.raises(VlfastError, match=match):
        fit(tiny_clip, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
