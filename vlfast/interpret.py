"""What was learned, in words: the nearest words of context vectors, and the hard prompts that a
mixture's gate picks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlfast.clip.words import nearest_words
from vlfast.data.templates import template_pool
from vlfast.errors import VlfastError
from vlfast.evaluation.plots import PromptShares, WordHistory
from vlfast.evaluation.tables import text_table
from vlfast.prompts import HardPrompt
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.run import Run
from vlfast.trainers.context_history import read_history
from vlfast.trainers.images import encode_split

GATE = "objectives.mixture.gate"
EPOCHS_SHOWN = 6  # columns of the table over epochs


@dataclass(frozen=True)
class VectorWords:
    """A context vector as words: (word, distance), nearest first. classname: whose context it is
    in, where each class has its own."""

    vector: int
    words: Sequence[tuple[str, float]]
    classname: str | None = None

    @property
    def name(self) -> str:
        return f"vector {self.vector}" + (f" of {self.classname}" if self.classname else "")


def context_words(run: Run, *, count: int = 3, classes: int = 3) -> list[VectorWords]:
    """The ``count`` nearest words of each context vector of the text tower's input, by Euclidean
    distance to token embeddings, as [CoOp] interpret_prompts.py has them.

    Vectors of deeper blocks live in no word's space and are left out. Contexts of single images
    (CoCoOp) are shown before an image shifts them. classes: where each class has its own context,
    how many classes. Raises VlfastError for prompts without such vectors.
    """
    _check_count("count", count)
    _check_count("classes", classes)
    vectors = run.classifier.prompts.context_vectors()
    if vectors is None:
        raise _no_vectors(run)
    names: Sequence[str | None] = [None]
    if vectors.ndim == 3:
        names = run.classnames[:classes]
        vectors = vectors[:classes]
    found = nearest_words(run.classifier.clip, vectors.reshape(-1, vectors.shape[-1]), count)
    length = vectors.shape[-2]
    return [
        VectorWords(position % length + 1, words, names[position // length])
        for position, words in enumerate(found)
    ]


def words_over_training(run: Run, *, classes: int = 3) -> WordHistory:
    """The nearest word of every context vector over the epochs of training, from the run's
    contexts.safetensors. Raises FileNotFoundError where the run has none."""
    _check_count("classes", classes)
    if run.classifier.prompts.context_vectors() is None:
        raise _no_vectors(run)
    contexts, classnames = read_history(run.folder)
    labels = [""]
    if classnames is not None:
        contexts = contexts[:, :classes]
        labels = [f" of {name}" for name in classnames[:classes]]
    length = contexts.shape[-2]
    vectors = [f"vector {i}{label}" for label in labels for i in range(1, length + 1)]
    found = nearest_words(run.classifier.clip, contexts.reshape(-1, contexts.shape[-1]), 1)
    nearest = [words[0] for words in found]
    rows = [nearest[i : i + len(vectors)] for i in range(0, len(nearest), len(vectors))]
    return WordHistory(
        vectors,
        [[word for word, _ in row] for row in rows],
        np.array([[distance for _, distance in row] for row in rows]),
    )


def gate_weights(features: Tensor, gate: Tensor, num_prompts: int) -> Tensor:
    """The weights [N, H] that a mixture's gate gives its hard prompts: softmax over the
    ``num_prompts`` largest gate logits of each image, 0 elsewhere (ties: the smaller index).

    features: normalised, of the frozen image tower, [N, D]. gate: [D, H]. MoPD (arXiv 2412.19087),
    section 3.3.
    """
    logits = features.float() @ gate.to(features.device).float()
    chosen = logits.argsort(dim=1, descending=True, stable=True)[:, :num_prompts]
    weights = logits.gather(1, chosen).softmax(dim=1)
    return torch.zeros_like(logits).scatter(1, chosen, weights)


def prompt_shares(run: Run, *, checkpoint: str = "last") -> PromptShares:
    """Which hard prompts the gate of a ``mixture`` run picks for the test images of each class it
    was trained on. Raises VlfastError for a run without a gate."""
    tensors, _ = run.folder.read_tensors(checkpoint)
    if GATE not in tensors:
        raise VlfastError(
            f"run: {run.folder.path} has no gate over hard prompts; only the mixture objective "
            "learns one, over a pool of several"
        )
    gate = tensors[GATE]
    dataset = run.dataset
    (spec,) = (o for o in run.config.objectives if o["kind"] == "mixture")
    template = run.config.data.template or dataset.template
    templates = template_pool(spec["pool"], dataset.name, template)[: spec["pool_size"]]
    if gate.shape[1] != len(templates):
        raise VlfastError(
            f"run: the gate weighs {gate.shape[1]} hard prompts, but the pool {spec['pool']!r} has "
            f"{len(templates)} now"
        )
    part = dataset.restrict(run.config.data.classes)
    if not len(part.test):
        raise VlfastError(f"data: {dataset.name} has no test images")
    plain = PromptedClassifier(run.classifier.clip, HardPrompt(), part.classnames, part.template)
    features, labels = encode_split(plain, part.test, workers=run.config.data.workers)
    weights = gate_weights(features, gate, spec["num_prompts"])
    present = labels.unique()
    shares = torch.stack([weights[labels == label].mean(dim=0) for label in present])
    names = [part.classnames[label] for label in present.tolist()]
    return PromptShares(templates, names, shares.cpu().numpy())


def words_table(words: Sequence[VectorWords]) -> str:
    """One line a vector: its nearest words with their distances."""
    count = max(len(line.words) for line in words)
    header = ["context", *(["nearest word"] + [f"{i}. word" for i in range(2, count + 1)])]
    rows = [[line.name, *(f"{w} {d:.2f}" for w, d in line.words)] for line in words]
    return text_table(header, [row + [""] * (len(header) - len(row)) for row in rows])


def history_table(history: WordHistory) -> str:
    """One line a vector: its nearest word and the distance, at a few epochs."""
    last = len(history.words) - 1
    shown = sorted({round(i * last / (EPOCHS_SHOWN - 1)) for i in range(EPOCHS_SHOWN)})
    rows = [
        [name, *(f"{history.words[e][v]} {history.distances[e, v]:.2f}" for e in shown)]
        for v, name in enumerate(history.vectors)
    ]
    return text_table(["nearest word after epoch", *map(str, shown)], rows)


def shares_table(shares: PromptShares, *, classes: int = 40) -> str:
    """Percent of each class's images, one column a hard prompt, and the prompts by number."""
    numbers = [str(i) for i in range(1, len(shares.templates) + 1)]
    listed = [f"{number:>3}  {t}" for number, t in zip(numbers, shares.templates, strict=True)]
    rows = [["all classes", *_percent(shares.shares.mean(axis=0))]]
    shown = list(zip(shares.classnames, shares.shares, strict=True))[:classes]
    rows += [[name, *_percent(row)] for name, row in shown]
    table = text_table(["weight of hard prompt, %", *numbers], rows)
    more = len(shares.classnames) - len(shown)
    return "\n".join([table, *([f"and {more} more"] if more else []), "", *listed])


def as_json(
    words: Sequence[VectorWords] | None = None,
    history: WordHistory | None = None,
    shares: PromptShares | None = None,
) -> dict[str, Any]:
    """What there is, as plain lists and numbers."""
    found: dict[str, Any] = {}
    if words is not None:
        found["context"] = [asdict(line) for line in words]
    if history is not None:
        found["over_training"] = {**vars(history), "distances": history.distances.tolist()}
    if shares is not None:
        found["mixture"] = {**vars(shares), "shares": shares.shares.tolist()}
    return found


def _percent(row: np.ndarray) -> list[str]:
    return [f"{100 * share:.0f}" if share > 0 else "-" for share in row]


def _no_vectors(run: Run) -> VlfastError:
    return VlfastError(
        f"run: {run.classifier.prompts.kind} prompts have no context vectors among the words of "
        "the text tower"
    )


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
