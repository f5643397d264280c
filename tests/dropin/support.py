"""What the drop-in's tests compare, and replicas as nn.DataParallel makes them."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn


def distance(found: Tensor, expected: Tensor) -> float:
    """Of the largest expected magnitude."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def guard_of(model: nn.Module):
    return model.text_encoder.__dict__["_vlfast"]


def replica_of(model: nn.Module, tensors: dict[Tensor, Tensor] | None = None) -> nn.Module:
    """What torch.nn.parallel.replicate leaves: parameters are plain attributes, no leaves, and
    ``tensors`` says which stand for which."""
    tensors = {} if tensors is None else tensors
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        replica._former_parameters = OrderedDict()
        for name, child in module._modules.items():
            if child is None:
                replica._modules[name] = None
            else:
                setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
                continue
            tensor = tensors.get(parameter, parameter).clone()
            setattr(replica, name, tensor)
            replica._former_parameters[name] = tensor
        for name, buffer in module._buffers.items():
            setattr(replica, name, None if buffer is None else buffer.clone())
    return replicas[model]
