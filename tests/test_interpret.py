"""Contexts as words, and which hard prompts a gate picks."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vlfast
from tests.conftest import squares_dataset
from vlfast import cli, interpret
from vlfast.errors import VlfastError
from vlfast.evaluation.plots import plot_prompt_shares, plot_word_history

SHORT = {"shots": 4, "epochs": 3, "show_progress": False}


def fit(clip, output, recipe="coop", **options):
    given = {**SHORT, "prompts": {"n_ctx": 3}, **options}
    return vlfast.fit(recipe, model=clip, data=squares_dataset(), output=output, **given)


def word(clip, vector):
    """The nearest token, by itself."""
    distances = (clip.token_embedding - vector).norm(dim=1)
    nearest = int(distances.argmin())
    return clip.tokenizer.decode([nearest]).strip(), float(distances[nearest])


def test_words_of_a_shared_context(tiny_clip, tmp_path):
    run = fit(tiny_clip, tmp_path / "run", prompts={"n_ctx": None, "init": "a photo of"}, lr=1e-9)
    found = interpret.context_words(run, count=2)
    assert [line.words[0][0] for line in found] == ["a", "photo", "of"]
    assert all(line.words[0][1] < 1e-3 < line.words[1][1] for line in found)
    table = interpret.words_table(found).splitlines()
    assert table[1].split()[:3] == ["vector", "1", "a"] and len(table) == 4


def test_words_of_class_specific_contexts(tiny_clip, tmp_path):
    run = fit(tiny_clip, tmp_path / "run", prompts={"kind": "class_specific", "n_ctx": 3})
    found = interpret.context_words(run, count=1, classes=2)
    assert [line.name for line in found] == [
        f"vector {i} of {name}" for name in ("red", "green") for i in (1, 2, 3)
    ]
    context = run.classifier.prompts.context.detach()
    assert found[4].words[0][0] == word(tiny_clip, context[1, 1])[0]
    history = interpret.words_over_training(run, classes=2)
    assert history.distances.shape == (4, 6)
    assert history.vectors[3] == "vector 1 of green"
    assert history.words[-1] == [line.words[0][0] for line in found]


def test_words_over_training(tiny_clip, tmp_path):
    run = fit(tiny_clip, tmp_path / "run", lr=5.0, epochs=8)
    history = interpret.words_over_training(run)
    torch.manual_seed(1)
    start = torch.randn(3, 32) * 0.02
    for vector in range(3):
        nearest, distance = word(tiny_clip, start[vector])
        assert history.words[0][vector] == nearest
        assert history.distances[0, vector] == pytest.approx(distance, rel=1e-3)
    header, *rows = interpret.history_table(history).splitlines()
    assert header.split()[-6:] == ["0", "2", "3", "5", "6", "8"] and len(rows) == 3
    plot_word_history(history, tmp_path / "words.png", title="run")
    assert len(Image.open(tmp_path / "words.png").convert("RGB").getcolors(1_000_000)) > 50


def test_prompts_without_context(tiny_clip, tmp_path):
    run = fit(tiny_clip, tmp_path / "run", "zeroshot", epochs=0, prompts={})
    for ask in (interpret.context_words, interpret.words_over_training):
        with pytest.raises(VlfastError, match="hard prompts have no context vectors"):
            ask(run)
    with pytest.raises(VlfastError, match="has no gate over hard prompts"):
        interpret.prompt_shares(run)


def test_gate_weights_are_a_softmax_over_the_largest():
    torch.manual_seed(0)
    features, gate = torch.nn.functional.normalize(torch.randn(20, 6), dim=1), torch.randn(6, 5)
    weights = interpret.gate_weights(features, gate, 2)
    for image, row in zip(features, weights, strict=True):
        logits = image @ gate
        best = sorted(range(5), key=lambda h: -logits[h])[:2]
        expected = torch.zeros(5)
        expected[best] = logits[best].softmax(dim=0)
        torch.testing.assert_close(row, expected)
    ties = interpret.gate_weights(features, torch.zeros(6, 5), 2)
    assert torch.equal(ties, torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0]).expand(20, 5))


POOL = ("a photo of a {}.", "a picture of a {}.", "a square, {}.")


@pytest.fixture
def gated(tiny_clip, tmp_path, monkeypatch):
    """A run whose checkpoint holds a gate: the third prompt for red images, else the first two."""
    run = fit(tiny_clip, tmp_path / "run", classes="base")
    from vlfast.data.views import Views
    from vlfast.trainers.images import view_config

    data = squares_dataset()
    views = Views(data.test, view_config(tiny_clip))
    features = tiny_clip.encode_images(torch.stack([views[i][0] for i in range(len(views))]))
    red = torch.from_numpy(data.test.labels == 0)
    # The direction in which red images lie apart from all others.
    wanted = torch.where(red, 1.0, -1.0)
    direction = torch.linalg.lstsq(features.double(), wanted.double()[:, None]).solution.float()
    gate = torch.cat([torch.zeros(32, 2), 50 * direction], dim=1)
    tensors, about = run.folder.read_tensors("last")
    run.folder.write_tensors("last", {**tensors, interpret.GATE: gate}, about)
    spec = {"kind": "mixture", "pool": "dataset", "pool_size": 3, "num_prompts": 2}
    run.config.objectives.append(spec)
    pool = (*POOL, "one more {}.")
    monkeypatch.setattr(interpret, "template_pool", lambda name, dataset, template: pool)
    return run, spec


def test_shares_of_hard_prompts(gated, tmp_path):
    run, _ = gated
    shares = interpret.prompt_shares(run)
    assert shares.templates == POOL and shares.classnames == ["red", "green", "blue"]
    np.testing.assert_allclose(shares.shares.sum(axis=1), 1, rtol=1e-5)
    assert shares.shares[0, 2] > 0.9
    np.testing.assert_allclose(shares.shares[1:], [[0.5, 0.5, 0]] * 2, atol=1e-5)
    table = interpret.shares_table(shares, classes=2)
    assert [line.split()[-3:] for line in table.splitlines()[3:4]] == [["50", "50", "-"]]
    assert "and 1 more" in table and "  3  a square, {}." in table
    plot_prompt_shares(shares, tmp_path / "mixture.png", title="run", classes=2)
    assert Image.open(tmp_path / "mixture.png").height > 300
    whole = interpret.as_json(shares=shares)
    assert json.loads(json.dumps(whole))["mixture"]["shares"][1][2] == 0.0


def test_a_pool_that_has_changed(gated):
    run, spec = gated
    spec["pool_size"] = None
    with pytest.raises(VlfastError, match="weighs 3 hard prompts, but the pool 'dataset' has 4"):
        interpret.prompt_shares(run)


def test_command(capsys, tmp_path):
    folder = tmp_path / "run"
    options = {"data": "glyphs/tools", "classes": "base", "output": folder, **SHORT}
    vlfast.fit("coop", **options)
    assert cli.main(["interpret", str(folder), "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith("vector 1") and len(out.splitlines()) == 5
    assert cli.main(["interpret", str(folder), "--over-training", "--output", str(tmp_path)]) == 0
    assert "nearest word after epoch" in capsys.readouterr().out
    assert (tmp_path / "words.png").is_file() and not (folder / "words.png").exists()
    assert cli.main(["interpret", str(folder), "--json", "--top", "1"]) == 0
    assert len(json.loads(capsys.readouterr().out)["context"]) == 4
    assert cli.main(["interpret", str(folder), "--mixture"]) == 2
    assert "only the mixture objective" in capsys.readouterr().err
    assert cli.main(["interpret", str(folder), "--top", "0"]) == 2
    assert "count: expected at least 1, got 0" in capsys.readouterr().err
