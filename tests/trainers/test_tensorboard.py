"""Event files hold what metrics.jsonl holds, each epoch once."""

import sys

import pytest

import vlfast
from tests.conftest import squares_dataset
from vlfast.trainers.run_folder import RunFolder

SHORT = {"shots": 8, "epochs": 4, "batch_size": 8, "n_ctx": 3, "show_progress": False}


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def expected(folder):
    rows = RunFolder(folder).read_metrics()
    names = [name for name in rows[0] if name != "epoch"]
    return {name: [(r["epoch"], pytest.approx(r[name], rel=1e-6)) for r in rows] for name in names}


def test_every_metric_by_epoch(tiny_clip, tmp_path):
    data = squares_dataset()
    vlfast.fit("plpp", model=tiny_clip, data=data, output=tmp_path, tensorboard=True, **SHORT)
    found = scalars(tmp_path)
    assert found == expected(tmp_path)
    assert {"loss", "labels", "perplexity", "val_accuracy", "lr"} <= set(found)


def test_a_resumed_run_has_every_epoch_once(tiny_clip, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    write = RunFolder.write_tensors

    def killed(self, name, *args):
        if name == "state" and len(self.read_metrics()) == 3:
            raise Killed
        write(self, name, *args)

    data = squares_dataset()
    monkeypatch.setattr(RunFolder, "write_tensors", killed)
    with pytest.raises(Killed):
        vlfast.fit("coop", model=tiny_clip, data=data, output=tmp_path, tensorboard=True, **SHORT)
    monkeypatch.undo()
    vlfast.resume(tmp_path, clip=tiny_clip, dataset=data, show_progress=False)
    assert scalars(tmp_path) == expected(tmp_path)
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [1, 2, 3, 4]


def test_a_missing_package_is_told_before_any_work(tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    options = {"model": tiny_clip, "data": squares_dataset(), **SHORT}
    with pytest.raises(vlfast.VlfastError, match=r"pip install 'vlfast\[tensorboard\]'"):
        vlfast.fit("coop", output=tmp_path / "run", tensorboard=True, **options)
    assert not (tmp_path / "run").exists()
