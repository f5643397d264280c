"""Runs as a protocol leaves them, without training."""

import json

import yaml

from vlfast.protocols.cells import Cell
from vlfast.trainers.recipes import resolve_config
from vlfast.trainers.run_folder import RunFolder


def score(accuracy):
    return {"accuracy": accuracy, "macro_f1": accuracy, "images": 10}


def make_cell(folder, protocol="few-shot", *, recipe="coop", epochs=2, targets=(), **data):
    """A cell of glyphs/tools with options of its own."""
    given = {
        "recipe": {"name": recipe, "epochs": epochs},
        "data": {"name": "glyphs/tools", "classes": "all", "shots": 2, **data},
        "seed": 1,
    }
    return Cell(
        number=1,
        folder=folder,
        protocol=protocol,
        method=recipe,
        source="glyphs/tools",
        dataset="glyphs/tools",
        shots=2,
        seed=1,
        given=given,
        config=resolve_config(given),
        targets=tuple(targets),
    )


def finish(cell, accuracy):
    """Write what a finished run of the cell leaves. accuracy: as in result.json."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    cell.write()
    RunFolder(cell.folder).start(cell.config)
    RunFolder(cell.folder).write_result(
        {
            "accuracy": accuracy,
            "epochs": cell.config.recipe.epochs,
            "data": {"name": cell.dataset},
            "train_seconds": 1.0,
        }
    )


def evaluate(cell, name, accuracy, protocols):
    file = cell.folder / "evaluations" / f"{name.replace('/', '-')}.json"
    file.parent.mkdir(exist_ok=True)
    about = {"protocols": protocols, "data": {"name": name}, "accuracy": {"test": score(accuracy)}}
    file.write_text(json.dumps(about))


def read_yaml(file):
    return yaml.safe_load(file.read_text())
