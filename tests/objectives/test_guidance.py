"""KgCoOp's guidance against plain PyTorch."""

import pytest
import torch
from torch.nn import functional

from tests.objectives.support import KINDS, compare_training, make_task, unit
from vlfast.errors import VlfastError
from vlfast.objectives import build_objectives


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dataset", "options", "template"),
    [
        ("letters", {}, "a photo of a {}."),
        ("describable_textures", {}, "a photo of a {}, a type of texture."),
        ("dtd", {"template": "my {}."}, "my {}."),
    ],
)
def test_kgcoop(tiny_clip, kind, dataset, options, template):
    task = make_task(tiny_clip, kind, dataset=dataset)

    def loss(plain, prompts, images, classes, logits, batch):
        frozen = unit(plain.hard(task.classifier.classnames, template))
        apart = 1 - torch.nn.CosineSimilarity(dim=-1, eps=1e-7)(classes, frozen).mean()
        return functional.cross_entropy(logits, batch.labels) + 8 * apart

    compare_training(task, [{"kind": "guidance", **options}, {"kind": "labels"}], loss, steps=2)


@pytest.mark.parametrize("kind", ["hard", "only_images"])
def test_class_features_that_learn_nothing(tiny_clip, kind):
    (objective,) = build_objectives([{"kind": "guidance"}])
    with pytest.raises(VlfastError, match=f"those of '{kind}' prompts depend on nothing"):
        objective.check(make_task(tiny_clip, kind))


@pytest.mark.parametrize("template", ["no name", "{} and {}", "{name}"])
def test_bad_template(template):
    with pytest.raises(VlfastError, match="guidance template: expected exactly one {}"):
        build_objectives([{"kind": "guidance", "template": template}])
