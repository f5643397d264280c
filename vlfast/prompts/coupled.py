"""Deep prompts in both towers, the image tower's made from the text tower's: MaPLe."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from vlfast.clip.models import ClipModel
from vlfast.prompts.deep import DeepContext
from vlfast.prompts.depth import check_visual_depth


class CoupledPrompts(DeepContext):
    """Context in the first ``depth`` blocks of the text tower, and a projection of it in the same
    blocks of the image tower: MaPLe (arXiv 2210.03117), section 3.2.

    context, deep: see DeepContext. projections: Linear(d, width of the image tower) for each of the
    ``depth`` blocks, in PyTorch's default initialisation; those behind the first start as copies of
    one.
    """

    kind = "coupled"
    learns_images = True

    def __init__(
        self,
        clip: ClipModel,
        *,
        n_ctx: int | None = 2,
        init: str | None = "a photo of a",
        depth: int = 9,
    ) -> None:
        super().__init__(clip, n_ctx, init, depth)
        check_visual_depth(clip, depth, "depth")
        d, width = clip.text_tower.width, clip.vision_tower.width
        first, another = (nn.Linear(d, width) for _ in range(2))
        copies = (copy.deepcopy(another) for _ in range(depth - 1))
        self.projections = nn.ModuleList([first, *copies])

    def encode_images(
        self, clip: ClipModel, pixels: Tensor | None, frozen: Tensor | None = None
    ) -> Tensor:
        texts = [self.context, *self.deep]
        visual = [project(x) for project, x in zip(self.projections, texts, strict=True)]
        return clip.vision_tower(pixels, visual)
