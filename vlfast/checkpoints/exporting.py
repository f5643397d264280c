"""From a run of ours to a checkpoint that the authors' code loads."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from vlfast.checkpoints.families import FAMILIES, GATE, Family
from vlfast.checkpoints.token_buffers import buffers
from vlfast.clip.models import ClipModel
from vlfast.errors import VlfastError
from vlfast.prompts import Prompts
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.prompts.projected import ProjectedPrompts
from vlfast.prompts.visual import VisualPrompts
from vlfast.run import load
from vlfast.trainers.files import replacing

_TITLE_OF_KIND = {
    "shared": "CoOp",
    "class_specific": "CoOp",
    "conditional": "CoCoOp",
    "visual": "VPT",
    "independent": "IVLP",
    "coupled": "MaPLe",
}
_VPT_WORDS = "a photo of a"


def export_checkpoint(
    run: str | Path,
    output: str | Path,
    *,
    checkpoint: str = "last",
    device: str = "auto",
    clip: ClipModel | None = None,
) -> Path:
    """Write a run's prompts where the code of CoOp, CoCoOp, MaPLe, PromptSRC, MoPD or PromptKD
    looks for them; the file that was written.

    run: its folder. output: gets NAME/model.pth.tar-EPOCH, or NAME/model-best.pth.tar for the
    checkpoint "best", and the text file NAME/checkpoint; NAME is what the authors' trainer
    registers its model as, and output what their --model-dir wants. The file holds the learned
    tensors in fp32 and, of contexts, the token vectors of the class names; their ``load_model``
    keeps what it has of all else. Optimizer and scheduler are None: their code can evaluate it, but
    not resume.

    Raises VlfastError for prompts that no such code has, or a file that exists already.
    """
    loaded = load(run, checkpoint=checkpoint, device=device, clip=clip)
    classifier, folder = loaded.classifier, loaded.folder
    tensors, about = folder.read_tensors(checkpoint)
    family = _family(classifier.prompts, mopd=GATE in tensors)
    state = _state(classifier, family)
    if GATE in tensors:
        state[family.key(GATE)] = tensors[GATE]
    epoch = about.get("epoch", 0)
    name = "model-best.pth.tar" if checkpoint == "best" else f"model.pth.tar-{epoch}"
    file = Path(output) / family.registered / name
    if file.exists():
        raise VlfastError(f"output: {file} exists already; choose another folder")
    held = {
        "state_dict": state,
        "epoch": epoch,
        "optimizer": None,
        "scheduler": None,
        "val_result": None,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as path:
        torch.save(held, path)
    with replacing(file.with_name("checkpoint")) as path:
        path.write_text(f"{name}\n", encoding="utf-8")
    return file


def _family(prompts: Prompts, *, mopd: bool) -> Family:
    """Whose code has such prompts."""
    if isinstance(prompts, ProjectedPrompts):
        two_layers = prompts.projector is not None and len(prompts.projector) == 4
        if not (prompts.kind == "visual" and two_layers and prompts.classes is not None):
            raise VlfastError(
                "export: of prompts with a projector or a teacher's class features, PromptKD's "
                "code has visual ones with two layers and the teacher's features alone, got "
                f"{prompts.kind!r}"
            )
        title = "PromptKD"
    elif prompts.kind not in _TITLE_OF_KIND:
        raise VlfastError(
            f"export: {prompts.kind} prompts are in no other method's code, so there is no format "
            f"for them; those of {', '.join(_TITLE_OF_KIND)} can be exported"
        )
    else:
        title = "MoPD" if mopd else _TITLE_OF_KIND[prompts.kind]
    return next(family for family in FAMILIES if family.title == title)


def _state(classifier: PromptedClassifier, family: Family) -> dict[str, Tensor]:
    prompts, clip = classifier.prompts, classifier.clip
    state = {}
    for name, tensor in prompts.state_dict().items():
        if name.startswith("projector.") and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # a linear layer is a convolution of one pixel
        state[family.key(name)] = tensor.detach().cpu().contiguous().clone()
    if isinstance(prompts, VisualPrompts) and prompts.words != _VPT_WORDS:
        warnings.warn(
            f"export: the text of VPT's code is always {_VPT_WORDS!r}, and that of this run is "
            f"{prompts.words!r}, so that code will predict otherwise",
            stacklevel=3,
        )
    n_ctx = prompts.num_context
    if n_ctx is not None:
        if classifier.tokens.sot is None:
            raise VlfastError(
                f"model: texts of {clip.name} have no start token; the authors' code knows "
                "OpenAI's CLIP alone"
            )
        for name, tensor in buffers(clip, classifier.tokens, n_ctx).items():
            state[f"{family.prefix}{name}"] = tensor.contiguous().clone()
    return state
