"""The two tiny CLIPs that ship with vlfast; tools/pretrain_glyphs.py trains them.

MODEL_CARD.md, beside this file, says on what they were trained and what they can do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlfast.errors import VlfastError, unknown_name

if TYPE_CHECKING:
    from open_clip.model import CLIP

BUNDLED: tuple[str, ...] = ("glyphs-student", "glyphs-teacher")
VOCABULARY = 49408

_FOLDER = Path(__file__).parent
_ROWS, _INDICES = "token_embedding.rows", "token_embedding.indices"


def build_model(config: dict) -> CLIP:
    """An untrained open_clip CLIP from {"model_cfg": ..., "preprocess_cfg": ...}, its
    preprocessing set."""
    from open_clip.model import CLIP, set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg

    model = CLIP(**config["model_cfg"])
    set_model_preprocess_cfg(model, vars(PreprocessCfg(**config["preprocess_cfg"])))
    return model


def pack_weights(state: dict[str, Tensor], rows: Tensor, indices: Tensor) -> dict[str, Tensor]:
    """What ``load_bundled`` reads: matrices in fp16, vectors and buffers as they are, and of the
    token embedding only the trained ``rows`` [R, d] with their token ``indices`` [R]."""
    packed = {
        name: (value.half() if value.is_floating_point() and value.ndim > 1 else value).contiguous()
        for name, value in state.items()
        if name != "token_embedding.weight"
    }
    return {**packed, _ROWS: rows.half().contiguous(), _INDICES: indices.to(torch.int32)}


def read_config(name: str, folder: str | Path = _FOLDER) -> dict:
    """{"model_cfg": ..., "preprocess_cfg": ...} of a bundled model."""
    return json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))


def load_bundled(name: str, folder: str | Path = _FOLDER) -> tuple[CLIP, Tensor]:
    """A bundled model in fp32 and eval mode, and which tokens it knows: bool [49408].

    Tokens never trained have zero rows in the embedding. The tokenizer is open_clip's
    SimpleTokenizer with context length 32. folder: where NAME.json and NAME.safetensors lie.
    Raises UnknownNameError for an unknown name, VlfastError for a missing or damaged file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if name not in BUNDLED:
        raise unknown_name("bundled model", name, BUNDLED)
    path = Path(folder) / f"{name}.safetensors"
    try:
        model = build_model(read_config(name, folder))
        state = load_file(path)
        rows, indices = state.pop(_ROWS).float(), state.pop(_INDICES).long()
        embedding = torch.zeros(VOCABULARY, rows.shape[1])
        embedding[indices] = rows
        model.load_state_dict({**state, "token_embedding.weight": embedding})
    except (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        raise _unreadable(name, path, error) from error
    except SafetensorError as error:
        raise _unreadable(name, path, error) from error
    known = torch.zeros(VOCABULARY, dtype=torch.bool)
    known[indices] = True
    return model.float().eval(), known


def _unreadable(name: str, path: Path, error: Exception) -> VlfastError:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return VlfastError(
        f"model: could not read {name} from {path.parent}: {first_line}. "
        "The installation is incomplete or damaged: install vlfast again"
    )
