"""`vlfast checkpoint` on the bundled model and data."""

from __future__ import annotations

import re

import pytest
import torch

import vlfast
from vlfast.cli import main


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run on icons, and the folder that it was exported to by the command."""
    folder = tmp_path_factory.mktemp("command")
    vlfast.fit(
        "coop",
        data="glyphs/tools",
        output=folder / "run",
        shots=1,
        epochs=1,
        show_progress=False,
    )
    arguments = ["checkpoint", "export", str(folder / "run"), "--output", str(folder / "out")]
    assert main(arguments) == 0
    return folder


def test_there_and_back(exported, tmp_path, capsys):
    back = str(tmp_path / "back")
    given = ["--model", "glyphs-student", "--data", "glyphs/tools", "--recipe", "coop"]
    source = str(exported / "out")
    assert main(["checkpoint", "import", source, "--output", back, *given, "--epoch", "1"]) == 0
    assert "coop: shared prompts, 16 context tokens" in capsys.readouterr().out
    assert main(["evaluate", back, "--json"]) == 0
    first, again = (vlfast.load(path) for path in (exported / "run", back))
    assert again.evaluate() == first.result["accuracy"]
    assert torch.equal(again.classifier.prompts.context, first.classifier.prompts.context)
    assert main(["interpret", back]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", back]) == 2
    assert "was imported and has no training state" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "run"], "expected a file or folder"),
        (["{file}"], "--output: expected the folder"),
        (["{file}", "--output", "run", "--data", "glyphs/tools"], "model: .* which CLIP"),
        (["{file}", "--output", "run", "--model", "glyphs-student"], "data: .* which dataset"),
        (["{file}", "--output", "run", "--epoch", "first"], "--epoch: expected a number or best"),
        (["{file}", "--output", "run", "--recipe", "cop"], "recipe: .* holds prompts of CoOp"),
        (["nowhere", "--output", "run"], "there is no file or folder nowhere"),
    ],
)
def test_what_is_missing_is_said(exported, capsys, arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if "--recipe" in arguments:
        arguments = [*arguments, "--model", "glyphs-student", "--data", "glyphs/tools"]
    words = [word.format(file=exported / "out") for word in arguments]
    assert main(["checkpoint", "import", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_help_and_unknown_commands(capsys):
    assert main(["checkpoint"]) == 0
    assert "vlfast checkpoint import FILE --output DIR" in capsys.readouterr().out
    assert main(["checkpoint", "imprt"]) == 2
    assert "did you mean 'import'" in capsys.readouterr().err
