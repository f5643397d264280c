"""Every check lets the right argument through, and a wrong one raises with its name in front."""

import subprocess
import sys

import pytest
import torch

from vlfast.ops import checks


def test_ops_import_nothing_heavy_but_torch():
    heavy = ("open_clip", "torchvision", "accelerate", "matplotlib", "jsonargparse", "PIL")
    program = (
        "import sys; from vlfast.ops import plpp_loss; "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_floating():
    checks.check_floating("x", torch.zeros(2, 3), ("B", "d"))
    checks.check_floating("x", torch.zeros(2, 3, dtype=torch.bfloat16), ("B", "d"))
    checks.check_floating("x", torch.nn.Parameter(torch.zeros(2)), ("d",))
    with pytest.raises(TypeError, match=r"x: expected a floating tensor \[B, d\], got list"):
        checks.check_floating("x", [[1.0]], ("B", "d"))
    with pytest.raises(TypeError, match=r"x: expected a floating .*got torch.int64 \[2, 3\]"):
        checks.check_floating("x", torch.zeros(2, 3, dtype=torch.int64), ("B", "d"))
    with pytest.raises(ValueError, match=r"x: .*\[B, d\], got torch.float32 \[2\] on cpu"):
        checks.check_floating("x", torch.zeros(2), ("B", "d"))


def test_dtype():
    checks.check_dtype("labels", torch.zeros(2, dtype=torch.int64), torch.int64, ("B",))
    with pytest.raises(TypeError, match=r"labels: expected a tensor torch.int64 \[B\]"):
        checks.check_dtype("labels", torch.zeros(2, dtype=torch.int32), torch.int64, ("B",))
    with pytest.raises(ValueError, match=r"labels: .*got torch.int64 \[2, 1\]"):
        checks.check_dtype("labels", torch.zeros(2, 1, dtype=torch.int64), torch.int64, ("B",))


def test_same_size():
    a, b = torch.zeros(2, 3), torch.zeros(4, 3)
    checks.check_same_size("d", ("a", a, 1), ("b", b, 1))
    with pytest.raises(ValueError, match=r"b: expected B = 2 in dimension 0, as a \[2, 3\] has"):
        checks.check_same_size("B", ("a", a, 0), ("b", b, 0))


def test_same_device():
    a, elsewhere = torch.zeros(2), torch.zeros(2, device="meta")
    checks.check_same_device(a=a, b=None, c=1.0, d=torch.zeros(3))
    checks.check_same_device(a=elsewhere, scale=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"b: expected device cpu, as a has, got .* on meta"):
        checks.check_same_device(a=a, b=elsewhere)


def test_not_empty():
    checks.check_not_empty("x", torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"x: expected at least one element, .*\[0, 3\]"):
        checks.check_not_empty("x", torch.zeros(0, 3))


@pytest.mark.parametrize("value", [1, 0.5, torch.tensor(2.0), torch.tensor(2.0).half()])
def test_positive_and_weight_take(value):
    checks.check_positive("scale", value)
    checks.check_weight("weight", value)


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan"), -0.5])
def test_positive_and_weight_refuse_numbers(value):
    with pytest.raises(ValueError, match=r"scale: expected a finite number > 0.*got"):
        checks.check_positive("scale", value)
    with pytest.raises(ValueError, match=r"weight: expected a finite number >= 0.*got"):
        checks.check_weight("weight", value)


@pytest.mark.parametrize("value", ["1", None, True, torch.tensor(1)])
def test_positive_refuses_types(value):
    with pytest.raises(TypeError, match="scale: expected a finite number"):
        checks.check_positive("scale", value)


def test_positive_refuses_zero_and_a_vector():
    checks.check_weight("weight", 0)
    with pytest.raises(ValueError, match="scale: "):
        checks.check_positive("scale", 0)
    with pytest.raises(ValueError, match=r"scale: .*got torch.float32 \[1\]"):
        checks.check_positive("scale", torch.ones(1))


def test_values_are_read_only_on_request(monkeypatch):
    negative = torch.tensor(-1.0, requires_grad=True)
    monkeypatch.delenv("VLFAST_CHECK", raising=False)
    assert not checks.checking_values()
    checks.check_positive("scale", negative)
    monkeypatch.setenv("VLFAST_CHECK", "0")
    assert not checks.checking_values()
    monkeypatch.setenv("VLFAST_CHECK", "1")
    assert checks.checking_values()
    with pytest.raises(ValueError, match=r"scale: .*got -1.0"):
        checks.check_positive("scale", negative)


def test_range():
    labels = torch.tensor([0, 5])
    with pytest.raises(ValueError, match="labels: expected values from 0 to 4, got 0 to 5"):
        checks.check_in_range("labels", labels, 5)
    checks.check_in_range("labels", labels, 6)
    checks.check_in_range("labels", labels.to("meta"), 5)


def test_frozen():
    checks.check_frozen("embedding", torch.zeros(2))
    checks.check_frozen("scale", 1.0)
    with pytest.raises(ValueError, match=r"embedding: .*pass embedding.detach\(\)"):
        checks.check_frozen("embedding", torch.zeros(2, requires_grad=True))


def test_top_k():
    checks.check_top_k(1, 5, "words")
    checks.check_top_k(5, 5, "words")
    for value in (0, 6, -1):
        with pytest.raises(ValueError, match=rf"top_k: .*1 to 5 \(words\), got {value}"):
            checks.check_top_k(value, 5, "words")
    for value in (2.0, True, "2"):
        with pytest.raises(TypeError, match="top_k: expected an integer"):
            checks.check_top_k(value, 5, "words")


def test_flag():
    checks.check_flag("detach_targets", False)
    with pytest.raises(TypeError, match="detach_targets: expected True or False, got int 1"):
        checks.check_flag("detach_targets", 1)


def test_reduction():
    checks.check_reduction("mean", ("none", "mean"))
    with pytest.raises(ValueError, match="reduction: expected one of none, mean, got 'avg'"):
        checks.check_reduction("avg", ("none", "mean"))
