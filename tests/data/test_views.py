"""Test views and seeded training views."""

import numpy as np
import pytest
import torch
from PIL import Image

from vlfast.data.dataset import Split
from vlfast.data.views import (
    ViewConfig,
    Views,
    eval_transform,
    image_batch,
    view_number,
    view_seed,
)

CONFIG = ViewConfig(size=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


class Photos:
    renders_views = False

    def __len__(self):
        return 4

    def load(self, index, view=None):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 30, 3))
        return Image.fromarray(pixels.astype(np.uint8))

    def key(self, index):
        return str(index)


def photos() -> Split:
    return Split(Photos(), np.arange(4), np.array([0, 1, 0, 1]))


def test_test_view_is_resized_cropped_and_normalised():
    image = Image.new("RGB", (60, 32), (51, 102, 153))
    view = eval_transform(CONFIG)(image)
    assert view.shape == (3, 16, 16) and view.dtype == torch.float32
    expected = [(0.2 - 0.5) / 0.2, (0.4 - 0.4) / 0.3, (0.6 - 0.3) / 0.4]
    assert view.mean(dim=(1, 2)).tolist() == pytest.approx(expected, abs=1e-5)


def test_training_views_depend_on_seed_epoch_and_image_alone():
    views = Views(photos(), CONFIG, seed=3)
    views.epoch = 5
    first = [views[i][0] for i in range(4)]
    torch.manual_seed(999)
    again = Views(photos(), CONFIG, seed=3)
    again.epoch = 5
    for i in reversed(range(4)):
        assert torch.equal(again[i][0], first[i])
    again.epoch = 6
    assert not torch.equal(again[0][0], first[0])
    other = Views(photos(), CONFIG, seed=4)
    other.epoch = 5
    assert not torch.equal(other[0][0], first[0])


def test_epochs_take_views_in_turn():
    assert [view_number(epoch, 3) for epoch in range(1, 8)] == [1, 2, 3, 1, 2, 3, 1]
    assert [view_number(epoch, None) for epoch in range(1, 4)] == [1, 2, 3]


def test_drawing_views_leaves_the_global_generator_alone():
    views = Views(photos(), CONFIG, seed=1, epoch=1)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    views[2]
    assert torch.equal(torch.rand(3), expected)


def test_without_an_epoch_views_are_test_views():
    views = Views(photos(), CONFIG)
    image, label = views[1]
    assert label == 1
    assert torch.equal(image, eval_transform(CONFIG)(photos().image(1)))


def test_view_seeds_do_not_collide():
    seeds = {view_seed(s, e, i) for s in range(3) for e in range(20) for i in range(50)}
    assert len(seeds) == 3 * 20 * 50


def test_image_batch_takes_any_mode():
    batch = image_batch([Image.new("L", (20, 20)), Image.new("RGBA", (30, 18))], CONFIG)
    assert batch.shape == (2, 3, 16, 16)
