"""Where a run computes: devices by name, and the accelerate engine."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DataLoaderConfiguration

from vlfast.errors import VlfastError
from vlfast.trainers.config import Precision


def resolve_device(name: str) -> torch.device:
    """ "auto" is a GPU if there is one, else the CPU; or "cpu", "cuda", "cuda:1".

    Raises VlfastError for another name, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise VlfastError(f'device: expected "auto", "cpu", "cuda" or "cuda:N", got {name!r}')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise VlfastError(
            f"device: {name} asked for, but torch finds {torch.cuda.device_count()} GPUs"
        )
    return device


def make_accelerator(device: torch.device, precision: Precision) -> Accelerator:
    """The engine for this device and precision.

    accelerate keeps its state for the whole process. Where an earlier run left one that does not
    fit, it is set up anew: an Accelerator of that run is not to be used afterwards.
    """
    if precision == "fp16" and device.type == "cpu":
        raise VlfastError("model.precision: fp16 needs a GPU; on a CPU use fp32 or bf16")
    mixed_precision = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[precision]
    left = AcceleratorState._shared_state
    if left and (left["_mixed_precision"], left["device"].type) != (mixed_precision, device.type):
        AcceleratorState._reset_state(reset_partial_state=True)
    elif PartialState._shared_state and PartialState().device.type != device.type:
        PartialState._reset_state()
    if device.index is not None:
        torch.cuda.set_device(device)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=mixed_precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
    )
