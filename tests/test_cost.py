"""What recipes cost: the numbers that can be known beforehand, and that all are there."""

import csv
import json
import multiprocessing

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlfast import cli, cost
from vlfast.clip.models import load_clip
from vlfast.errors import UnknownNameError, VlfastError
from vlfast.objectives import KINDS, Objective
from vlfast.ops import prefix_attention
from vlfast.ops.backends import reference_only
from vlfast.ops.packed_runs import PackedRuns

MODEL = "glyphs-student"


def test_prefix_attention_is_counted():
    runs = PackedRuns.of([3, 2], [4, 1, 2, 5])
    heads, width = 2, 8
    qkv = torch.randn(17, 3, heads, width, requires_grad=True)
    seen = [1, 2, 3, 1, 2]  # the prefixes, then four runs, two behind each
    seen += [4, 5, 6, 7, 4, 3, 4, 3, 4, 5, 6, 7]
    with FlopCounterMode(display=False) as counter:
        output = prefix_attention(qkv, runs)
        forward = counter.get_total_flops()
        output.sum().backward()
    assert forward == sum(seen) * 4 * heads * width
    assert counter.get_total_flops() - forward == forward * 5 // 2


def measured(recipe="coop", classes=6, steps=2, memory=False, **options):
    options.setdefault("recipe", {})["batch_size"] = 4
    config = cost.cost_config(recipe, model=MODEL, options=options)
    return cost.measure_cost(config, classes=classes, steps=steps, memory=memory)


def test_a_training_recipe():
    found = measured("plpp", prompts={"n_ctx": 5})
    assert (found.recipe, found.prompts, found.objectives) == (
        "plpp",
        "shared",
        "labels + perplexity",
    )
    assert found.learned == 5 * 96 and found.batch_size == 4
    assert found.step_seconds > 0 and found.test_images_per_second > 0
    assert found.step_megabytes is None and found.teacher is None and found.threads == 1


def test_the_image_tower_is_the_work_at_test():
    """Patches, projections and MLPs of every block, attention, and the cosines, by hand."""
    clip = load_clip(MODEL)
    visual = clip.model.visual
    width, blocks, patch = 128, 3, 8
    tokens = (48 // patch) ** 2 + 1
    products = (tokens - 1) * 3 * patch**2 * width
    products += blocks * (12 * tokens * width**2 + 2 * tokens**2 * width)
    products += width * visual.output_dim
    few, many = measured("zeroshot", classes=6), measured("zeroshot", classes=600)
    assert few.learned == 0 and few.step_seconds is None and few.batch_size is None
    assert few.test_gflop * 1e9 == 2 * (products + visual.output_dim * 6)
    assert (many.test_gflop - few.test_gflop) * 1e9 == pytest.approx(2 * 128 * 594, rel=1e-3)


def test_plain_pytorch_counts_alike():
    with reference_only():
        plain = measured("zeroshot")
    assert plain.test_gflop == measured("zeroshot").test_gflop


class Taught(Objective):
    kind = "taught"
    needs_teacher = True

    def prepare(self, task):
        self.bias = torch.nn.Parameter(torch.zeros(3))

    def forward(self, step):
        return {"taught": step.logits.square().mean() + self.bias.sum() * step.batch.teacher.sum()}


def test_what_learns_from_a_teacher_gets_one(monkeypatch):
    monkeypatch.setitem(KINDS, "taught", Taught)
    found = measured("coop", objective="taught")
    assert found.teacher == MODEL and found.learned == 16 * 96 + 3
    config = cost.cost_config("coop", model=MODEL, teacher="ViT-L-14", options={"add": "taught"})
    assert (config.teacher.name, config.teacher.pretrained) == ("ViT-L-14", "random")
    assert cost.cost_config("coop", model=MODEL, teacher="ViT-L-14").teacher.name is None


@pytest.fixture(scope="module")
def costs():
    seen = []
    options = {"recipe": {"batch_size": 8}, "prompts": {"n_ctx": 30, "init": None}}
    failing = cost.compare_costs(["coop"], model=MODEL, classes=5, options=options)
    done = cost.compare_costs(
        ["zeroshot", "coop"], model=MODEL, classes=5, steps=2, report=seen.append
    )
    assert seen == done
    return [*done, *failing]


def test_each_recipe_in_its_own_process(costs):
    zeroshot, coop, failed = costs
    assert coop.step_megabytes > 0.5 and zeroshot.step_megabytes is None
    assert coop.learned == 16 * 96
    assert failed.failed.startswith("n_ctx: 30 context tokens and the class")


def test_table_and_files(costs, tmp_path):
    header, *rows = cost.cost_table(costs).splitlines()
    assert header.startswith("recipe") and [row.split()[0] for row in rows] == [
        "zeroshot",
        "coop",
        "coop",
    ]
    assert rows[2].split()[-6:] == ["-"] * 6
    note = cost.about(costs, MODEL, 5)
    assert "5 classes" in note and "coop: not measured, n_ctx: 30" in note
    for suffix in ("csv", "md", "json"):
        cost.write_costs(costs, tmp_path / "sub" / f"costs.{suffix}", note)
    with open(tmp_path / "sub" / "costs.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert float(lines[1]["step_seconds"]) == costs[1].step_seconds
    assert json.loads((tmp_path / "sub" / "costs.json").read_text())[1]["learned"] == 16 * 96
    assert (tmp_path / "sub" / "costs.md").read_text().count("| coop |") == 2


def held(megabytes):
    """In a process of its own: the rise that is found when this much is held for a moment."""
    torch.ones(1)
    before = cost._reset_peak(cuda=False)
    tensor = torch.ones(megabytes * 250_000)
    del tensor
    return (cost._peak_memory(cuda=False) - before) / 1e6


def test_the_peak_is_that_of_what_was_held():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(held, (200,)) == pytest.approx(200, abs=8)


def test_untrained_weights_are_the_same_every_time():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, second = (load_clip("ViT-S-32-alt", "random") for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    for ours, theirs in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_class_names_differ():
    names = cost.random_images(1500, 4, 32).classnames
    assert len(set(names)) == 1500


def test_what_is_refused(capsys):
    with pytest.raises(UnknownNameError, match="unknown recipe 'copo'"):
        cost.compare_costs(["copo"], model=MODEL)
    with pytest.raises(ValueError, match="classes: expected at least 1, got 0"):
        cost.compare_costs(["coop"], model=MODEL, classes=0)
    assert cli.main(["cost", "coop", "--output", "costs.xls"]) == 2
    assert "expected a .csv, .md or .json file" in capsys.readouterr().err


def test_class_agnostic_recipes_get_a_dictionary():
    (found,) = cost.compare_costs(["kdpl-ca"], model=MODEL, classes=3, steps=1)
    assert found.failed is None and found.step_seconds > 0 and found.teacher == MODEL
    with pytest.raises(VlfastError, match="recipe.lr: expected a positive number"):
        cost.compare_costs(model=MODEL, options={"recipe": {"lr": -1.0}})


def test_command(capsys, monkeypatch, tmp_path):
    def compare(recipes, *, model, classes, teacher, options, steps, report):
        assert (recipes, model, classes, teacher, steps) == (["coop"], MODEL, 7, None, 3)
        assert options["recipe"] == {"batch_size": 4, "lr": 0.1}
        return [cost.Cost("coop", "shared", "labels", 12, 4, 0.5, None, 3.0, 1.5)]

    monkeypatch.setattr(cost, "compare_costs", compare)
    (tmp_path / "more.yaml").write_text("recipe: {lr: 0.1}\n")
    argv = ["cost", "coop", "--model", MODEL, "--classes", "7", "--steps", "3", "--batch-size", "4"]
    argv += ["--config", str(tmp_path / "more.yaml")]
    assert cli.main([*argv, "--output", str(tmp_path / "costs.csv")]) == 0
    assert "500.0" in capsys.readouterr().out and (tmp_path / "costs.csv").is_file()
    assert cli.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["step_seconds"] == 0.5
