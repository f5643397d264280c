"""What tests share: a tiny random CLIP, and a dataset of coloured squares that it can learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vlfast.data.dataset import Dataset, Split

# Models this small gain nothing from threads, and spinning threads starve each other on a busy
# machine. Tests of threading set their own number.
torch.set_num_threads(1)

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (30, 40, 220),
    "yellow": (230, 220, 30),
    "dark grey": (60, 60, 60),
}


class Squares:
    """An ImageSource: image i shows colour i % 5, with noise."""

    renders_views = True

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, view: int | None = None) -> Image.Image:
        generator = np.random.default_rng([index, view or 0])
        colour = np.array(list(COLOURS.values())[index % len(COLOURS)])
        noise = generator.integers(-25, 25, (32, 32, 3))
        return Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8))

    def key(self, index: int) -> str:
        return f"square/{index}"


def squares_dataset(train: int = 40, val: int = 20, test: int = 40) -> Dataset:
    """Coloured squares; ``train``, ``val`` and ``test`` images, the classes in turn."""
    total = train + val + test
    source = Squares(total)
    indices, labels = np.arange(total), np.arange(total) % len(COLOURS)
    whole = Split(source, indices, labels)
    return Dataset(
        name="squares",
        classnames=tuple(COLOURS),
        template="a {} square.",
        train=whole.at(range(train)),
        val=whole.at(range(train, train + val)),
        test=whole.at(range(train + val, total)),
        domains={"noisy": whole.at(range(train + val, total, 2))},
        context_init="a photo of a",
    )


@pytest.fixture(scope="session")
def squares() -> Dataset:
    return squares_dataset()


@pytest.fixture(scope="session")
def tiny_model() -> torch.nn.Module:
    """A random CLIP of two small towers with CLIP's vocabulary; context length 24."""
    return make_tiny_model()


def make_tiny_model() -> torch.nn.Module:
    import open_clip

    torch.manual_seed(0)
    return open_clip.model.CLIP(
        embed_dim=32,
        vision_cfg=open_clip.CLIPVisionCfg(
            image_size=32, layers=1, width=32, head_width=16, patch_size=8
        ),
        text_cfg=open_clip.CLIPTextCfg(context_length=24, width=32, heads=2, layers=3),
    ).eval()


@pytest.fixture(scope="session")
def tiny_clip(tiny_model):
    from vlfast.clip.models import wrap_clip

    return wrap_clip(tiny_model, name="tiny")
