"""The fit loop: checkpoints, resuming, stopping, what it writes."""

import json

import pytest
import torch

import vlfast
from tests.conftest import Squares, squares_dataset
from vlfast.errors import VlfastError
from vlfast.trainers import fit as fit_module
from vlfast.trainers.fit import EpochSampler, NonFiniteLossError
from vlfast.trainers.recipes import resolve_config
from vlfast.trainers.run_folder import RunFolder, read_tensors

SHORT = {"shots": 8, "epochs": 4, "batch_size": 8, "n_ctx": 3, "show_progress": False}


def fit(clip, output, recipe="plpp", **options):
    return vlfast.fit(
        recipe, model=clip, data=squares_dataset(), output=output, **{**SHORT, **options}
    )


def test_run_folder_is_complete(tiny_clip, tmp_path):
    run = fit(tiny_clip, tmp_path / "run", lr=0.1)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "last.safetensors",
        "best.safetensors",
        "state.safetensors",
        "contexts.safetensors",
        "predictions.safetensors",
        "result.json",
    }
    rows = run.folder.read_metrics()
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        total = row["labels"] + 0.1 * (row["perplexity"] + row["inverse_perplexity"])
        assert row["loss"] == pytest.approx(total, rel=1e-5)
    tensors, about = run.folder.read_tensors("last")
    assert list(tensors) == ["context"] and tensors["context"].shape == (3, 32)
    assert about["epoch"] == 4 and about["classnames"] == list(squares_dataset().classnames)
    result = run.result
    assert result["data"]["images"] == {"train": 40, "val": 20, "test": 40, "noisy": 20}
    assert result["data"]["fingerprint"] == squares_dataset().few_shot(8, 1).fingerprint()
    assert set(result["versions"]) == {"vlfast", "torch", "open_clip_torch", "python"}
    assert result["seed"] == 1 and result["epochs"] == 4


def test_best_is_the_first_epoch_with_the_highest_validation_accuracy(tiny_clip, tmp_path):
    run = fit(tiny_clip, tmp_path / "run", lr=0.5, epochs=6)
    accuracies = [row["val_accuracy"] for row in run.folder.read_metrics()]
    best = accuracies.index(max(accuracies)) + 1
    assert run.result["best_epoch"] == best
    assert run.folder.read_tensors("best")[1]["epoch"] == best


def test_training_changes_the_context_and_lowers_the_loss(tiny_clip, tmp_path):
    run = fit(tiny_clip, tmp_path / "run", "coop", lr=0.05, epochs=30)
    losses = [row["loss"] for row in run.folder.read_metrics()]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_same_seed_same_run(tiny_clip, tmp_path):
    runs = [fit(tiny_clip, tmp_path / str(i), seed=s, lr=0.1) for i, s in enumerate((1, 1, 2))]
    first, same, other = (r.folder.read_tensors("last")[0]["context"] for r in runs)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


class Killed(BaseException):
    """Stands for a signal: nothing catches it on the way."""


@pytest.mark.parametrize("after", [0, 1, 3])
def test_resume_is_bit_exact(tiny_clip, tmp_path, monkeypatch, after):
    """Killed in the epoch after ``after`` finished ones, then resumed: the same bits as at once."""
    whole = fit(tiny_clip, tmp_path / "whole", lr=0.1)
    kill_in_epoch(monkeypatch, after + 1)
    with pytest.raises(Killed):
        fit(tiny_clip, tmp_path / "parts", lr=0.1)
    monkeypatch.undo()
    config = RunFolder(tmp_path / "parts").read_config()
    resumed = vlfast.run.train(
        config, resume=True, clip=tiny_clip, dataset=squares_dataset(), show_progress=False
    )
    for name in ("last", "best"):
        ours, theirs = resumed.folder.read_tensors(name), whole.folder.read_tensors(name)
        assert torch.equal(ours[0]["context"], theirs[0]["context"])
        assert ours[1] == theirs[1]
    without_time = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in r.folder.read_metrics()]
        for r in (resumed, whole)
    ]
    assert without_time[0] == without_time[1]


@pytest.mark.parametrize("write", ["append_metrics", "write_tensors"])
def test_killed_while_writing_then_resumed(tiny_clip, tmp_path, monkeypatch, write):
    """Between the files of one epoch, too, nothing is lost."""
    whole = fit(tiny_clip, tmp_path / "whole", lr=0.1)
    calls = []
    original = getattr(RunFolder, write)

    def killed(self, *args):
        calls.append(args)
        epochs = [a for a in calls if write == "append_metrics" or a[0] == "state"]
        if len(epochs) == 2:
            raise Killed
        return original(self, *args)

    monkeypatch.setattr(RunFolder, write, killed)
    with pytest.raises(Killed):
        fit(tiny_clip, tmp_path / "parts", lr=0.1)
    monkeypatch.undo()
    resumed = vlfast.resume(
        tmp_path / "parts", clip=tiny_clip, dataset=squares_dataset(), show_progress=False
    )
    assert [row["epoch"] for row in resumed.folder.read_metrics()] == [1, 2, 3, 4]
    assert resumed.folder.read_tensors("best")[1] == whole.folder.read_tensors("best")[1]
    ours, theirs = (r.folder.read_tensors("last")[0]["context"] for r in (resumed, whole))
    assert torch.equal(ours, theirs)


def kill_in_epoch(monkeypatch, epoch):
    step = fit_module._train_epoch

    def train_epoch(*args, **kwargs):
        if args[4] == epoch:
            raise Killed
        return step(*args, **kwargs)

    monkeypatch.setattr(fit_module, "_train_epoch", train_epoch)


def test_keyboard_interrupt_leaves_the_last_epoch(tiny_clip, tmp_path, monkeypatch):
    calls = []

    def load(self, index, view=None, load=Squares.load):
        calls.append(view)
        if sum(view is not None for view in calls) == 90:
            raise KeyboardInterrupt
        return load(self, index, view)

    monkeypatch.setattr(Squares, "load", load)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_clip, tmp_path / "run", lr=0.1)
    folder = RunFolder(tmp_path / "run")
    assert not folder.finished
    assert folder.read_tensors("state")[1]["epoch"] == 2
    assert len(folder.read_metrics()) == 2


def test_a_half_written_row_of_metrics_is_dropped(tiny_clip, tmp_path):
    run = fit(tiny_clip, tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 5, "lo')
    assert len(run.folder.read_metrics()) == 4
    run.folder.keep_metrics(3)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == [1, 2, 3]


def test_non_finite_loss_names_the_term(tiny_clip, tmp_path):
    with pytest.raises(
        NonFiniteLossError, match=r"labels.* became nan in epoch \d+, by step \d+.*lr"
    ):
        fit(tiny_clip, tmp_path / "run", "coop", lr=1e38, epochs=6)
    assert RunFolder(tmp_path / "run").read_tensors("last")[0]["context"].isfinite().all()


def test_a_last_step_that_diverges_is_not_saved(tiny_clip, tmp_path, monkeypatch):
    """Every loss before an update was finite; what the last update made is not."""
    step = fit_module._train_epoch

    def diverging(*args, **kwargs):
        means = step(*args, **kwargs)
        with torch.no_grad():
            next(args[0].parameters()).fill_(float("inf"))
        return means

    monkeypatch.setattr(fit_module, "_train_epoch", diverging)
    with pytest.raises(NonFiniteLossError, match="prompts became infinite or NaN in epoch 1"):
        fit(tiny_clip, tmp_path / "run", "coop")
    assert not (tmp_path / "run" / "last.safetensors").exists()


def test_reference_gives_the_same_losses(tiny_clip, tmp_path):
    fused = fit(tiny_clip, tmp_path / "fused", lr=0.1)
    plain = fit(tiny_clip, tmp_path / "plain", lr=0.1, reference=True)
    for ours, theirs in zip(fused.folder.read_metrics(), plain.folder.read_metrics(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_gradient_clipping_bounds_the_step(tiny_clip, tmp_path):
    """With SGD, no momentum, one step: the context moves by at most lr * norm."""
    options = {"epochs": 1, "batch_size": 40, "warmup_epochs": 0, "weight_decay": 0.0, "lr": 1.0}
    free = fit(tiny_clip, tmp_path / "free", "coop", **options)
    clipped = fit(tiny_clip, tmp_path / "clipped", "coop", clip_grad_norm=1e-3, **options)
    torch.manual_seed(1)
    start = torch.randn(3, 32) * 0.02
    moved = [
        float((r.folder.read_tensors("last")[0]["context"] - start).norm()) for r in (free, clipped)
    ]
    assert moved[1] == pytest.approx(1e-3, rel=1e-2) and moved[0] > moved[1]


def test_without_augmentation_every_epoch_sees_the_test_views(tiny_clip, tmp_path, monkeypatch):
    views = set()

    def load(self, index, view=None, load=Squares.load):
        views.add(view)
        return load(self, index, view)

    monkeypatch.setattr(Squares, "load", load)
    fit(tiny_clip, tmp_path / "run", augment=False, epochs=2)
    assert views == {None}


def test_bf16_trains(tiny_clip, tmp_path):
    run = fit(tiny_clip, tmp_path / "run", precision="bf16", lr=0.1)
    context = run.folder.read_tensors("last")[0]["context"]
    assert context.dtype == torch.float32 and bool(context.isfinite().all())
    again = fit(tiny_clip, tmp_path / "again", lr=0.1)
    assert not torch.equal(context, again.folder.read_tensors("last")[0]["context"])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"precision": "fp16"}, VlfastError, "fp16 needs a GPU"),
        ({"device": "tpu"}, VlfastError, "device: expected"),
        ({"device": "cuda:9"}, VlfastError, "device: cuda:9 asked for, but torch finds"),
        ({"add": {"kind": "labels", "weight": float("nan")}}, VlfastError, "each kind once"),
        (
            {"objectives": [{"kind": "perplexity", "temperature": 0.0}]},
            VlfastError,
            "temperature: expected above 0",
        ),
        (
            {"objectives": [{"kind": "perplexity", "inverse_weight": -1.0}]},
            VlfastError,
            "inverse_weight: expected at least 0",
        ),
        ({"objectives": [{"kind": "labels", "weight": float("inf")}]}, VlfastError, "weight"),
        ({"n_ctx": 40}, ValueError, "n_ctx: 40 context tokens and the class 'dark grey' need"),
        ({"shots": 100}, ValueError, "shots: 100 images a class asked for"),
        ({"prompts": {"kind": "hard"}, "epochs": 3}, ValueError, "'hard' prompts have none"),
    ],
)
def test_what_is_refused_leaves_no_run(tiny_clip, tmp_path, options, error, match):
    with pytest.raises(error, match=match):
        fit(tiny_clip, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_nothing_to_learn_is_refused(tiny_clip, tmp_path):
    with pytest.raises(VlfastError, match="have nothing to learn"):
        fit(tiny_clip, tmp_path / "run", "zeroshot", epochs=3, n_ctx=None)


def test_a_folder_that_holds_a_run_is_not_overwritten(tiny_clip, tmp_path):
    fit(tiny_clip, tmp_path / "run")
    with pytest.raises(VlfastError, match="holds a finished run"):
        fit(tiny_clip, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(VlfastError, match="holds an unfinished run; go on with it"):
        fit(tiny_clip, tmp_path / "run")


def test_output_that_can_not_be_written(tiny_clip, tmp_path):
    """A file stands where the folder should be, as unwritable to root as to anyone."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(VlfastError, match="output: can't write to"):
        fit(tiny_clip, tmp_path / "file" / "run")


def test_damaged_checkpoints(tiny_clip, tmp_path):
    run = fit(tiny_clip, tmp_path / "run")
    file = tmp_path / "run" / "last.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VlfastError, match=r"last\.safetensors is truncated"):
        vlfast.load(run.folder.path, clip=tiny_clip)
    file.write_text("hello")
    with pytest.raises(VlfastError, match=r"truncated or is no safetensors file"):
        read_tensors(file)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="there is no file"):
        vlfast.load(run.folder.path, clip=tiny_clip)


def test_foreign_safetensors(tmp_path):
    from safetensors.torch import save_file

    save_file({"context": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(VlfastError, match="not written by vlfast"):
        read_tensors(tmp_path / "other.safetensors")


def test_checkpoint_of_another_shape(tiny_clip, tmp_path):
    run = fit(tiny_clip, tmp_path / "run")
    run.folder.write_tensors(
        "last", {"context": torch.zeros(2, 32)}, run.folder.read_tensors("last")[1]
    )
    with pytest.raises(VlfastError, match=r"holds .*\(2, 32\).*need .*\(3, 32\)"):
        vlfast.load(run.folder.path, clip=tiny_clip)


def test_sampler_is_a_permutation_of_seed_and_epoch():
    sampler = EpochSampler(50, seed=3)
    first = list(sampler)
    torch.rand(5)
    assert list(sampler) == first and sorted(first) == list(range(50))
    sampler.epoch = 2
    assert list(sampler) != first


def test_default_output_tells_runs_apart():
    config = resolve_config({"recipe": "plpp", "data": {"classes": "base", "shots": 4}, "seed": 2})
    folder = "runs/glyphs-tools/glyphs-student"
    assert str(vlfast.run.default_output(config)) == f"{folder}/plpp-base-4shots-seed2"
    added = resolve_config({"recipe": "coop", "add": "perplexity", "prompts": "class_specific"})
    name = "coop-class_specific-labels+perplexity-all-16shots-seed1"
    assert str(vlfast.run.default_output(added)) == f"{folder}/{name}"


@pytest.mark.parametrize("recipe", ["coop", "zeroshot"])
def test_no_training_images(tiny_clip, tmp_path, recipe):
    """Zero-shot needs none; what learns says that there are none."""
    data = squares_dataset(train=0)
    options = {"model": tiny_clip, "data": data, "show_progress": False}
    if recipe == "zeroshot":
        run = vlfast.fit("zeroshot", output=tmp_path / "run", **options)
        assert run.result["epochs"] == 0
        return
    with pytest.raises(VlfastError, match="squares has no training images"):
        vlfast.fit("coop", output=tmp_path / "run", shots=0, n_ctx=2, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_trains_on_a_gpu(tmp_path, precision):
    options = {"data": squares_dataset(), "model": {"name": "glyphs-student", "device": "cuda"}}
    run = vlfast.fit("plpp", output=tmp_path / "run", precision=precision, **SHORT, **options)
    assert run.classifier.prompts.context.device.type == "cuda"
    again = vlfast.load(tmp_path / "run", device="cpu")
    assert again.evaluate(squares_dataset())["test"]["images"] == 40


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_the_cpu_keeps_the_run_there(tiny_clip, tmp_path):
    run = fit(tiny_clip, tmp_path / "run")
    assert run.classifier.prompts.context.device.type == "cpu"
