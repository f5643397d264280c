"""Every recipe learns the same with the fused ops and with their plain PyTorch twins."""

import pytest
import torch

from tests.conftest import squares_dataset
from tests.prompts.support import deep_clip
from vlfast.run import resolve_given, train
from vlfast.trainers.recipes import RECIPES

pytestmark = pytest.mark.filterwarnings("ignore:.*never trained the words")

NAMES = ("cat", "hen", "red fox", "yellow school bus", "tree", "bee")


@pytest.fixture(scope="module")
def clip():
    return deep_clip()


@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_and_reference_learn_alike(clip, tmp_path, recipe):
    """What is learned after each of eight steps, and what every term of the loss was."""
    # Without warm-up, whose steps are too small to tell anything.
    given = {"teacher": "glyphs-teacher", "shots": 4, "batch_size": 5, "warmup_epochs": 0}
    if RECIPES[recipe].learns != "nothing":
        given["epochs"] = 2
    if recipe == "kdpl-ca":
        names = tmp_path / "names.txt"
        names.write_text("\n".join(NAMES))
        given |= {"dictionary": str(names), "top_classes": 4}
    rows, results, steps = [], [], []
    for reference in (False, True):
        learned = []

        def remember(step, number, learned=learned):
            learned.append({name: x.double() for name, x in step.learned().items()})

        options = {**given, "reference": reference, "output": str(tmp_path / str(reference))}
        data = squares_dataset(train=20, val=10, test=20)
        config, *parts = resolve_given(recipe, clip, data, options)
        run = train(config, clip=parts[0], dataset=parts[1], show_progress=False, on_step=remember)
        rows.append(run.folder.read_metrics())
        results.append(run.result["accuracy"])
        steps.append(learned)

    assert results[0] == results[1]
    assert [len(part) for part in steps] == [4 * given.get("epochs", 0)] * 2
    for ours, theirs in zip(*steps, strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            # Of what it moved, beside its own rounding.
            moved = (tensor - steps[1][0][name]).abs().max()
            atol = float(1e-3 * moved + 2e-5 * tensor.abs().max())
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=atol, msg=name)
    for ours, theirs in zip(*rows, strict=True):
        assert ours.keys() == theirs.keys()
        for term in ours.keys() - {"seconds"}:
            assert ours[term] == pytest.approx(theirs[term], rel=1e-4, abs=1e-6), term
