"""Test a run on other datasets, each kept by itself: `python -m vlfast.protocols.targets RUN
PROTOCOL TARGETS`, a process that a sweep starts; TARGETS is JSON, a list of {name, root,
classnames}."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlfast.errors import VlfastError
from vlfast.evaluation.predictions import ByTest, to_tensors
from vlfast.protocols.cells import Target
from vlfast.protocols.results import evaluation_file, read_json
from vlfast.run import Run, load
from vlfast.trainers.files import replacing
from vlfast.trainers.run_folder import RunFolder
from vlfast.training import device_name, versions


def evaluate_on(run: Run, target: Target, protocol: str) -> None:
    """Write the evaluation of ``run`` on the target's test images, all classes, and its
    predictions; the JSON comes last, so what has one is whole. One that another protocol has made
    counts for this one too."""
    file = evaluation_file(run.folder.path, target.name)
    if file.is_file():
        evaluation = read_json(file)
        evaluation["protocols"] = sorted({*evaluation["protocols"], protocol})
    else:
        evaluation = {"protocols": [protocol], **_evaluation(run, target, file)}
    with replacing(file) as path:
        path.write_text(json.dumps(evaluation, indent=2) + "\n", encoding="utf-8")


def _evaluation(run: Run, target: Target, file: Path) -> dict[str, Any]:
    dataset = replace(target.load(), domains={})
    if not len(dataset.test):
        raise VlfastError(f"--datasets: {target.name} has no test images")
    predictions: ByTest = {}
    accuracy = run.evaluate(dataset, predictions=predictions)
    RunFolder(file.parent).write_tensors(file.stem, *to_tensors(predictions))
    return {
        "data": {
            "name": target.name,
            "fingerprint": dataset.fingerprint(),
            "images": {"test": len(dataset.test)},
        },
        "accuracy": accuracy,
        "versions": versions(),
        "device": device_name(run.classifier.clip.device),
    }


def main(argv: Sequence[str]) -> int:
    """0, or 2 if the run can't be loaded or a target failed, after the others."""
    folder, protocol, targets = argv
    try:
        run = load(folder)
        evaluation_file(Path(folder), "any").parent.mkdir(exist_ok=True)
    except (VlfastError, OSError) as error:
        print(f"vlfast: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    failed = []
    for values in json.loads(targets):
        target = Target(**values)
        try:
            evaluate_on(run, target, protocol)
        except (VlfastError, OSError, ValueError) as error:
            failed.append(f"{target.name}: {' '.join(str(error).split())}")
        else:
            print(f"tested on {target.name}", flush=True)
    if failed:
        print(f"vlfast: {'; '.join(failed)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
