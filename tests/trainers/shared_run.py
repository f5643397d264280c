"""Runs that tests/trainers/test_distributed.py compares between one process and two.

As a module (`python -m tests.trainers.shared_run FOLDER`) it is one of several processes that find
each other by torch's environment variables.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

import vlfast
from tests.conftest import make_tiny_model, squares_dataset
from vlfast.objectives import KINDS, Objective
from vlfast.trainers.run_folder import RunFolder

OPTIONS = {"shots": 8, "epochs": 3, "batch_size": 8, "n_ctx": 3, "lr": 0.1, "show_progress": False}


class Probe(Objective):
    """Owns a parameter that learns, one that no loss reads, and a batch norm."""

    kind = "probe"
    needs_frozen = True

    def prepare(self, task):
        generator = torch.Generator().manual_seed(5)
        self.direction = nn.Parameter(torch.randn(32, generator=generator))
        self.unread = nn.Parameter(torch.ones(3))
        self.norm = nn.BatchNorm1d(32)

    def forward(self, step):
        seen = self.norm(step.images) @ self.direction
        return {"probe": (seen.tanh() - step.logits.mean(dim=1).tanh()).square().mean()}


KINDS["probe"] = Probe


def train_all(clip, folder: Path) -> None:
    """An odd number of test and validation images, so that the shares of two are unequal."""
    data = squares_dataset(val=21, test=43)
    objectives = [{"kind": "labels"}, {"kind": "perplexity"}, {"kind": "probe"}]
    both = {"model": clip, "data": data, **OPTIONS}
    vlfast.fit("coop", objectives=objectives, output=folder / "probe", **both)
    vlfast.fit("coop", output=folder / "base", classes="base", clip_grad_norm=0.5, **both)
    small = {**both, "shots": 2, "epochs": 2, "batch_size": 32}
    vlfast.fit("coop", output=folder / "small", precision="bf16", **small)


def resume_and_refuse(clip, folder: Path) -> str:
    """Go on with the run in FOLDER/stopped; the error for a batch that two can't share."""
    data = squares_dataset(val=21, test=43)
    vlfast.resume(folder / "stopped", clip=clip, dataset=data, show_progress=False)
    try:
        odd = {**OPTIONS, "batch_size": 7}
        vlfast.fit("coop", model=clip, data=data, output=folder / "odd", **odd)
    except vlfast.VlfastError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    clip = vlfast.wrap_clip(make_tiny_model(), name="tiny")
    train_all(clip, folder)
    error = resume_and_refuse(clip, folder)
    rank = torch.distributed.get_rank()
    context = RunFolder(folder / "probe").read_tensors("last")[0]["context"]
    report = {"error": error, "processes": torch.distributed.get_world_size()}
    (folder / f"report-{rank}.json").write_text(json.dumps(report))
    assert context.isfinite().all()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
