"""``accelerate`` against the public repositories themselves: a training step before and after.

    python -m benchmarks.dropin_repositories --checkouts DIR [--families coop maple] [--classes 100]

DIR holds clones by their repositories' names. Each family runs in a process of its own, since all
of them call their packages ``clip`` and ``trainers``: its trainer's build_model, forward_backward
and inference, on a CLIP with random weights made by its clip/model.py. Stand-ins take the place of
Dassl, of downloads, and of what needs a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import inspect
import io
import json
import os
import statistics
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contest import MALLOC
from benchmarks.machine import machine

WORDS = "a photo of a"
B32 = {"image_resolution": 224, "vision_layers": 12, "vision_width": 768, "vision_patch_size": 32}
B16 = {**B32, "vision_patch_size": 16}
L14 = {"image_resolution": 224, "vision_layers": 24, "vision_width": 1024, "vision_patch_size": 14}
TEXT = {"context_length": 77, "vocab_size": 49408, "transformer_layers": 12}
WIDTHS = {512: {"embed_dim": 512, "transformer_width": 512, "transformer_heads": 8}}
WIDTHS[768] = {"embed_dim": 768, "transformer_width": 768, "transformer_heads": 12}
SIZES = {
    "ViT-B/32": {**B32, **TEXT, **WIDTHS[512]},
    "ViT-B/16": {**B16, **TEXT, **WIDTHS[512]},
    "ViT-L/14": {**L14, **TEXT, **WIDTHS[768]},
}
CREATE = "create_model_and_transforms"
# Batch norm behind it takes it away: its gradient is 0 but for rounding.
WITHOUT_EFFECT = "VPT_image_trans.conv1.0.bias"


@dataclass(frozen=True)
class Family:
    """Where a trainer is, and of which sizes its models.

    root: of its packages, under the checkout. holder: the trainer's attribute that ``accelerate``
    is given. deep: whether it has prompts that go through fp16, each class's or image's apart.
    """

    repository: str
    module: str
    trainer: str
    batch: int
    root: str = ""
    holder: str = "model"
    deep: bool = False
    student: str = "ViT-B/32"
    teacher: str | None = None


MULTIMODAL = "multimodal-prompt-learning"
KG = {"repository": "KgCoOp", "root": "KgCoOp"}
KDPL = {
    "repository": "KDPL",
    "root": "src",
    "holder": "student_model",
    "teacher": "ViT-H-14-quickgelu",  # by name alone: it comes from open_clip, see small_teacher
}
FAMILIES = {
    "coop": Family("CoOp", "coop", "CoOp", 32),
    "cocoop": Family("CoOp", "cocoop", "CoCoOp", 1),
    "kgcoop": Family(**KG, module="kgcoop", trainer="KgCoOp", batch=128),
    "prograd": Family(**KG, module="prograd", trainer="ProGrad", batch=32),
    "vpt": Family(MULTIMODAL, "vpt", "VPT", 4),
    "ivlp": Family(MULTIMODAL, "independentVL", "IVLP", 4, deep=True),
    "maple": Family(MULTIMODAL, "maple", "MaPLe", 4, deep=True),
    "promptsrc": Family("PromptSRC", "promptsrc", "PromptSRC", 4, deep=True),
    "coop-kdpl": Family(**KDPL, module="coop_kdpl", trainer="CoOp_KDPL", batch=32),
    "cocoop-kdpl": Family(**KDPL, module="cocoop_kdpl", trainer="CoCoOp_KDPL", batch=1),
    "maple-kdpl": Family(**KDPL, module="maple_kdpl", trainer="MaPLe_KDPL", batch=4, deep=True),
    "mopd": Family("MoPD-TMM", "MoPD", "MoPD", 128),
    # Its student's path is that of a ViT-B/16.
    "promptkd": Family(
        "PromptKD",
        "promptkd",
        "PromptKD",
        8,
        holder="model_teacher",
        deep=True,
        student="ViT-B/16",
        teacher="ViT-L/14",
    ),
}


class Node(SimpleNamespace):
    """A node of a configuration."""


def configuration(family: Family, size: int) -> Node:
    """With the values of the repositories' own configurations, in fp32."""
    words = {"CTX_INIT": WORDS, "PREC": "fp32"}
    coop = {"N_CTX": 16, "CTX_INIT": "", "CSC": False, "CLASS_TOKEN_POSITION": "end"}
    if family.trainer in ("KgCoOp", "MoPD"):
        coop.update(CTX_INIT=True, N_CTX=4)
    both = {**words, "N_CTX_TEXT": 4, "N_CTX_VISION": 4}
    depths = {"PROMPT_DEPTH_TEXT": 9, "PROMPT_DEPTH_VISION": 9}
    weights = {"TEXT_LOSS_WEIGHT": 25, "IMAGE_LOSS_WEIGHT": 10, "GPA_MEAN": 15, "GPA_STD": 1}
    ivlp = {**words, "N_CTX_TEXT": 2, "N_CTX_VISION": 2}
    ivlp.update(PROMPT_DEPTH_TEXT=12, PROMPT_DEPTH_VISION=12)
    distilled = {"TEMPERATURE": 1.0, "KD_WEIGHT": 1000.0, "TEACHER_NAME": family.teacher}
    trainer = Node(
        NAME=family.trainer,
        MODAL="base2novel",
        COOP=Node(**coop, PREC="fp32", W=8.0 if family.trainer == "KgCoOp" else 0.8, W2=0.1),
        COCOOP=Node(**words, N_CTX=4),
        IVLP=Node(**ivlp),
        VPT=Node(**words, N_CTX_VISION=8, PROMPT_DEPTH_VISION=12),
        MAPLE=Node(**words, N_CTX=2, PROMPT_DEPTH=9),
        PROMPTSRC=Node(**both, **depths, **weights),
        PROMPTKD=Node(**both, **depths, **distilled),
        KDPL=Node(CLASS_AGNOSTIC=False, K_MAX=1000, TEACHER=family.teacher, PREC="fp32"),
    )
    return Node(
        TRAINER=trainer,
        INPUT=Node(SIZE=[size, size]),
        DATASET=Node(NAME="ImageNet" if family.trainer != "MoPD" else "OxfordPets"),
        MODEL=Node(BACKBONE=Node(NAME=family.student), INIT_WEIGHTS=""),
        OPTIM=Node(MAX_EPOCH=20),
        LOSS=Node(NAME="prograd", T=1.0, LAMBDA=1.0, num_prompts=2),
        TEST=Node(SPLIT="test"),
    )


class Trainer:
    """What of Dassl's trainer a step uses. The learning rate is 0, so that all steps are alike."""

    epoch = 0
    batch_idx, num_batches = 0, 2
    device = torch.device("cpu")

    def register_model(self, name: str, model: nn.Module, optimizer: Any, schedule: Any) -> None:
        self.registered, self.registered_optimizer = model, optimizer

    def model_backward_and_update(self, loss: Tensor) -> None:
        self.registered_optimizer.zero_grad()
        loss.backward()
        self.registered_optimizer.step()

    def prograd_backward_and_update(self, own: Tensor, guide: Tensor, weight: float) -> None:
        leaves = list(self.registered.parameters())
        guides = torch.autograd.grad(guide, leaves, retain_graph=True)
        self.registered_optimizer.zero_grad()
        own.backward()
        for leaf, direction in zip(leaves, guides, strict=True):
            unit = direction / direction.norm()
            along = (leaf.grad * unit).sum()
            if along < 0:
                leaf.grad -= weight * along * unit
        self.registered_optimizer.step()

    def model_inference(self, images: Tensor) -> Tensor:
        return self.model(images)


def stand_ins() -> dict[str, types.ModuleType]:
    def optimizer(model: nn.Module, *_: Any) -> torch.optim.Optimizer:
        learned = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(learned, lr=0.0, momentum=0.9)

    class Registry:
        def register(self) -> Callable[[type], type]:
            return lambda cls: cls

    contents = {
        "dassl": {},
        "dassl.engine": {"TRAINER_REGISTRY": Registry(), "TrainerX": Trainer},
        "dassl.metrics": {"compute_accuracy": lambda *_: [torch.zeros(())]},
        "dassl.utils": {
            "load_pretrained_weights": None,
            "load_checkpoint": lambda _: {"state_dict": {}},
        },
        "dassl.optim": {"build_optimizer": optimizer, "build_lr_scheduler": lambda *_: None},
        "pandas": {},  # reads KDPL's dictionary of names, which class-aware training does not ask
        "tqdm": {"tqdm": lambda things, **_: things},
    }
    modules = {}
    for name, attributes in contents.items():
        modules[name] = types.ModuleType(name)
        modules[name].__dict__.update(attributes)
    return modules


class Rounding:
    """Stands for ``Tensor.half`` in their models of fp32: the values are rounded, the dtype stays,
    as a concatenation gives it back. by_class: gradients are rounded, too, as theirs are."""

    by_class = True

    def __call__(self, tensor: Tensor, *_: Any) -> Tensor:
        rounded = tensor.to(torch.float16).to(tensor.dtype)
        if self.by_class or not tensor.requires_grad:
            return rounded
        return tensor + (rounded - tensor).detach()


class Archive:
    """Stands for a TorchScript archive of weights."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def eval(self) -> Archive:
        return self

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.weights)


def weights_of(size: dict[str, int]) -> dict[str, Tensor]:
    """Random, by the repository's own class."""
    clip = importlib.import_module("clip.model").CLIP
    more = {}
    if "design_details" in inspect.signature(clip).parameters:
        plain = dict.fromkeys(("vision_depth", "language_depth", "vision_ctx", "language_ctx"), 0)
        more["design_details"] = {"trainer": "IVLP", **plain}
    torch.manual_seed(0)
    return clip(**size, **more).state_dict()


def small_teacher(size: dict[str, int]) -> Callable[..., tuple[nn.Module, None, None]]:
    """Stands for open_clip.create_model_and_transforms."""
    import open_clip

    config = copy.deepcopy(open_clip.get_model_config("ViT-B-32"))
    config["vision_cfg"]["layers"] = size["vision_layers"]
    config["text_cfg"]["layers"] = size["transformer_layers"]

    def create(*_: Any, **__: Any) -> tuple[nn.Module, None, None]:
        return open_clip.CLIP(**config).eval(), None, None

    return create


@contextlib.contextmanager
def patched(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def build(family: Family, names: list[str], sizes: dict[str, dict[str, int]]) -> Any:
    """Their trainer after its build_model."""
    archives: dict[str, Archive] = {}

    def load(path: str, **_: Any) -> Archive:
        (name,) = (n for n in sizes if n.replace("/", "-") in str(path))
        if name not in archives:
            archives[name] = Archive(weights_of(sizes[name]))
        return archives[name]

    module = importlib.import_module(f"trainers.{family.module}")
    trainer = getattr(module, family.trainer)()
    trainer.cfg = configuration(family, sizes[family.student]["image_resolution"])
    trainer.dm = Node(dataset=Node(classnames=names))
    clip = importlib.import_module("clip.clip")
    addresses = {name: name.replace("/", "-") for name in sizes}
    loading = [(torch.jit, "load", load), (clip, "_download", str), (clip, "_MODELS", addresses)]
    if family.repository == "KDPL":
        create = small_teacher(sizes["ViT-B/32"])
        loading.append((module.load_teacher_to_cpu.__globals__["open_clip"], CREATE, create))
    with patched(loading):
        torch.manual_seed(0)
        trainer.build_model()
    return trainer


def step(trainer: Any, batch: dict[str, Tensor]) -> None:
    trainer.registered.train()
    trainer.forward_backward(batch)


def gradients(trainer: Any) -> dict[str, Tensor]:
    named = trainer.registered.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


@torch.no_grad()
def logits(trainer: Any, images: Tensor) -> Tensor:
    trainer.registered.eval()
    if hasattr(trainer, "model_teacher"):
        classes = trainer.model_teacher(images)[1]
        features, scale = trainer.model(images)
        return scale * features @ classes.t()
    if hasattr(trainer.registered, "inference"):
        return trainer.registered.inference(images)
    model = getattr(trainer, "model", None)
    return (
        model.inference(images) if hasattr(model, "inference") else trainer.model_inference(images)
    )


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def gradient_distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys(), "other parameters have gradients"
    return max(distance(found[n], g) for n, g in expected.items() if n != WITHOUT_EFFECT)


def peak_of(call: Callable[[], Any]) -> float:
    """MB by which it raises the peak of memory."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    call()
    return (_peak() - before) / 1e6


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One family: parity first, then both in turns."""
    from benchmarks.padded import class_names
    from vlfast.dropin import accelerate

    family = FAMILIES[name]
    checkout = Path(arguments.checkouts).resolve() / family.repository
    sys.path.insert(0, str(checkout / family.root))
    sys.modules.update(stand_ins())
    sizes = {n: {**size} for n, size in SIZES.items()}
    if arguments.layers:
        for size in sizes.values():
            size.update(vision_layers=arguments.layers, transformer_layers=arguments.layers)
    names, count = class_names(arguments.classes), arguments.batch or family.batch
    rounding = Rounding()
    on_a_cpu = [
        (Tensor, "cuda", lambda tensor, *_: tensor),
        (nn.Module, "cuda", lambda module, *_: module),
        (Tensor, "half", lambda tensor, *_: rounding(tensor)),
    ]
    with patched(on_a_cpu), contextlib.redirect_stdout(io.StringIO()):
        theirs, ours = build(family, names, sizes), build(family, names, sizes)
        resolution = sizes[family.student]["image_resolution"]
        torch.manual_seed(1)
        images = torch.randn(count, 3, resolution, resolution)
        batch = {"img": images, "label": torch.randint(len(names), (count,))}
        report = accelerate(getattr(ours, family.holder))

        step(ours, batch)
        step(theirs, batch)
        found, as_they_round = gradients(ours), gradients(theirs)
        expected = as_they_round
        if family.deep:
            rounding.by_class = False
            step(theirs, batch)
            step(ours, batch)
            found, expected = gradients(ours), gradients(theirs)
            rounding.by_class = True
        parity = {
            "logits": distance(logits(ours, images), logits(theirs, images)),
            "gradients": gradient_distance(found, expected),
            "as_they_round": gradient_distance(found, as_they_round),
        }
        peaks = {
            "theirs": peak_of(lambda: step(theirs, batch)),
            "ours": peak_of(lambda: step(ours, batch)),
        }
        times: dict[str, list[float]] = {"theirs": [], "ours": []}
        for _ in range(arguments.rounds):
            times["theirs"].append(seconds(lambda: step(theirs, batch)))
            times["ours"] += [seconds(lambda: step(ours, batch)) for _ in range(3)]
    return {
        "family": name,
        "trainer": family.trainer,
        "repository": family.repository,
        "commit": commit_of(checkout),
        "batch": count,
        "classes": len(names),
        "teacher": family.teacher,
        "seconds": {side: statistics.median(found) for side, found in times.items()},
        "peaks": peaks,
        "parity": parity,
        "deep": family.deep,
        "report": str(report),
    }


def commit_of(checkout: Path) -> str | None:
    """Its own: a folder that is no clone may lie in another one's."""
    if not (checkout / ".git").exists():
        return None
    git = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| trainer | repository | batch | classes | theirs, s | ours, s | ratio | logits "
        "| gradients | memory of a step, theirs / ours, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        theirs, ours = row["seconds"]["theirs"], row["seconds"]["ours"]
        parity = row["parity"]
        gradient = f"{parity['gradients']:.1e}"
        if row["deep"]:
            gradient += f" ({parity['as_they_round']:.1e})"
        cells = [
            row["trainer"],
            f"{row['repository']} {row['commit'][:7] if row['commit'] else '(no clone)'}",
            row["batch"],
            row["classes"],
            f"{theirs:.2f}",
            f"{ours:.3f}",
            f"{theirs / ours:.1f}x",
            f"{parity['logits']:.1e}",
            gradient,
            f"{row['peaks']['theirs']:.0f} / {row['peaks']['ours']:.0f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


NOTES = (
    "Steps are medians: forward, backward and the optimizer's step. logits, gradients: the largest "
    "difference by the largest number, of gradients in the worst tensor. In brackets: with theirs "
    "as it is, which rounds each class's or image's part of the gradient of a deep prompt to fp16 "
    "before the sum; outside them they are not rounded. The students are of the size of ViT-B/32 "
    "(PromptKD's: ViT-B/16), KDPL's teacher of ViT-B/32, PromptKD's of ViT-L/14; all weights are "
    "random."
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkouts", required=True, help="folder of clones")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, help="other than their configurations'")
    parser.add_argument("--layers", type=int, help="of all towers, for a try")
    parser.add_argument("--output", help="a file without suffix: .md and .json are written")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.here:
        warnings.simplefilter("ignore")
        torch.set_num_threads(arguments.threads)
        print(json.dumps(measure(arguments.families[0], arguments)))
        return
    rows = []
    for name in arguments.families:
        options = [f"--{key}={getattr(arguments, key)}" for key in ("classes", "threads", "rounds")]
        options += [
            f"--{key}={value}" for key in ("batch", "layers") if (value := getattr(arguments, key))
        ]
        command = [sys.executable, "-m", "benchmarks.dropin_repositories", "--here", *options]
        command += ["--checkouts", arguments.checkouts, "--families", name]
        found = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, **MALLOC}
        )
        if found.returncode:
            print(f"{name}: {found.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        rows.append(json.loads(found.stdout.splitlines()[-1]))
        print(table(rows)[-1], flush=True)
    info = {**machine(), "threads": arguments.threads}
    lines = [*table(rows), "", NOTES, "", json.dumps(info)]
    print("\n".join(lines))
    if arguments.output:
        base = Path(arguments.output)
        base.parent.mkdir(parents=True, exist_ok=True)
        base.with_suffix(".md").write_text("\n".join(lines) + "\n")
        base.with_suffix(".json").write_text(json.dumps({"machine": info, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
