"""Whole training steps that read what frozen models make of the images: CoOp's and PromptKD's."""

from __future__ import annotations

import pytest

from benchmarks.bench_step import coop, promptkd
from benchmarks.contest import TRAINING_STEP

CASES = [coop(100, stored=True), promptkd(100, full=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stored_step(contest, case):
    contest(case, TRAINING_STEP)
