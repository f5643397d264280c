"""`python -m vlfast.dropin.probe "package.module:build"`: a training step of yours before and after
``vlfast.accelerate``, its numbers and its time."""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlfast.dropin.accelerate import AcceleratedTextEncoder, accelerate
from vlfast.dropin.snapshot import Snapshot
from vlfast.dropin.swap import STATE, is_swapped
from vlfast.errors import VlfastError

LOSS = 1e-5
# Of the largest number of a gradient: in fp32, where deep prompts go through fp16 (MaPLe, IVLP,
# PromptSRC), and in half precision, where the codebase's own rounding is of this size.
GRADIENTS = {"fp32": 1e-4, "fp16 deep prompts": 5e-3, "half precision": 5e-2}
# A gradient below this part of the largest is zero but for rounding, as behind a batch norm.
ZERO = 1e-6
SHOWN = 20


class Observed(NamedTuple):
    """Of a step: the loss, and every gradient by its parameter's name."""

    loss: float
    gradients: dict[str, Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where the numbers stay, 1 where they do not, 2 where the step can't be probed."""
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        models, step = load(options.build, options.path)
        return probe(models, step, options.steps, options.tolerance)
    except VlfastError as error:
        print(f"vlfast.dropin.probe: {error}", file=sys.stderr)
        return 2


def load(spec: str, path: str | None = None) -> tuple[list[nn.Module], Callable[[], object]]:
    """The models and the step that "package.module:build" returns, looked for in ``path`` first."""
    module, _, name = spec.partition(":")
    if not (module and name):
        raise VlfastError(f'expected "package.module:build", got {spec!r}')
    if path is not None:
        sys.path.insert(0, path)
    try:
        build = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise VlfastError(
            f"there is no module {error.name!r} here or in PYTHONPATH; --path DIR adds a folder"
        ) from None
    if not callable(build):
        raise VlfastError(f"module {module!r} has no function {name!r}")
    built = build()
    if not isinstance(built, tuple) or len(built) != 2:
        raise VlfastError(f"{spec} should return (model, step), got {type(built).__name__}")
    models, step = built
    models = list(models) if isinstance(models, (list, tuple)) else [models]
    for model in models:
        if not isinstance(model, nn.Module):
            raise VlfastError(
                f"{spec} should return a model or a list of models first, got "
                f"{type(model).__name__}"
            )
    if not models:
        raise VlfastError(f"{spec} returned no models")
    if not callable(step):
        raise VlfastError(
            f"{spec} should return a function that runs a step second, got {type(step).__name__}"
        )
    return models, step


def probe(
    models: Sequence[nn.Module],
    step: Callable[[], object],
    steps: int = 5,
    tolerance: float | None = None,
) -> int:
    """Accelerate ``models`` and print what becomes of ``step``; 0 where its numbers stay, else 1.

    Raises VlfastError where a model is accelerated already, and where step returns no loss, leaves
    no gradients, has numbers that are not finite or can't be repeated.
    """
    if any(is_swapped(module) for model in models for module in model.modules()):
        raise VlfastError(
            "the model is accelerated already; build() should leave that to the probe"
        )
    snapshot = Snapshot(models)
    if snapshot.optimizers:
        print("restored between runs: parameters, buffers, random state, optimiser")
    else:
        print("restored between runs: parameters, buffers, random state; no optimiser was found")
    before, again = (_observe(models, step, snapshot) for _ in range(2))
    error = _worst({"loss": _loss_difference(before, again), **_differences(before, again)})
    if math.isnan(error):
        raise VlfastError(
            "step() has a loss or gradients that are not finite, before any change; with a "
            "gradient scaler, let build() take steps until its scale fits"
        )
    if error > GRADIENTS["half precision"]:
        raise VlfastError(
            f"two runs of step() from the same state differ by {error:.1e} before anything is "
            "changed; it should take the same batch each time"
        )
    seconds_before, last_before = _time(models, step, steps, snapshot)

    reports = [accelerate(model) for model in models]
    first, second = (_observe(models, step, snapshot) for _ in range(2))
    print("\n".join(map(str, reports)))
    kind = _rounding(models)
    limit = GRADIENTS[kind] if tolerance is None else tolerance
    loss_limit = LOSS if kind != "half precision" else limit
    passed = _print_parity(before, (first, second), loss_limit, limit, kind)
    if not passed and error:
        print(f"two runs of step() before anything was changed differ by {error:.1e}")

    seconds_after, last_after = _time(models, step, steps, snapshot)
    print(f"loss of step {steps}: {last_before:.7g} before, {last_after:.7g} after")
    threads = torch.get_num_threads()
    print(
        f"time of a step, median of {steps}: {seconds_before:.4g} s before, "
        f"{seconds_after:.4g} s after: {seconds_before / seconds_after:.1f}x "
        f"({threads} thread{'s' if threads > 1 else ''})"
    )
    return 0 if passed else 1


def _observe(
    models: Sequence[nn.Module], step: Callable[[], object], snapshot: Snapshot
) -> Observed:
    snapshot.restore()
    loss = _loss(step())
    gradients = {
        f"{i}.{name}" if len(models) > 1 else name: parameter.grad.detach().clone()
        for i, model in enumerate(models)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    if not gradients:
        raise VlfastError(
            "step() left no gradient in the models; it should call backward, and not set "
            "gradients to zero after it"
        )
    return Observed(loss, gradients)


def _loss(returned: object) -> float:
    if isinstance(returned, Tensor) and returned.numel() == 1:
        return float(returned.detach())
    if isinstance(returned, float):
        return returned
    what = f"a tensor {list(returned.shape)}" if isinstance(returned, Tensor) else repr(returned)
    raise VlfastError(f"step() should return its loss, one number, got {what}")


def _time(
    models: Sequence[nn.Module], step: Callable[[], object], steps: int, snapshot: Snapshot
) -> tuple[float, float]:
    """The median, in seconds, of steps that follow each other, and the last one's loss."""
    snapshot.restore()
    devices = {p.device for model in models for p in model.parameters() if p.is_cuda}
    seconds, loss = [], 0.0
    for _ in range(steps):
        _wait(devices)
        start = time.perf_counter()
        returned = step()
        _wait(devices)
        seconds.append(time.perf_counter() - start)
        loss = _loss(returned)
    return statistics.median(seconds), loss


def _wait(devices: set[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)


def _loss_difference(before: Observed, after: Observed) -> float:
    return abs(after.loss - before.loss) / max(1.0, abs(before.loss))


def _differences(before: Observed, after: Observed) -> dict[str, float]:
    """Of every gradient, of its largest number; infinite where it is missing on one side."""
    largest = max((float(g.abs().max()) for g in before.gradients.values()), default=0.0)
    found = {}
    for name in before.gradients.keys() | after.gradients.keys():
        mine, other = after.gradients.get(name), before.gradients.get(name)
        if mine is None or other is None:
            found[name] = float("inf")
            continue
        size, error = float(other.abs().max()), float((mine.double() - other.double()).abs().max())
        scale = size if size > ZERO * largest else largest
        found[name] = error / scale if scale else error
    return found


def _worst(differences: dict[str, float]) -> float:
    # max() passes over NaN.
    return float(torch.tensor(list(differences.values())).max())


def _rounding(models: Sequence[nn.Module]) -> str:
    """Which of GRADIENTS' kinds the accelerated text encoders are of."""
    kind = "fp32"
    for module in (m for model in models for m in model.modules()):
        if not isinstance(module, AcceleratedTextEncoder):
            continue
        half = [p for p in module.parameters() if p.dtype in (torch.float16, torch.bfloat16)]
        calls = module.__dict__[STATE].encoder.last.values()
        if half or any(call.autocast is not None for call in calls):
            return "half precision"
        for block in module.transformer.resblocks:
            if hasattr(block, "compound_prompt_nctx") or getattr(block, "add_prompt", False):
                kind = "fp16 deep prompts"
    return kind


def _print_parity(
    before: Observed, runs: Sequence[Observed], loss_limit: float, limit: float, kind: str
) -> bool:
    """``runs``: the first step, in which the accelerated model checks itself, and one after it."""
    passed = True
    for name, after in zip(("first", "second"), runs, strict=True):
        error, differences = _loss_difference(before, after), _differences(before, after)
        same = error <= loss_limit and _worst(differences) <= limit
        passed &= same
        print(
            f"{name} step from the same state: {'same' if same else 'NOT THE SAME'}\n"
            f"  loss {before.loss:.7g} before, {after.loss:.7g} after: {error:.1e} "
            f"(limit {loss_limit:.0e})\n"
            f"  gradients, of the largest number of each (limit {limit:.0e}, {kind}):"
        )
        worst_first = sorted(differences, key=lambda n: differences[n], reverse=True)
        for parameter in worst_first[:SHOWN]:
            print(f"    {parameter}: {differences[parameter]:.1e}")
        if len(worst_first) > SHOWN:
            print(f"    and {len(worst_first) - SHOWN} that differ less")
    return passed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vlfast.dropin.probe",
        description="Runs a training step of yours before and after vlfast.accelerate, from the "
        "same state, and prints what was changed, the parity and the ratio of times. Exit code 1 "
        "where the numbers differ.",
    )
    parser.add_argument(
        "build",
        help='"package.module:build", a function that returns (model, step): the model or a list '
        "of them, and a function that runs forward and backward on the same batch each time (and "
        "may step an optimiser) and returns the loss",
    )
    parser.add_argument("--steps", type=_at_least_one, default=5, help="steps to time (5)")
    parser.add_argument("--threads", type=_at_least_one, help="threads of PyTorch")
    parser.add_argument("--path", help="a folder to look for the module in")
    parser.add_argument("--tolerance", type=float, help="of gradients, instead of the default")
    return parser


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
