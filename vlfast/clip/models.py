"""Loading CLIP models: open_clip's by name and tag, local files, and the two that ship with us."""

from __future__ import annotations

import warnings
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlfast.clip import bundled
from vlfast.clip.text_tower import TextTower
from vlfast.clip.tokens import Tokenizer, as_tokenizer
from vlfast.clip.vision_tower import VisionTower
from vlfast.errors import VlfastError, unknown_name

WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")


@dataclass(frozen=True)
class ClipModel:
    """A frozen CLIP and what prompt learning needs of it.

    name, pretrained: as asked for, files as absolute paths. model: in eval mode, no parameter
    requires grad. known_tokens: bool [V], which rows of the token embedding were ever trained
    (all, except in the tiny models). image_size: pixels. mean, std: of the normalisation, RGB.
    """

    name: str
    pretrained: str | None
    model: nn.Module
    tokenizer: Tokenizer
    text_tower: TextTower
    known_tokens: Tensor
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str

    @property
    def device(self) -> torch.device:
        return self.text_tower.text.device

    @property
    def width(self) -> int:
        """D, the size of the features."""
        text = self.text_tower.text
        if text.text_projection is None:
            return text.width
        if isinstance(text.text_projection, Tensor):
            return text.text_projection.shape[1]
        return [p for p in text.text_projection.parameters() if p.ndim == 2][-1].shape[0]

    @property
    def token_embedding(self) -> Tensor:
        """[V, d], detached."""
        return self.text_tower.text.token_embedding.weight.detach()

    @property
    def logit_scale(self) -> Tensor:
        """The factor on cosines (already exponentiated), 0-d."""
        return self.model.logit_scale.detach().exp().reshape(())

    @cached_property
    def vision_tower(self) -> VisionTower:
        """The image tower with prompts. ValueError, with the reason, for one that takes none, such
        as a ResNet."""
        return VisionTower(self.model)

    @torch.no_grad()
    def encode_images(self, images: Tensor, *, normalize: bool = True) -> Tensor:
        """Features [B, D], fp32, of preprocessed images [B, 3, S, S], without autograd."""
        # Half-precision checkpoints keep fp32 in their layer norms: the matrices tell.
        weights = next(p for p in self.model.visual.parameters() if p.ndim > 1)
        features = self.model.encode_image(images.to(weights.dtype)).float()
        return functional.normalize(features, dim=-1) if normalize else features

    def unknown_words(self, text: str) -> list[str]:
        """The tokens of ``text``, as words, whose embeddings were never trained."""
        ids = self.tokenizer.encode(text)
        known = self.known_tokens[torch.tensor(ids, dtype=torch.int64)].tolist()
        return [
            self.tokenizer.decode([i]).strip() for i, ok in zip(ids, known, strict=True) if not ok
        ]


def model_names() -> list[str]:
    """Every name that ``load_clip`` knows: the bundled ones, then open_clip's."""
    import open_clip

    return [*bundled.BUNDLED, *open_clip.list_models()]


def blocks_of(name: str) -> tuple[int, int]:
    """How many blocks the text and the image tower of a model have, by its name alone: for a name
    that open_clip does not know (a file, a model built in Python), CLIP's usual 12 and 12. Image
    towers of several stages count them all."""
    import open_clip

    if name in bundled.BUNDLED:
        config = bundled.read_config(name)["model_cfg"]
    else:
        config = open_clip.get_model_config(name)
    if config is None:
        return 12, 12
    layers = config["vision_cfg"].get("layers", 12)
    return config["text_cfg"].get("layers", 12), layers if isinstance(layers, int) else sum(layers)


def load_clip(
    name: str, pretrained: str | None = None, *, device: str | torch.device = "cpu"
) -> ClipModel:
    """Load a CLIP model, frozen, in eval mode and fp32.

    name: "glyphs-student" or "glyphs-teacher" (they ship with the package), a model name of
    open_clip, or the path of an OpenAI archive (its architecture is read from the file).
    pretrained: an open_clip tag ("openai", "laion2b_s34b_b79k", ...) or the path of a weight file
    (safetensors, a state dict, or an OpenAI JIT archive); None only where the name says it all;
    "random" for weights as they are drawn, to measure or test with.
    A state dict does not say which GELU it was trained with: for OpenAI's weights choose the name
    that ends in "-quickgelu" (a JIT archive needs no such care).

    Raises UnknownNameError for an unknown name or tag (with the nearest), FileNotFoundError for a
    missing file, VlfastError for a damaged file or a failed download. Files are read without
    unpickling arbitrary objects.
    """
    tokenizer = None
    if name in bundled.BUNDLED:
        if pretrained is not None:
            raise VlfastError(f"pretrained: {name} ships with its weights, got {pretrained!r}")
        model, known_tokens = bundled.load_bundled(name)
    elif name.endswith(WEIGHT_SUFFIXES):
        if pretrained is not None:
            raise VlfastError(f"pretrained: the model is itself a file, got also {pretrained!r}")
        model, known_tokens = _load_openai_archive(Path(name)), None
    else:
        model, known_tokens = _load_open_clip(name, pretrained), None
        tokenizer = _open_clips_tokenizer(name)
    return wrap_clip(
        model,
        name=_absolute_if_file(name),
        pretrained=None if pretrained is None else _absolute_if_file(pretrained),
        tokenizer=tokenizer,
        known_tokens=known_tokens,
        device=device,
    )


def wrap_clip(
    model: nn.Module,
    *,
    name: str = "custom",
    pretrained: str | None = None,
    tokenizer: Any = None,
    known_tokens: Tensor | None = None,
    device: str | torch.device = "cpu",
) -> ClipModel:
    """Make a CLIP that you built yourself, open_clip's or OpenAI's, ready for prompts. It is frozen
    in place.

    tokenizer: what the model was trained with, CLIP's by default: one of open_clip
    (``open_clip.get_tokenizer(name)``) or of transformers. known_tokens: bool [V], rows of the
    token embedding that were trained; None means all. Raises ValueError, with the reason, for a
    text tower that can't serve, and for a tokenizer that does not fit its vocabulary.
    """
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    model = model.to(device).eval().requires_grad_(False)
    tokenizer = as_tokenizer(SimpleTokenizer() if tokenizer is None else tokenizer)
    tower = TextTower(model, tokenizer)
    words = tower.text.token_embedding.num_embeddings
    known = getattr(tokenizer, "vocab_size", words)
    # Other embeddings than CLIP's are often rounded up to a size that suits the hardware.
    if words < known or (words > known and isinstance(tokenizer, SimpleTokenizer)):
        kind = "CLIP's" if isinstance(tokenizer, SimpleTokenizer) else "this"
        raise ValueError(
            f"model: {name} has {words} tokens, but {kind} tokenizer has {known}; "
            "give the tokenizer that it was trained with"
        )
    if known_tokens is None:
        known_tokens = torch.arange(words) < known
    preprocess = _preprocessing(model)
    size = preprocess["size"]
    return ClipModel(
        name=name,
        pretrained=pretrained,
        model=model,
        tokenizer=tokenizer,
        text_tower=tower,
        known_tokens=known_tokens,
        image_size=size if isinstance(size, int) else int(size[0]),
        mean=tuple(preprocess.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        std=tuple(preprocess.get("std", open_clip.OPENAI_DATASET_STD)),
        interpolation=preprocess.get("interpolation", "bicubic"),
    )


def _preprocessing(model: nn.Module) -> dict[str, Any]:
    """Size, mean and so on of the images, as open_clip notes them; OpenAI's class knows a size."""
    import open_clip

    visual = getattr(model, "visual", model)
    if hasattr(visual, "input_resolution"):
        return {"size": visual.input_resolution}
    return open_clip.get_model_preprocess_cfg(model)


def _load_open_clip(name: str, pretrained: str | None) -> nn.Module:
    import open_clip
    from open_clip.factory import load_checkpoint

    if name.startswith("hf-hub:") or name.startswith("local-dir:"):
        return _create(name, None)
    if name not in open_clip.list_models():
        raise unknown_name("model", name, model_names())
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        examples = ", ".join(tags[:4]) or "none published"
        raise VlfastError(
            f"pretrained: {name} needs weights: a tag ({examples}) or the path of a file"
        )
    if pretrained == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _create(name, None)
    if _is_path(pretrained):
        path = Path(pretrained)
        if _is_jit_archive(path):
            return _load_openai_archive(path, expected=name)
        model = _create(name, None)
        try:
            load_checkpoint(model, str(path))
        except Exception as error:
            raise VlfastError(
                f"pretrained: {path} does not hold weights of {name}: {_first_line(error)}"
            ) from error
        return model
    if pretrained not in tags:
        raise unknown_name(f"pretrained tag of {name}", pretrained, tags)
    return _create(name, pretrained)


def _open_clips_tokenizer(name: str) -> Any:
    import open_clip

    try:
        return open_clip.get_tokenizer(name)
    except Exception as error:
        raise VlfastError(
            f"model: could not get the tokenizer of {name}: {_first_line(error)}. It is one of "
            "transformers (pip install transformers), which reads it from the network or its cache"
        ) from error


def _create(name: str, pretrained: str | None) -> nn.Module:
    import logging

    import open_clip

    # open_clip warns through the root logger that a model without weights is random, which is
    # what is wanted here: the weights follow.
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return open_clip.create_model(name, pretrained)
    except Exception as error:
        raise VlfastError(
            f"model: could not get {name} ({pretrained}): {_first_line(error)}. "
            "Without a network, give pretrained the path of a weight file"
        ) from error
    finally:
        logger.setLevel(level)


def _load_openai_archive(path: Path, expected: str | None = None) -> nn.Module:
    """A CLIP from OpenAI's TorchScript archive or its state dict; its sizes are in the weights."""
    from open_clip.model import build_model_from_openai_state_dict, set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg

    if not path.is_file():
        raise FileNotFoundError(f"model: there is no file {path}")
    try:
        if _is_jit_archive(path):
            with warnings.catch_warnings():
                # PyTorch advises against new archives; OpenAI's are what they are.
                warnings.simplefilter("ignore", FutureWarning)
                state = torch.jit.load(str(path), map_location="cpu").state_dict()
        else:
            from open_clip.factory import load_state_dict

            state = load_state_dict(str(path))
        # A traced model stores its causal mask, which the model makes for itself.
        weights = {name: value for name, value in state.items() if name != "attn_mask"}
        model = build_model_from_openai_state_dict(weights, cast_dtype=torch.float32)
    except Exception as error:
        raise VlfastError(
            f"model: {path} is not an OpenAI CLIP archive, or it is damaged: {_first_line(error)}"
        ) from error
    if expected is not None:
        _check_architecture(model, expected, path)
    size = model.visual.image_size
    size = size if isinstance(size, int) else size[0]
    set_model_preprocess_cfg(model, vars(PreprocessCfg(size=size)))
    return model.float()


def _check_architecture(model: nn.Module, expected: str, path: Path) -> None:
    wanted = {k: v.shape for k, v in _create(expected, None).state_dict().items()}
    for key, value in model.state_dict().items():
        if wanted.get(key, value.shape) != value.shape:
            raise VlfastError(
                f"pretrained: {path} holds another architecture than {expected}: {key} is "
                f"{tuple(value.shape)}, expected {tuple(wanted[key])}"
            )


def _absolute_if_file(name: str) -> str:
    path = Path(name)
    return str(path.absolute()) if path.is_file() else name


def _is_path(pretrained: str) -> bool:
    """A path as opposed to a tag; a path that leads nowhere is an error here."""
    if Path(pretrained).is_file():
        return True
    if pretrained.endswith(WEIGHT_SUFFIXES) or "/" in pretrained:
        raise FileNotFoundError(f"pretrained: there is no file {pretrained}")
    return False


def _is_jit_archive(path: Path) -> bool:
    """TorchScript archives are zip files with a constants.pkl; checkpoints have none."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(entry.endswith("/constants.pkl") for entry in archive.namelist())


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
