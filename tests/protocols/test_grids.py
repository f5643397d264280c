"""Which runs a protocol consists of, and with which options."""

from pathlib import Path

import pytest

from vlfast.errors import UnknownNameError, VlfastError
from vlfast.protocols.grids import Request, grid

DIRECTORY = Path("runs")


def cells_of(protocol, *recipes, **options):
    return grid(Request(protocol, recipes, DIRECTORY, **options))


def test_few_shot_is_datasets_times_shots_times_seeds():
    cells = cells_of("few-shot", "coop", "zeroshot", datasets=["OxfordPets", "dtd"])
    assert [cell.number for cell in cells] == list(range(1, 33))
    assert len([c for c in cells if c.method == "coop"]) == 2 * 5 * 3
    folders = [str(cell.folder) for cell in cells]
    assert "runs/oxford_pets/coop-1shots-seed1" in folders
    assert "runs/dtd/coop-16shots-seed3" in folders
    assert [f for f in folders if "zeroshot" in f] == [
        "runs/oxford_pets/zeroshot",
        "runs/dtd/zeroshot",
    ]
    first = cells[0].config
    assert (first.data.name, first.data.classes, first.data.shots) == ("oxford_pets", "all", 1)
    assert first.prompts.n_ctx == 16 and first.prompts.init is None and first.recipe.epochs == 50
    assert {c.config.recipe.epochs for c in cells if c.shots == 16} == {200}


def test_few_shot_on_imagenet_has_the_few_shot_prompts():
    (cell,) = cells_of("few-shot", "coop", datasets=["imagenet"], shots=[4], seeds=[2])
    assert cell.config.prompts.init is None and cell.config.prompts.n_ctx == 16
    assert cell.config.recipe.epochs == 50 and cell.config.seed == 2


def test_default_datasets_are_the_papers():
    eleven = [c.dataset for c in cells_of("base-to-new", "zeroshot")]
    assert len(eleven) == 11 and eleven[0] == "imagenet" and eleven[-1] == "ucf101"
    assert [c.dataset for c in cells_of("few-shot", "zeroshot", datasets=["all"])] == eleven
    (cross,) = cells_of("cross-dataset", "zeroshot")
    assert cross.dataset == "imagenet"
    assert [target.name for target in cross.targets] == eleven[1:]
    (domains,) = cells_of("domain-generalization", "zeroshot")
    names = [target.name for target in domains.targets]
    assert names == ["imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"]


def test_base_to_new_trains_on_base_with_16_shots():
    cells = cells_of("base-to-new", "maple", "promptkd", datasets=["glyphs/tools"], seeds=[1])
    maple, promptkd = cells
    assert (maple.config.data.classes, maple.config.data.shots) == ("base", 16)
    assert maple.config.prompts.depth > 1
    # PromptKD sees all training images, unless the shots are asked for.
    assert promptkd.shots == promptkd.config.data.shots == 0
    assert promptkd.folder.name == "promptkd-allshots-seed1"
    (few,) = cells_of("base-to-new", "promptkd", datasets=["glyphs/tools"], seeds=[1], shots=[4])
    assert few.config.data.shots == 4


def test_transfer_has_the_hyperparameters_of_transfer():
    """[MaPLe] trains its cross-dataset model 2 epochs."""
    for protocol in ("cross-dataset", "domain-generalization"):
        (cell,) = cells_of(
            protocol, "maple", source="glyphs/tools", datasets=["glyphs/nature"], seeds=[1]
        )
        assert (cell.config.recipe.epochs, cell.config.recipe.lr) == (2, 0.0026)
        assert cell.source == cell.dataset == "glyphs/tools" and cell.shots == 16


def test_glyphs_stands_for_all_themes_and_the_source_is_no_target():
    (cell,) = cells_of("cross-dataset", "zeroshot", source="glyphs/tools", datasets=["glyphs"])
    names = [target.name for target in cell.targets]
    assert "glyphs/nature" in names and "glyphs/tools" not in names and len(names) == 5


def test_learners_from_unlabelled_images_train_on_each_target():
    cells = cells_of(
        "cross-dataset",
        *("coop", "promptkd"),
        source="imagenet",
        datasets=["dtd", "eurosat"],
        seeds=[1, 2],
    )
    coop = [c for c in cells if c.method == "coop"]
    promptkd = [c for c in cells if c.method == "promptkd"]
    assert [(c.dataset, len(c.targets)) for c in coop] == [("imagenet", 2)] * 2
    assert [(c.dataset, c.seed) for c in promptkd] == [
        *(("dtd", 1), ("dtd", 2)),
        *(("eurosat", 1), ("eurosat", 2)),
    ]
    for cell in promptkd:
        assert cell.source == "imagenet" and not cell.targets
        # [PromptKD] xd_train.sh: three blocks with prompts, weight 1000 on every dataset.
        assert cell.config.prompts.visual_depth == 3
        assert cell.config.objectives[0]["weight"] == 1000.0
        assert cell.config.data.unlabelled and cell.config.data.classes == "all"


def test_names_are_filled_into_options():
    options = {
        "teacher": {"run": "t/{source}/{dataset}/{shots}-seed{seed}"},
        "data": {"template": "a {} icon", "root": "/data/{dataset}"},
    }
    cells = cells_of(
        "few-shot", "kdpl", datasets=["glyphs/tools"], shots=[2], seeds=[1, 3], options=options
    )
    assert [c.config.teacher.run for c in cells] == [
        "t/glyphs-tools/glyphs-tools/2-seed1",
        "t/glyphs-tools/glyphs-tools/2-seed3",
    ]
    assert cells[0].config.data.template == "a {} icon"
    (cross,) = cells_of(
        "cross-dataset", "coop", source="dtd", datasets=["eurosat"], seeds=[1], options=options
    )
    assert cross.data.root == "/data/dtd" and cross.targets[0].root == "/data/eurosat"


def test_a_recipe_that_trains_nothing_takes_no_options_of_training():
    options = {
        "recipe": {"epochs": 3},
        "prompts": "maple",
        "add": "perplexity",
        "data": {"root": "r", "unlabelled": True},
        "model": {"name": "ViT-B-16"},
    }
    (cell,) = cells_of("few-shot", "zeroshot", datasets=["dtd"], options=options)
    assert not cell.trains and cell.config.prompts.kind == "hard"
    assert cell.config.data.root == "r" and not cell.config.data.unlabelled
    assert cell.config.model.name == "ViT-B-16"


def test_prompts_and_objectives_are_in_the_methods_name():
    options = {"prompts": "maple", "objective": "teacher", "recipe": {"setting": "few-shot"}}
    cells = cells_of("few-shot", "coop", datasets=["dtd"], shots=[1], seeds=[1], options=options)
    assert cells[0].folder.name == "coop-coupled-teacher-1shots-seed1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "dtd"}, "--data.name: the datasets are given by --datasets"),
        ({"data": {"classes": "new"}}, "--data.classes: the protocol says which"),
        ({"data": {"shots": 3}}, "--data.shots: how many images a class is given by --shots"),
        ({"seed": 3}, "--seed: the seeds are given by --seeds"),
        ({"recipe": "coop"}, "--recipe.name: the recipes are given by --recipes"),
        ({"output": "x"}, "--output: every run has its own folder"),
    ],
)
def test_options_that_contradict_the_grid_are_refused(options, message):
    with pytest.raises(VlfastError, match=message):
        cells_of("few-shot", "coop", options=options)


def test_refusals():
    with pytest.raises(UnknownNameError, match="did you mean 'few-shot'"):
        cells_of("fewshot", "coop")
    with pytest.raises(UnknownNameError, match="unknown recipe 'cop'; did you mean"):
        cells_of("few-shot", "cop")
    with pytest.raises(VlfastError, match="--recipes: expected at least one"):
        cells_of("few-shot")
    with pytest.raises(VlfastError, match="--seeds: expected at least one"):
        cells_of("few-shot", "coop", seeds=[])
    with pytest.raises(VlfastError, match="--shots: expected at least 0"):
        cells_of("few-shot", "coop", shots=[-1])
    with pytest.raises(VlfastError, match="--source: few-shot trains on each"):
        cells_of("few-shot", "coop", source="dtd")
    with pytest.raises(VlfastError, match="expected others than the source, dtd"):
        cells_of("cross-dataset", "coop", source="dtd", datasets=["DescribableTextures"])
    with pytest.raises(VlfastError, match="kdpl-ca learns from the names of a dictionary"):
        cells_of("few-shot", "kdpl-ca", datasets=["dtd"])
    with pytest.raises(UnknownNameError, match="unknown option 'recipe.epoch'"):
        cells_of("few-shot", "coop", datasets=["dtd"], options={"recipe": {"epoch": 1}})


def test_an_output_is_shared_only_by_cells_with_folders_of_their_own():
    options = {"prompts": {"kind": "coupled"}, "objective": "teacher"}
    cells = cells_of("few-shot", "coop", "coop", datasets=["dtd", "DTD"], options=options)
    assert len({cell.folder for cell in cells}) == len(cells) == 15
