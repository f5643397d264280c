"""Every command to train, to store features or to carry out a protocol that README and docs show
is understood."""

import json
import re
import shlex
from pathlib import Path

import pytest

from vlfast.cli import main
from vlfast.cli.features import features_arguments
from vlfast.cli.options import config_options
from vlfast.cli.train import train_arguments
from vlfast.data.templates import POOLS
from vlfast.objectives import build_objectives
from vlfast.trainers.recipes import RECIPES, resolve_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(names: str = "train|features") -> list[str]:
    """Those of these names, "a|b"; a backslash at the end of a line joins it to the next."""
    found = []
    for page in PAGES:
        text = re.sub(r" *\\\n *", " ", page.read_text(encoding="utf-8"))
        for line in text.splitlines():
            found += re.findall(rf"`(vlfast (?:{names}) [^`]+)`", line)
            if re.match(f"    vlfast ({names}) ", line):
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


@pytest.mark.parametrize("command", commands("run"))
def test_protocol_resolves(command, capsys, monkeypatch, tmp_path):
    """Each is listed with its cells, in a folder where nothing has been run."""
    monkeypatch.chdir(tmp_path)
    words = [word for word in shlex.split(command)[1:] if word != "--list"]
    words = [word.replace("$SLURM_ARRAY_TASK_ID", "1") for word in words]
    assert not main([*words, "--list", "--json"]), capsys.readouterr().err
    cells = json.loads(capsys.readouterr().out)
    assert cells and all(cell["state"] == "to do" for cell in cells)


def test_there_are_commands():
    assert len(commands()) > 30 and len(commands("run")) > 5


def test_every_recipe_is_documented():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in RECIPES if f"`{name}`" not in text and f"| {name} |" not in text] == []
