"""What a batch holds, and what nobody needs and is not computed."""

import pytest
import torch
from torch.utils.data import SequentialSampler

import vlfast
from tests.conftest import squares_dataset
from tests.trainers.support import Framed, PlainDistillation
from vlfast.data.views import Views
from vlfast.objectives import Batch, Labels, Objective, Task
from vlfast.prompts import HardPrompt, SharedContext
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.prompts.projected import ProjectedPrompts
from vlfast.trainers.batches import TrainingViews, training_loader
from vlfast.trainers.feature_store import FeatureStore
from vlfast.trainers.fit import TrainingStep
from vlfast.trainers.images import view_config


class NeedsFrozen(Objective):
    kind = "needs_frozen"
    needs_frozen = True


def step_of(clip, prompts, *objectives):
    names = squares_dataset().classnames
    return TrainingStep(Task(PromptedClassifier(clip, prompts, names, "a {}."), ""), objectives)


@pytest.mark.parametrize(
    ("kind", "objectives", "stored", "pixels"),
    [
        ("shared", [Labels], [], True),
        ("shared", [Labels], ["frozen"], False),
        ("shared", [Labels, PlainDistillation], ["frozen"], True),
        ("shared", [PlainDistillation], ["frozen", "teacher"], False),
        ("shared", [PlainDistillation], ["teacher"], True),
        ("projected", [PlainDistillation], ["frozen", "teacher"], False),
        ("framed", [PlainDistillation], ["frozen", "teacher"], True),
        ("projected framed", [PlainDistillation], ["frozen", "teacher"], True),
    ],
)
def test_who_needs_pixels(tiny_clip, kind, objectives, stored, pixels):
    prompts = {
        "shared": lambda: SharedContext(tiny_clip, n_ctx=2),
        "framed": lambda: Framed(tiny_clip),
        "projected": lambda: ProjectedPrompts(tiny_clip, HardPrompt(), layers=2),
        "projected framed": lambda: ProjectedPrompts(tiny_clip, Framed(tiny_clip), layers=2),
    }[kind]()
    step = step_of(tiny_clip, prompts, *(o() for o in objectives))
    assert step.needs_pixels(dict.fromkeys(stored)) is pixels
    assert step.needs_frozen is ("framed" not in kind)
    both = dict.fromkeys(("frozen", "teacher"))
    wanted = {"frozen": "framed" not in kind, "teacher": PlainDistillation in objectives}
    assert set(step.stores_needed(both)) == {part for part, needed in wanted.items() if needed}


def test_prompts_in_the_image_tower_get_pixels_and_stored_features(tiny_clip, tmp_path):
    """Rows and images go together in the sampler's order; what is stored is not computed again."""
    path = vlfast.store_features(
        tmp_path / "store",
        model=tiny_clip,
        data=squares_dataset(),
        shots=0,
        views=2,
        show_progress=False,
    )
    part = squares_dataset().train.at([7, 3, 11, 30])
    images = Views(part, view_config(tiny_clip), seed=1, epoch=2)
    views = TrainingViews(images, {"frozen": FeatureStore(path)}, pixels=True)
    cpu = torch.device("cpu")
    (batch,) = training_loader(views, SequentialSampler(views), 4, 0, cpu)
    assert batch["labels"].tolist() == part.labels.tolist()
    expected = tiny_clip.encode_images(batch["pixels"], normalize=False)
    torch.testing.assert_close(batch["frozen"], expected, rtol=1e-5, atol=1e-6)
    step = step_of(tiny_clip, Framed(tiny_clip), Labels(), NeedsFrozen())
    seen = step.look_ahead(Batch(**batch))
    assert seen.frozen is batch["frozen"] and seen.teacher is None


def test_full_batches_where_there_are_any(tiny_clip):
    images = Views(squares_dataset().train, view_config(tiny_clip))
    views = TrainingViews(images, {}, pixels=True)
    sizes = {
        batch_size: [
            len(batch["labels"])
            for batch in training_loader(
                views, SequentialSampler(views), batch_size, 0, torch.device("cpu")
            )
        ]
        for batch_size in (16, 40, 64)
    }
    assert sizes == {16: [16, 16], 40: [40], 64: [40]}
