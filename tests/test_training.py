"""What a run writes down of where it was computed."""

import torch

from vlfast.training import device_name


def test_device_name(monkeypatch):
    assert device_name(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert device_name(torch.device("cuda:1")) == "GPU 1"
