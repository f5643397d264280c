"""The fit loop: SGD on learnable tensors, Dassl's schedule, a checkpoint every epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from vlfast.data.dataset import Dataset
from vlfast.data.views import Views, worker_errors
from vlfast.errors import VlfastError
from vlfast.objectives import Objective, Step
from vlfast.trainers.classifier import (
    PromptedClassifier,
    encode_split,
    loader_workers,
    view_config,
)
from vlfast.trainers.config import Config
from vlfast.trainers.progress import Progress
from vlfast.trainers.run_folder import RunFolder, load_learnable
from vlfast.trainers.schedule import learning_rate

CHECK_EVERY = 50  # steps between looks at the loss on a GPU, where each look waits for the device


class NonFiniteLossError(VlfastError):
    """A term of the loss became NaN or infinite."""


class TrainingStep(nn.Module):
    """Images and labels to the loss and its terms. Its parameters are the learnable tensors; the
    frozen CLIP stays outside, so that distributed training moves only what learns."""

    def __init__(self, classifier: PromptedClassifier, objectives: list[Objective]) -> None:
        super().__init__()
        self.prompts = classifier.prompts
        self.objectives = nn.ModuleList(objectives)
        self._classifier = (classifier,)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        (classifier,) = self._classifier
        features = classifier.clip.encode_images(images)
        text = classifier.encode_text()
        logits = classifier.logits(features, text.features)
        step = Step(classifier.clip, self.prompts, features, text, logits, labels)
        loss = logits.new_zeros(())
        terms = {}
        for objective in self.objectives:
            for name, value in objective(step).items():
                terms[name] = value.detach()
                loss = loss + objective.weight * value
        terms["accuracy"] = (logits.argmax(dim=1) == labels).float().mean()
        return loss, terms


class EpochSampler(Sampler[int]):
    """A permutation that the seed and ``epoch`` fix, whatever was drawn before."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self.epoch = 1

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(_epoch_seed(self.seed, self.epoch))
        yield from torch.randperm(self.count, generator=generator).tolist()


@dataclass
class Fitted:
    """epochs: how many ran in all. seconds: of training, resumed parts included."""

    epochs: int
    seconds: float
    best_epoch: int | None


def fit_prompts(
    classifier: PromptedClassifier,
    objectives: list[Objective],
    dataset: Dataset,
    config: Config,
    folder: RunFolder,
    accelerator: Accelerator,
    *,
    resume: bool = False,
    show_progress: bool = True,
) -> Fitted:
    """Train the classifier's prompts on ``dataset.train``.

    After each epoch ``last`` and, where the validation accuracy grew, ``best`` are written to the
    folder, with a row of metrics. With ``resume`` it goes on after the last finished epoch; the
    order, the views and every random draw of an epoch depend on the seed and the epoch alone, so
    a resumed run is the same, bit for bit on a CPU. Raises NonFiniteLossError naming the term.
    """
    recipe = config.recipe
    parameters = [p for p in classifier.prompts.parameters() if p.requires_grad]
    if recipe.epochs and not parameters:
        raise VlfastError(
            f"prompts: {classifier.prompts.kind!r} prompts have nothing to learn, "
            f"but recipe.epochs is {recipe.epochs}"
        )
    if recipe.epochs and not len(dataset.train):
        raise VlfastError(f"data: {dataset.name} has no training images")
    state = _State(classifier, parameters, recipe.momentum, recipe.weight_decay)
    if resume:
        state.read(folder)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            folder.keep_metrics(state.epoch)
    if not recipe.epochs:
        if accelerator.is_main_process:
            state.write(folder, classifier, best=False)
        return Fitted(0, 0.0, None)

    views = Views(dataset.train, view_config(classifier.clip), seed=config.seed)
    sampler = EpochSampler(len(views), config.seed)
    loader = DataLoader(
        views,
        batch_size=recipe.batch_size,
        sampler=sampler,
        drop_last=len(views) >= recipe.batch_size,
        num_workers=loader_workers(dataset.train, config.data.workers),
    )
    step, optimizer, loader = accelerator.prepare(
        TrainingStep(classifier, objectives), state.optimizer, loader
    )
    has_val = len(dataset.val) > 0
    val = (
        encode_split(classifier.clip, dataset.val, workers=config.data.workers) if has_val else None
    )

    with Progress(
        recipe.epochs,
        len(loader),
        start=state.epoch,
        show=show_progress and accelerator.is_main_process,
    ) as progress:
        for epoch in range(state.epoch + 1, recipe.epochs + 1):
            started = time.perf_counter()
            torch.manual_seed(_epoch_seed(config.seed, epoch))
            if config.data.augment:
                views.epoch = epoch
            sampler.epoch = epoch
            rate = learning_rate(
                epoch,
                lr=recipe.lr,
                epochs=recipe.epochs,
                warmup_epochs=recipe.warmup_epochs,
                warmup_lr=recipe.warmup_lr,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            means = _train_epoch(
                step, optimizer, loader, accelerator, epoch, recipe.clip_grad_norm, folder, progress
            )
            row: dict[str, Any] = {"epoch": epoch, "lr": rate, **means}
            if val is not None:
                row["val_accuracy"] = _accuracy(classifier.predict(val[0]), val[1])
            state.seconds += time.perf_counter() - started
            row["seconds"] = round(state.seconds, 3)
            better = val is not None and row["val_accuracy"] > state.best_accuracy
            if better:
                state.best_accuracy, state.best_epoch = row["val_accuracy"], epoch
            _check_parameters(classifier.prompts, epoch, state.epoch, folder)
            state.epoch = epoch
            if accelerator.is_main_process:
                # The row first: resuming drops rows of epochs that have no checkpoint.
                folder.append_metrics(row)
                state.write(folder, classifier, best=better)
            accelerator.wait_for_everyone()
            progress.epoch_done(row)
    return Fitted(state.epoch, state.seconds, state.best_epoch or None)


def _train_epoch(
    step: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    accelerator: Accelerator,
    epoch: int,
    clip_grad_norm: float | None,
    folder: RunFolder,
    progress: Progress,
) -> dict[str, float]:
    """One pass; the mean of the loss and of each term, over steps and processes."""
    step.train()
    sums: dict[str, Tensor] = {}
    look_every = 1 if accelerator.device.type == "cpu" else CHECK_EVERY
    for number, (images, labels) in enumerate(_batches(loader), start=1):
        optimizer.zero_grad()
        with accelerator.autocast():
            loss, terms = step(images, labels)
        for name, value in {"loss": loss.detach(), **terms}.items():
            sums[name] = sums[name] + value if name in sums else value
        if number % look_every == 0 or number == len(loader):
            means = {name: float(value) / number for name, value in sums.items()}
            _check_loss(means, epoch, number, folder)
            progress.step_done(number, means)
        accelerator.backward(loss)
        if clip_grad_norm is not None:
            accelerator.clip_grad_norm_(step.parameters(), clip_grad_norm)
        optimizer.step()
    names = list(sums)
    totals = accelerator.reduce(torch.stack([sums[n] for n in names]) / len(loader), "mean")
    means = dict(zip(names, totals.tolist(), strict=True))
    means["train_accuracy"] = 100 * means.pop("accuracy")
    return means


def _batches(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    with worker_errors():
        yield from loader


def _check_loss(means: dict[str, float], epoch: int, number: int, folder: RunFolder) -> None:
    broken = [name for name, value in means.items() if not math.isfinite(value)]
    if broken:
        terms = [name for name in broken if name != "loss"] or broken
        what = f"{' and '.join(terms)} became {means[terms[0]]} in epoch {epoch}, by step {number}"
        raise _diverged(what, epoch - 1, folder)


def _check_parameters(prompts: nn.Module, epoch: int, finished: int, folder: RunFolder) -> None:
    """The last update of an epoch shows in no loss: look before it is saved."""
    if not all(bool(p.isfinite().all()) for p in prompts.parameters()):
        raise _diverged(f"the prompts became infinite or NaN in epoch {epoch}", finished, folder)


def _diverged(what: str, finished: int, folder: RunFolder) -> NonFiniteLossError:
    kept = f"{folder.path} holds epoch {finished}" if finished else "no epoch was finished"
    return NonFiniteLossError(
        f"loss: {what}; {kept}. A lower recipe.lr, recipe.clip_grad_norm, or fp32 or bf16 instead "
        "of fp16 usually helps"
    )


class _State:
    """What resuming needs: prompts, momentum, the epoch, the best so far. Random state needs no
    place here, since the seed and the epoch fix it."""

    def __init__(
        self,
        classifier: PromptedClassifier,
        parameters: list[nn.Parameter],
        momentum: float,
        weight_decay: float,
    ) -> None:
        self.prompts = classifier.prompts
        self.optimizer = None
        if parameters:
            self.optimizer = torch.optim.SGD(
                parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay
            )
        self.epoch = 0
        self.seconds = 0.0
        self.best_accuracy = -1.0
        self.best_epoch = 0

    def write(self, folder: RunFolder, classifier: PromptedClassifier, *, best: bool) -> None:
        learnable = dict(self.prompts.named_parameters())
        about = {
            "epoch": self.epoch,
            "classnames": classifier.classnames,
            "template": classifier.template,
        }
        if best:
            folder.write_tensors("best", learnable, about)
        folder.write_tensors("last", learnable, about)
        tensors = {f"prompts/{name}": p for name, p in learnable.items()}
        for name, parameter in learnable.items():
            momentum = self.optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum/{name}"] = momentum
        folder.write_tensors(
            "state",
            tensors,
            {
                "epoch": self.epoch,
                "seconds": self.seconds,
                "best_accuracy": self.best_accuracy,
                "best_epoch": self.best_epoch,
            },
        )

    def read(self, folder: RunFolder) -> None:
        """Go back to the last finished epoch; a run killed in its first epoch begins again."""
        file = folder.path / "state.safetensors"
        if not file.is_file():
            return
        tensors, about = folder.read_tensors("state")
        parts: dict[str, dict[str, Tensor]] = {"prompts": {}, "momentum": {}}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = value
        load_learnable(self.prompts, parts["prompts"], file)
        for name, parameter in self.prompts.named_parameters():
            if name in parts["momentum"]:
                buffer = parts["momentum"][name].to(parameter.device)
                self.optimizer.state[parameter]["momentum_buffer"] = buffer
        self.epoch = about["epoch"]
        self.seconds = about["seconds"]
        self.best_accuracy = about["best_accuracy"]
        self.best_epoch = about["best_epoch"]


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * (logits.argmax(dim=1) == labels).double().mean().item()


def _epoch_seed(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch) % (1 << 63)
