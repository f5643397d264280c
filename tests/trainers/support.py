"""An objective on a teacher in plain PyTorch, and learned pixels for prompts in the image tower."""

import torch
from torch import nn
from torch.nn import functional

from vlfast.objectives import Objective
from vlfast.prompts import HardPrompt


class PlainDistillation(Objective):
    """KL(teacher || student) over the classes, mean over images and classes, at the teacher's
    scale: PromptKD's loss."""

    kind = "plain_distillation"
    needs_teacher = True

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)

    def prepare(self, task):
        self.classes = task.teacher.class_features(task.classifier.classnames)
        self.scale = task.teacher.logit_scale

    def forward(self, step):
        target = (self.scale * step.batch.teacher @ self.classes.T).softmax(1)
        value = functional.kl_div(step.logits.log_softmax(1), target, reduction="sum")
        return {self.kind: value / target.numel()}


class Framed(HardPrompt):
    """A learned picture that is added to every image."""

    kind = "framed"
    learns_images = True

    def __init__(self, clip) -> None:
        super().__init__()
        self.frame = nn.Parameter(0.1 * torch.randn(3, clip.image_size, clip.image_size))
        self.unused = nn.Parameter(torch.zeros(2))

    def encode_images(self, clip, pixels, frozen=None):
        return clip.model.encode_image(pixels + self.frame)
