"""What each recipe learns at ViT-B/16's size: the papers' counts of parameters."""

import open_clip
import pytest
import torch

from vlfast.clip.models import wrap_clip
from vlfast.objectives import Task, build_objectives
from vlfast.parts import prompts_of
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.prompts.context import init_of_template
from vlfast.prompts.projected import ClassTable
from vlfast.trainers.fit import TrainingStep
from vlfast.trainers.recipes import RECIPES, resolve_config

NAMES = ("cat", "yellow school bus", "hen")
WORDS = "a photo of a"
TEACHER_WIDTH = 768  # of ViT-L/14

BASE_TO_NEW = {
    "zeroshot": 0,
    "zeroshot-ensemble": 0,
    "coop": 2_048,
    "cocoop": 35_360,
    "kgcoop": 2_048,
    "prograd": 8_192,
    "vpt": 73_728,
    "ivlp": 30_720,
    "maple": 3_555_072,
    "promptsrc": 46_080,
    "plpp": 2_048,
    "kdpl": 2_048,
    "kdpl-ca": 2_048,
    "sipd": 2_048,
    "mopd": 8_192,
    "promptkd": 1_013_760,
}


@pytest.fixture(scope="module")
def full_size():
    """ViT-B/16's sizes; all weights are zero."""
    with torch.device("meta"):
        model = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-16"))
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    model.attn_mask = torch.full((77, 77), -torch.inf).triu(1)
    return wrap_clip(model, name="ViT-B-16")


def learned(recipe, clip, **data):
    given = {"classes": "base", **data}
    if recipe == "kdpl-ca":
        given["dictionary"] = "names.txt"
    model = {"name": "ViT-B-16", "pretrained": "openai"}
    config = resolve_config({"recipe": recipe, "data": given, "model": model})
    inits = {"auto": WORDS, "template": init_of_template(f"{WORDS} {{}}.")}
    config.prompts.init = inits.get(config.prompts.init, config.prompts.init)
    table = None
    if config.prompts.class_features == "teacher":
        table = ClassTable(NAMES, None, width=TEACHER_WIDTH)
    prompts = prompts_of(config, clip, len(NAMES), table)
    task = Task(PromptedClassifier(clip, prompts, NAMES, f"{WORDS} {{}}."), "letters")
    objectives = build_objectives(config.objectives)
    for objective in objectives:
        if objective.kind == "mixture":
            objective.prepare(task)
    training = TrainingStep(task, objectives)
    return sum(p.numel() for p in training.parameters() if p.requires_grad)


@pytest.mark.parametrize("recipe", RECIPES)
def test_base_to_new(full_size, recipe):
    assert learned(recipe, full_size) == BASE_TO_NEW[recipe]


def test_other_settings(full_size):
    assert learned("coop", full_size, classes="all") == 8_192
    assert learned("maple", full_size, classes="all", name="imagenet") == 1_185_024
