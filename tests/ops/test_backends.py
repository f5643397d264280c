"""Which backend serves what, and how that is reported."""

import pytest
import torch

from vlfast.ops import backends, symmetric_kl_loss


def test_a_row_for_every_op_and_device():
    rows = backends.backend_report()
    assert [(row.op, row.device) for row in rows] == [
        (op, device) for op in backends.OPS for device in ("cpu", "cuda")
    ]
    assert all(row.reason for row in rows)


def test_the_reference_can_be_asked_for():
    student, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    with backends.reference_only():
        assert not backends.kernel_serves("symmetric_kl", student)
        with backends.reference_only():
            pass
        loss = symmetric_kl_loss(student, teacher)
        served = {row.backend for row in backends.backend_report() if row.device == "cpu"}
    assert "SymmetricKL" not in type(loss.grad_fn).__name__
    assert served == {"reference"}
    torch.testing.assert_close(loss, symmetric_kl_loss(student, teacher))


def test_requests_for_the_reference_may_overlap():
    first, second = backends.reference_only(), backends.reference_only()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert backends.reference_must_serve()
    second.__exit__(None, None, None)
    assert not backends.reference_must_serve()


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((8, 0), "8.0 9.0", True),
        ((8, 9), "8.0 9.0", True),
        ((8, 0), "8.6 9.0", False),
        ((7, 5), "8.0 9.0", False),
        ((10, 0), "8.0 9.0", True),
        ((12, 0), "8.0 9.0", True),
        ((9, 0), "8.0 9.0a", True),
        ((10, 0), "8.0 9.0a", False),
        ((12, 0), "8.0 10.0", True),
    ],
)
def test_gpus_that_the_build_has_code_for(capability, archs, runs):
    reason = backends.why_not_compiled_for(capability, archs)
    assert (reason is None) == runs
    if not runs:
        assert f"VLFAST_CUDA_ARCHS={capability[0]}.{capability[1]}" in reason
