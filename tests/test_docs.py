"""Every command to train or to store features that README and docs show is understood."""

import re
import shlex
from pathlib import Path

import pytest

from vlfast.cli.features import features_arguments
from vlfast.cli.options import config_options
from vlfast.cli.train import train_arguments
from vlfast.data.templates import POOLS
from vlfast.objectives import build_objectives
from vlfast.trainers.recipes import RECIPES, resolve_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    found = []
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            found += re.findall(r"`(vlfast (?:train|features) [^`]+)`", line)
            if re.match("    vlfast (train|features) ", line):
                found.append(line.strip().partition("  #")[0])
    skipped = ("--resume", "--config", "--help", "...")
    return sorted({c.strip() for c in found if not any(word in c for word in skipped)})


@pytest.mark.parametrize("command", commands())
def test_command_resolves(command):
    _, name, *words = shlex.split(command)
    arguments = {"train": train_arguments, "features": features_arguments}[name]
    config = resolve_config(config_options(words, name, "", arguments)["given"])
    build_objectives(config.objectives)
    for objective in config.objectives:
        pool = objective.get("pool", objective.get("templates"))
        assert pool is None or pool in POOLS or pool.endswith(".txt")


def test_there_are_commands():
    assert len(commands()) > 30


def test_every_recipe_is_documented():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in RECIPES if f"`{name}`" not in text and f"| {name} |" not in text] == []
