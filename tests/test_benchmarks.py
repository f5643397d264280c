"""The benchmarks' own promises: no time without parity, and memory that is what was taken."""

import sys
from functools import partial

import pytest
import torch

from benchmarks import contest, report
from benchmarks.contest import EAGER, OURS, Case, Problem


def make(factor, device):
    """OURS is wrong by ``factor``, and takes 32 MB for a moment where the other side takes 64."""
    x = torch.arange(1.0, 5.0, device=device).requires_grad_()

    def loss(by, megabytes):
        room = torch.ones(megabytes * 2**18, device=device)
        return by * (x * x).sum() * room[0]

    return Problem(
        sides={OURS: lambda: loss(factor, 32), EAGER: lambda: loss(1.0, 64)},
        leaves=[x],
        exact=lambda: [(x * x).sum().detach().double(), 2 * x.detach().double()],
        flop=1e3,
    )


CASES = [Case("right", partial(make, 1.0)), Case("wrong", partial(make, 1.01))]


def test_a_wrong_side_is_not_timed(monkeypatch):
    monkeypatch.setattr(contest, "take_turns", lambda *_: pytest.fail("timed"))
    for mode in contest.MODES:
        with pytest.raises(AssertionError, match="red parity"):
            contest.run_contest("op", __name__, CASES[1], mode, "cpu")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_contest(monkeypatch, tmp_path):
    monkeypatch.setattr(contest, "SECONDS_OF_ROUND", 0.001)
    result = contest.run_contest("op", __name__, CASES[0], "forward+backward", "cpu")
    assert result.errors[OURS] <= 1e-6 and result.errors[EAGER] <= 1e-6
    assert 30 < result.peaks[OURS] < 45 and 60 < result.peaks[EAGER] < 90
    assert result.times[OURS] > 0 and result.ratios[OURS] == 1 and result.gflops > 0
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    report.write("op", [result], "a-device", {"threads": 1}, "a yardstick")
    assert sorted(x.suffix for x in tmp_path.iterdir()) == [".json", ".md", ".png"]
    (row,) = (x for x in report.table([result]) if x.startswith("| right"))
    assert row.count("|") == report.table([result])[0].count("|")
