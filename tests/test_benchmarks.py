"""The benchmarks' own promises: no time without parity, and memory that is what was taken."""

import sys
from functools import partial

import pytest
import torch

from benchmarks import bench_step, bench_text_tower, bench_vision_tower, contest, report
from benchmarks.contest import EAGER, OURS, TRAINING_STEP, Case, Problem, Result
from benchmarks.padded import CUT, PADDED


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


def make_in_terms(device):
    """EAGER yields two terms, each of which goes back by itself."""
    x = torch.arange(1.0, 5.0, device=device).requires_grad_()

    def terms():
        yield (x[:1] * x[:1]).sum()
        yield (x[1:] * x[1:]).sum()

    return Problem(
        sides={OURS: lambda: (x * x).sum(), EAGER: terms},
        leaves=[x],
        exact=lambda: [(x * x).sum().detach().double(), 2 * x.detach().double()],
        optimizer=torch.optim.SGD([x], lr=0.25),
    )


TINY = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2},
    "text_cfg": {"context_length": 77, "width": 64, "heads": 2, "layers": 3},
}
LARGER = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 48, "patch_size": 16, "width": 96, "head_width": 32, "layers": 1},
    "text_cfg": {"context_length": 77, "width": 96, "heads": 2, "layers": 2},
}
CASES = [
    Case("right", partial(make, 1.0)),
    Case("wrong", partial(make, 1.01)),
    *(
        Case(
            f"{classes} classes",
            partial(bench_text_tower.make, classes, config=TINY),
            baselines=(PADDED, CUT),
            alone=(PADDED,) if classes == 20 else (),
            over=("classes", classes),
        )
        for classes in (10, 20)
    ),
    Case(
        "step",
        partial(bench_step.make_cocoop, 2, 5, config=TINY),
        modes=(TRAINING_STEP,),
        baselines=(PADDED,),
        slow=True,
    ),
]
RIGHT, WRONG, TEN, TWENTY, STEP = CASES


def test_a_wrong_side_is_not_timed(monkeypatch):
    monkeypatch.setattr(contest, "take_turns", lambda *_: pytest.fail("timed"))
    for mode in contest.MODES:
        with pytest.raises(AssertionError, match="red parity"):
            contest.run_contest("op", __name__, WRONG, mode, "cpu")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_contest(monkeypatch, tmp_path):
    monkeypatch.setattr(contest, "SECONDS_OF_ROUND", 0.001)
    result = contest.run_contest("op", __name__, RIGHT, "forward+backward", "cpu")
    assert result.errors[OURS] <= 1e-6 and result.errors[EAGER] <= 1e-6
    assert 30 < result.peaks[OURS] < 45 and 60 < result.peaks[EAGER] < 90
    assert result.times[OURS] > 0 and result.ratios[OURS] == 1 and result.gflops > 0
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    report.write("op", [result], "a-device", {"threads": 1}, "a yardstick")
    assert sorted(x.suffix for x in tmp_path.iterdir()) == [".json", ".md", ".png"]
    (row,) = (x for x in report.table([result]) if x.startswith("| right"))
    assert row.count("|") == report.table([result])[0].count("|")


def test_prompted_images_agree():
    problem = bench_vision_tower.make(2, 3, 1, "cpu", config=TINY)
    for mode in contest.MODES:
        calls = {side: contest.first_call(problem, side, mode) for side in problem.sides}
        assert all(error < 1e-5 for error in contest.errors(problem, calls).values())


def test_a_gradient_of_nan_is_an_error():
    calls = {OURS: contest.Call([torch.zeros(()), torch.tensor([float("nan")] * 4)], 0.0)}
    found = contest.errors(make(1.0, "cpu"), calls)
    with pytest.raises(AssertionError, match="red parity"):
        contest.check_parity({**found, EAGER: 0.0})


@pytest.mark.parametrize("mode", [*contest.MODES, TRAINING_STEP])
def test_terms_add_up(mode):
    problem = make_in_terms("cpu")
    calls = {side: contest.first_call(problem, side, mode) for side in problem.sides}
    assert all(error == 0 for error in contest.errors(problem, calls).values())
    before = problem.leaves[0].detach().clone()
    contest.step(problem, EAGER, mode)()
    moved = problem.leaves[0].detach() - before
    assert torch.equal(moved, -0.25 * 2 * before if mode == TRAINING_STEP else 0 * before)


def test_a_side_that_computes_another_thing_is_not_raced():
    contest.check_parity({OURS: 1e-6, PADDED: 9e-5}, tolerance=1e-4)
    with pytest.raises(AssertionError, match="another thing"):
        contest.check_parity({OURS: 1e-6, PADDED: 1e-6, CUT: 2e-4}, tolerance=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        partial(bench_text_tower.make, 7),
        partial(bench_text_tower.make, 7, per="class"),
        partial(bench_text_tower.make, 7, position="middle"),
        partial(bench_text_tower.make, 7, per="image", images=2, n_ctx=4),
        partial(bench_step.make_coop, 7, images=3),
        partial(bench_step.make_cocoop, 3, 7),
        partial(bench_step.make_coop, 7, images=3, stored=True),
        partial(bench_step.make_promptkd, 7, images=3, depth=2, teacher_config=LARGER),
    ],
    ids=["all", "class", "middle", "image", "CoOp", "CoCoOp", "stored CoOp", "PromptKD"],
)
@pytest.mark.parametrize("mode", contest.MODES)
def test_all_towers_agree(make, mode, monkeypatch):
    monkeypatch.setattr("benchmarks.padded.CLASSES_AT_ONCE", 3)
    problem = make("cpu", config=TINY)
    calls = {side: contest.first_call(problem, side, mode) for side in problem.sides}
    found = contest.errors(problem, calls)
    assert OURS in found and PADDED in found
    # Batch norm divides by how little the images differ, and rounding grows with it.
    assert max(found.values()) < (1e-4 if problem.tolerance == 1e-3 else 1e-5), found
    assert mode == "forward" or all((x != 0).any() for x in calls[PADDED].outputs)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_contest_of_towers(monkeypatch, tmp_path):
    monkeypatch.setattr(contest, "SECONDS_OF_ROUND", 0.001)
    results = [contest.run_contest("tower", __name__, c, c.modes[-1], "cpu") for c in (TEN, TWENTY)]
    for result in results:
        assert result.peaks[PADDED] > 2 * result.peaks[OURS] > 0
        assert result.times.keys() == result.ratios.keys() == {OURS, PADDED, CUT}
        assert result.gflops > 0
    assert results[0].alone == [] and results[1].alone == [PADDED]
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    report.write("tower", results, "a-device", {"threads": 1}, "a yardstick")
    assert {x.name for x in tmp_path.iterdir()} == {
        "a-device-tower.json",
        "a-device-tower.md",
        "a-device-tower.png",
        "a-device-tower-over-classes.png",
    }
    text = (tmp_path / "a-device-tower.md").read_text()
    assert "(one call)" in text and "extrapolated" not in text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_contest_of_steps(monkeypatch):
    monkeypatch.setattr(contest, "SECONDS_OF_SLOW", 0.0)
    result = contest.run_contest("step", __name__, STEP, TRAINING_STEP, "cpu")
    assert result.times.keys() == {OURS, PADDED, CUT} and result.peaks.keys() == {OURS, PADDED}
    assert result.peaks[PADDED] > 0


def test_a_side_is_extrapolated_from_the_largest_size_measured(tmp_path):
    def at(classes, **times):
        sides = {OURS: 2e4 * classes, **times}
        return Result(
            "tower",
            f"{classes} classes",
            "forward+backward",
            baselines=(PADDED,),
            over=("classes", classes),
            times=sides,
            ratios={side: time / sides[OURS] for side, time in sides.items()},
            errors=dict.fromkeys(sides, 1e-6),
            peaks=dict.fromkeys(sides, 5.0 * classes),
        )

    results = [at(10, **{PADDED: 1e6}), at(40, **{PADDED: 8e6}), at(100)]
    rows = [row for row in report.table(results) if "classes" in row]
    assert ["~" in row for row in rows] == [False, False, True]
    cells = [cell.strip() for cell in rows[-1].split("|")]
    assert "~10.0" in cells and "~500" in cells and "2000" in cells
    (note,) = report.notes(results)
    assert PADDED in note and "100 classes" in note and "extrapolated" in note
    report.plot_over_sizes("tower", results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
