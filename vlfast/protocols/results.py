"""Finished runs below a folder as rows of a protocol: what reports and comparisons read.

A run that a protocol made has cell.yaml beside its config: {protocol, also, method, source,
dataset, shots, seed, given}; "also" lists other protocols that the same run serves. Tests on other
datasets lie in evaluations/NAME.json ({protocols, data: {name, fingerprint, images}, accuracy,
versions, device}), what was predicted there in evaluations/NAME.safetensors; a slash in NAME is a
dash in the file's name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vlfast.errors import VlfastError
from vlfast.evaluation.predictions import ByTest, from_tensors
from vlfast.run import method_name
from vlfast.trainers.config import build_config
from vlfast.trainers.run_folder import PREDICTIONS, RunFolder, read_tensors

CELL = "cell.yaml"
EVALUATIONS = "evaluations"

# {"test": score} or {"base": score, "new": score, "harmonic_mean": percent}; a score is
# {"accuracy", "macro_f1", "images"}.
Scores = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """One finished run.

    protocol: few-shot, base-to-new, cross-dataset or domain-generalization. source: the dataset
    that the protocol trains on; dataset: what this run was trained on, another one where a method
    learns from each target's own images. shots: 0 is all images. epochs: 0 where nothing was
    trained. scores: by test set: the dataset's name, "DATASET/DOMAIN" for its domains (not in
    cross-dataset), and the names of the datasets that it was also tested on. options, record: what
    config.yaml and result.json hold.
    """

    folder: Path
    protocol: str
    method: str
    model: str
    source: str
    dataset: str
    shots: int
    seed: int
    epochs: int
    scores: Mapping[str, Scores]
    train_seconds: float
    options: Mapping[str, Any] = field(repr=False)
    record: Mapping[str, Any] = field(repr=False)

    def metrics(self) -> list[dict[str, Any]]:
        """A row an epoch."""
        return RunFolder(self.folder).read_metrics()

    def predictions(self) -> dict[str, ByTest]:
        """What was predicted, by test set as in ``scores``, then by "test", "base" or "new"; only
        test sets whose predictions were kept."""
        found: dict[str, ByTest] = {}
        own = self.folder / f"{PREDICTIONS}.safetensors"
        if own.is_file():
            for test, predictions in from_tensors(*read_tensors(own)).items():
                domain, _, part = test.rpartition("/")
                name = f"{self.dataset}/{domain}" if domain else self.dataset
                found.setdefault(name, {})[part] = predictions
        for name in self.scores:
            file = evaluation_file(self.folder, name).with_suffix(".safetensors")
            if file.is_file():
                found[name] = from_tensors(*read_tensors(file))
        return found


def evaluation_file(folder: Path, dataset: str) -> Path:
    """Where a run's test on another dataset is kept."""
    return folder / EVALUATIONS / f"{dataset.replace('/', '-')}.json"


def read_results(root: str | Path) -> list[Result]:
    """Every finished run below ``root``, in the order of their paths; one that serves two protocols
    is there twice.

    Raises FileNotFoundError if there is no such folder, VlfastError naming a file that is damaged.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"results: there is no folder {root}")
    found: list[Result] = []
    for file in sorted(root.rglob("result.json")):
        cell = read_cell(file.parent)
        if "protocol" in cell:
            protocols = [cell["protocol"], *cell.get("also", [])]
            found += [read_result(file.parent, protocol) for protocol in protocols]
        else:
            found.append(read_result(file.parent))
    return found


def read_result(folder: Path, protocol: str | None = None) -> Result:
    """One finished run. protocol: one of those that it serves, by default the first."""
    options = RunFolder(folder).read_options()
    result = read_json(folder / "result.json")
    try:
        return _result_of(folder, options, result, protocol)
    except (KeyError, TypeError, AttributeError) as error:
        raise VlfastError(
            f"results: config.yaml or result.json in {folder} is not what a run writes; it lacks "
            f"{error}"
        ) from error


def _result_of(
    folder: Path, options: dict[str, Any], result: dict[str, Any], protocol: str | None
) -> Result:
    cell = read_cell(folder)
    dataset = result["data"]["name"]
    evaluations = sorted((folder / EVALUATIONS).glob("*.json"))
    protocol = protocol or cell.get("protocol") or _protocol_of(options, bool(evaluations))
    own = {key: value for key, value in result["accuracy"].items() if key != "domains"}
    scores: dict[str, Scores] = {dataset: own} if own else {}
    if protocol != "cross-dataset":
        for domain, of_domain in result["accuracy"].get("domains", {}).items():
            scores[f"{dataset}/{domain}"] = of_domain
    for file in evaluations:
        evaluation = read_json(file)
        if protocol in evaluation.get("protocols", [protocol]):
            scores[evaluation["data"]["name"]] = evaluation["accuracy"]
    return Result(
        folder=folder,
        protocol=protocol,
        method=cell.get("method") or method_name(build_config(options)),
        model=options["model"]["name"],
        source=cell.get("source", dataset),
        dataset=dataset,
        shots=options["data"]["shots"],
        seed=options["seed"],
        epochs=result["epochs"],
        scores=scores,
        train_seconds=result["train_seconds"],
        options=options,
        record=result,
    )


def _protocol_of(options: dict[str, Any], tested_elsewhere: bool) -> str:
    """What a run that no protocol made comes closest to."""
    if options["data"]["classes"] != "all":
        return "base-to-new"
    return "cross-dataset" if tested_elsewhere else "few-shot"


def read_cell(folder: Path) -> dict[str, Any]:
    """What cell.yaml says; {} where there is none."""
    file = folder / CELL
    if not file.is_file():
        return {}
    try:
        cell = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise VlfastError(f"results: {file} is not valid YAML") from error
    if not isinstance(cell, dict):
        raise VlfastError(f"results: {file} does not say what the run is a cell of")
    return cell


def read_json(file: Path) -> dict[str, Any]:
    """A file that is written whole. VlfastError for one that is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise VlfastError(f"results: {file} is not valid JSON") from error
