"""Fixtures of the op tests."""

import pytest
import torch


@pytest.fixture
def poisoned_memory():
    """Uninitialised tensors hold NaN, so that an element left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
