"""The fit loop: SGD on learnable tensors, Dassl's schedule, a checkpoint every epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from vlfast.data.dataset import Dataset, no_training_images
from vlfast.data.views import Views, view_number, worker_errors
from vlfast.errors import VlfastError
from vlfast.objectives import Batch, Objective, Step, Task
from vlfast.objectives.general_knowledge import GeneralKnowledge
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.trainers.averaging import Averaging
from vlfast.trainers.batches import Stores, TrainingViews, training_loader
from vlfast.trainers.config import Config
from vlfast.trainers.context_history import ContextHistory
from vlfast.trainers.distributed import average, begin_alike, gather_shares, share_of
from vlfast.trainers.gradient_projection import GradientProjection
from vlfast.trainers.images import encode_split, view_config
from vlfast.trainers.progress import Progress
from vlfast.trainers.run_folder import RunFolder, load_learned
from vlfast.trainers.schedule import learning_rate
from vlfast.trainers.tensorboard import TensorBoard

CHECK_EVERY = 50  # steps between looks at the loss on a GPU, where each look waits for the device


class NonFiniteLossError(VlfastError):
    """A term of the loss became NaN or infinite."""


class TrainingStep(nn.Module):
    """A batch to the loss and its terms. Its parameters are the learnable tensors; the frozen
    models stay outside.

    general: a term that is not in the loss and keeps its graph, for gradient projection.
    """

    def __init__(
        self, task: Task, objectives: Sequence[Objective], general: Objective | None = None
    ) -> None:
        super().__init__()
        self.prompts = task.prompts
        self.objectives = nn.ModuleDict({o.kind: o for o in objectives})
        self._task = (task,)
        self._general = (general,)

    @property
    def needs_frozen(self) -> bool:
        """Whether anything needs the frozen image tower's features."""
        return not self.prompts.reads_pixels or any(o.needs_frozen for o in self._terms())

    @property
    def needs_teacher(self) -> bool:
        (task,) = self._task
        return task.candidates is not None or any(o.needs_teacher for o in self._terms())

    def _terms(self) -> list[Objective]:
        (general,) = self._general
        return [*self.objectives.values(), *([general] if general else [])]

    def stores_needed(self, stores: Stores) -> Stores:
        """Without those of features that nothing needs."""
        needed = {"frozen": self.needs_frozen, "teacher": self.needs_teacher}
        return {part: store for part, store in stores.items() if needed[part]}

    def needs_pixels(self, stores: Stores) -> bool:
        """Whether the images themselves are needed beside these stored features."""
        frozen = self.needs_frozen and "frozen" not in stores
        teacher = self.needs_teacher and "teacher" not in stores
        return self.prompts.reads_pixels or frozen or teacher

    @torch.no_grad()
    def look_ahead(self, batch: Batch) -> Batch:
        """Fill in what frozen models make of the images, as far as anything needs it."""
        (task,) = self._task
        if self.needs_frozen and batch.frozen is None:
            batch.frozen = task.clip.encode_images(batch.pixels, normalize=False)
        if self.needs_teacher and batch.teacher is None:
            batch.teacher = task.teacher.encode_images(batch.pixels)
        if task.candidates is not None:
            batch.chosen = task.candidates.choose(batch.teacher)
        return batch

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        (task,) = self._task
        step = Step(task, batch)
        loss = batch.labels.new_zeros((), dtype=torch.float32)
        terms = {}
        for objective in self.objectives.values():
            for name, value in objective(step).items():
                terms[name] = value.detach().float()
                loss = loss + objective.weight_of(name) * value
        if task.labelled and step.has_logits:
            right = step.logits.argmax(dim=1) == batch.labels
            terms["accuracy"] = right.float().mean()
        (general,) = self._general
        if general is not None:
            terms |= general(step)
        return loss, terms

    def learned(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the prompts' tensors by their own names (batch norm's running
        statistics too), those of objectives as "objectives.KIND.NAME"."""
        tensors = dict(self.prompts.state_dict())
        for kind, objective in self.objectives.items():
            for name, tensor in objective.state_dict().items():
                tensors[f"objectives.{kind}.{name}"] = tensor
        return tensors


OnStep = Callable[[TrainingStep, int], None]


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
    task: Task,
    objectives: Sequence[Objective],
    dataset: Dataset,
    config: Config,
    folder: RunFolder,
    accelerator: Accelerator,
    *,
    classifier: PromptedClassifier | None = None,
    general: Objective | None = None,
    stores: Stores | None = None,
    resume: bool = False,
    show_progress: bool = True,
    on_step: OnStep | None = None,
) -> Fitted:
    """Train the task's prompts on ``dataset.train``, with objectives that are prepared.

    classifier: the same prompts over the dataset's class names, for validation and checkpoints,
    where they learn from others. general: prepared too; what ``recipe.projection`` holds gradients
    against.
    stores: features of the frozen models that are read instead of computed; see ``open_stores``.

    After each epoch ``last`` and, where the validation accuracy grew, ``best`` are written to the
    folder, with a row of metrics. With ``resume`` it goes on after the last finished epoch; the
    order, the views and every random draw of an epoch depend on the seed and the epoch alone, so
    a resumed run is the same, bit for bit on a CPU. Several processes share each batch and average
    their gradients, which gives the run of one process up to rounding; the first alone writes.
    Raises NonFiniteLossError naming the term.

    on_step: called after each step with what is trained and the step's number in its epoch.
    """
    recipe, classifier = config.recipe, classifier or task.classifier
    training = TrainingStep(task, objectives, general)
    parameters = [p for p in training.parameters() if p.requires_grad]
    if recipe.epochs and not parameters:
        raise VlfastError(
            f"prompts: {classifier.prompts.kind!r} prompts have nothing to learn, "
            f"but recipe.epochs is {recipe.epochs}"
        )
    if recipe.epochs and not len(dataset.train):
        raise VlfastError(no_training_images(dataset))
    averaging = Averaging.of_recipe(recipe, training.named_parameters())
    state = _State(
        training,
        classifier,
        parameters,
        recipe.momentum,
        recipe.weight_decay,
        averaging,
        accelerator.scaler,
    )
    projection = None
    if general is not None:
        projection = GradientProjection(recipe.projection, parameters)
    if resume:
        state.read(folder)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            folder.keep_metrics(state.epoch)
    begin_alike(training, accelerator)
    if not recipe.epochs:
        if accelerator.is_main_process:
            state.write(folder, best=False)
        return Fitted(0, 0.0, None)

    images = Views(dataset.train, view_config(classifier.clip), seed=config.seed)
    stores = training.stores_needed(stores or {})
    views = TrainingViews(images, stores, pixels=training.needs_pixels(stores))
    sampler = EpochSampler(len(views), config.seed)
    loader = training_loader(
        views, sampler, recipe.batch_size, config.data.workers, accelerator.device
    )
    optimizer, loader = accelerator.prepare(state.optimizer, loader)
    has_val, val = len(dataset.val) > 0, None
    writes = accelerator.is_main_process
    history = ContextHistory(classifier, folder, state.epoch) if writes else None

    with (
        Progress(
            recipe.epochs, len(loader), start=state.epoch, show=show_progress and writes
        ) as progress,
        TensorBoard(folder, enabled=config.tensorboard and writes) as board,
    ):
        for epoch in range(state.epoch + 1, recipe.epochs + 1):
            started = time.perf_counter()
            torch.manual_seed(_epoch_seed(config.seed, epoch))
            if config.data.augment:
                images.epoch = view_number(epoch, config.data.views)
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
                training,
                optimizer,
                loader,
                accelerator,
                epoch,
                recipe.clip_grad_norm,
                folder,
                progress,
                projection,
                on_step,
            )
            if averaging is not None:
                averaging.epoch_done(epoch)
            training.eval()
            row: dict[str, Any] = {"epoch": epoch, "lr": rate, **means}
            if has_val:
                if val is None or classifier.prompts.learns_images:
                    part = share_of(dataset.val, accelerator)
                    val = encode_split(classifier, part, workers=config.data.workers)
                right = classifier.predict(val[0]).argmax(dim=1) == val[1]
                right = gather_shares(right, len(dataset.val), accelerator)
                row["val_accuracy"] = 100 * right.double().mean().item()
            state.seconds += time.perf_counter() - started
            row["seconds"] = round(state.seconds, 3)
            better = has_val and row["val_accuracy"] > state.best_accuracy
            if better:
                state.best_accuracy, state.best_epoch = row["val_accuracy"], epoch
            _check_parameters(training, epoch, state.epoch, folder)
            state.epoch = epoch
            if writes:
                # What grows by epochs first: resuming drops epochs that have no checkpoint.
                folder.append_metrics(row)
                history.append()
                state.write(folder, best=better)
                board.add(row)
            accelerator.wait_for_everyone()
            progress.epoch_done(row)
    return Fitted(state.epoch, state.seconds, state.best_epoch or None)


def _train_epoch(
    step: TrainingStep,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    accelerator: Accelerator,
    epoch: int,
    clip_grad_norm: float | None,
    folder: RunFolder,
    progress: Progress,
    projection: GradientProjection | None = None,
    on_step: OnStep | None = None,
) -> dict[str, float]:
    """One pass; the mean of the loss and of each term, over steps and processes."""
    step.train()
    sums: dict[str, Tensor] = {}
    look_every = 1 if accelerator.device.type == "cpu" else CHECK_EVERY
    for number, batch in enumerate(_batches(loader, step, accelerator), start=1):
        optimizer.zero_grad()
        with accelerator.autocast():
            loss, terms = step(batch)
        for name, value in {"loss": loss, **terms}.items():
            value = value.detach()
            sums[name] = sums[name] + value if name in sums else value
        if number % look_every == 0 or number == len(loader):
            means = {name: float(value) / number for name, value in sums.items()}
            _check_loss(means, epoch, number, folder)
            progress.step_done(number, means)
        if projection is None:
            accelerator.backward(loss)
            average([p.grad for p in step.parameters()], accelerator)
        else:
            projection.backward(accelerator, loss, terms[GeneralKnowledge.kind])
        if clip_grad_norm is not None:
            accelerator.clip_grad_norm_(step.parameters(), clip_grad_norm)
        optimizer.step()
        if on_step is not None:
            on_step(step, number)
    names = list(sums)
    totals = accelerator.reduce(torch.stack([sums[n] for n in names]) / len(loader), "mean")
    means = dict(zip(names, totals.tolist(), strict=True))
    if "accuracy" in means:
        means["train_accuracy"] = 100 * means.pop("accuracy")
    return means


def _batches(loader: DataLoader, step: TrainingStep, accelerator: Accelerator) -> Iterator[Batch]:
    """Batches with their frozen part, which is begun one step before it is needed."""
    ready = None
    with worker_errors():
        for parts in loader:
            with accelerator.autocast():
                batch = step.look_ahead(Batch(**parts))
            if ready is not None:
                yield ready
            ready = batch
    if ready is not None:
        yield ready


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
    """What resuming needs: what is learned, momentum, the epoch, the best so far, the loss scale of
    fp16. Random state needs no place here, since the seed and the epoch fix it."""

    def __init__(
        self,
        training: TrainingStep,
        classifier: PromptedClassifier,
        parameters: list[nn.Parameter],
        momentum: float,
        weight_decay: float,
        averaging: Averaging | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.training = training
        self.classifier = classifier
        self.averaging = averaging
        self.scaler = scaler
        self.optimizer = None
        if parameters:
            self.optimizer = torch.optim.SGD(
                parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay
            )
        self.epoch = 0
        self.seconds = 0.0
        self.best_accuracy = -1.0
        self.best_epoch = 0

    def write(self, folder: RunFolder, *, best: bool) -> None:
        learned = self.training.learned()
        about = {
            "epoch": self.epoch,
            "classnames": self.classifier.classnames,
            "template": self.classifier.template,
        }
        if best:
            folder.write_tensors("best", learned, about)
        folder.write_tensors("last", learned, about)
        tensors = {f"learned/{name}": value for name, value in learned.items()}
        for name, parameter in self.training.named_parameters():
            momentum = self.optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum/{name}"] = momentum
        if self.averaging is not None:
            tensors |= {f"average/{name}": value for name, value in self.averaging.sums.items()}
        folder.write_tensors(
            "state",
            tensors,
            {
                "epoch": self.epoch,
                "seconds": self.seconds,
                "best_accuracy": self.best_accuracy,
                "best_epoch": self.best_epoch,
                "scaler": self.scaler.state_dict() if self.scaler else {},
            },
        )

    def read(self, folder: RunFolder) -> None:
        """Go back to the last finished epoch; a run killed in its first epoch begins again."""
        file = folder.path / "state.safetensors"
        if not file.is_file():
            return
        tensors, about = folder.read_tensors("state")
        parts: dict[str, dict[str, Tensor]] = {"learned": {}, "momentum": {}, "average": {}}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = value
        load_learned(self.training.learned(), parts["learned"], file)
        for name, parameter in self.training.named_parameters():
            if name in parts["momentum"]:
                buffer = parts["momentum"][name].to(parameter.device)
                self.optimizer.state[parameter]["momentum_buffer"] = buffer
        if self.averaging is not None:
            self.averaging.restore(parts["average"])
        self.epoch = about["epoch"]
        self.seconds = about["seconds"]
        self.best_accuracy = about["best_accuracy"]
        self.best_epoch = about["best_epoch"]
        if self.scaler and about["scaler"]:
            self.scaler.load_state_dict(about["scaler"])


def _epoch_seed(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch) % (1 << 63)
