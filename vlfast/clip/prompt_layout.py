"""Which token stands in which row when prompts are packed: a shared prefix, then a run a class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlfast.clip.text_output import Per, Position
from vlfast.ops import PackedRuns


@dataclass(frozen=True, eq=False)
class PromptLayout:
    """M packed rows: of every prefix the tokens that all classes share, then of every class the
    rest, up to EOT. There is one prefix, or one an image, each with a run for every class.

    runs: where they lie. ids: int64 [M], the frozen tokens, 0 where a context vector stands.
    positions: int64 [M], of the positional embedding. context_rows: int64, the rows of the context
    vectors: the first ``in_prefix`` of them in every prefix, the others in every run. eot_rows:
    int64, one a run. state_rows: int64, the rows before each context vector: of the first
    ``states_in_prefix`` vectors in every prefix, of the others in every run. No row is named twice,
    so that gradients are gathered and never added up by atomics.
    """

    runs: PackedRuns
    ids: Tensor
    positions: Tensor
    n_ctx: int
    context_rows: Tensor
    in_prefix: int
    eot_rows: Tensor
    state_rows: Tensor
    states_in_prefix: int

    @classmethod
    def of(
        cls,
        suffix: Tensor,
        lengths: Tensor,
        name_lengths: Tensor,
        sot: int,
        *,
        n_ctx: int,
        per: Per,
        position: Position,
        images: int,
        device: torch.device | str = "cpu",
    ) -> PromptLayout:
        """Lay out the tensors of PromptTokens around ``n_ctx`` vectors, for ``images`` prefixes."""
        order = token_order(name_lengths, suffix.shape[1], n_ctx, position)
        in_prefix = 0 if per == "class" else vectors_before_name(n_ctx, position)
        length = 1 + in_prefix
        if in_prefix == n_ctx:
            length += common_tokens(suffix, lengths)

        # Of prefix and run joined, what stands at each place of a class: [C, L].
        place = torch.arange(order.shape[1])
        frozen = torch.cat([suffix.new_full((len(suffix), 1), sot), suffix], dim=1)
        is_vector = (order > 0) & (order <= n_ctx)
        before_vector = is_vector.roll(-1, dims=1)
        ids = frozen.gather(1, (order - n_ctx).clamp(min=0)).masked_fill(is_vector, 0)
        ends = n_ctx + lengths[:, None]

        in_run = (place >= length) & (place <= ends)
        size = int(in_run.sum())
        in_runs = torch.zeros_like(order)
        in_runs[in_run] = torch.arange(size)
        image = torch.arange(images)[:, None]

        def values(grid: Tensor) -> Tensor:
            grid = grid.expand(len(suffix), -1)
            return torch.cat([grid[0, :length].repeat(images), grid[in_run].repeat(images)])

        def rows(where: Tensor) -> Tensor:
            of_prefix = image * length + place[:length][where[0, :length]]
            of_runs = images * length + image * size + in_runs[where & in_run]
            return torch.cat([of_prefix.flatten(), of_runs.flatten()])

        def on_device(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return cls(
            runs=PackedRuns.of([length] * images, (ends[:, 0] + 1 - length).repeat(images), device),
            ids=on_device(values(ids)),
            positions=on_device(values(place)),
            n_ctx=n_ctx,
            context_rows=on_device(rows(is_vector)),
            in_prefix=in_prefix,
            eot_rows=on_device(rows(place == ends)),
            state_rows=on_device(rows(before_vector)),
            states_in_prefix=int(before_vector[0, :length].sum()),
        )

    def vectors(self, context: Tensor) -> Tensor:
        """The context vectors that stand in ``context_rows``, from [n, d] or one set a class or
        image."""
        each = context if context.ndim == 3 else context[None]
        if self.n_ctx == 0:
            return each.flatten(0, 1)
        of_prefix, of_runs = each[:, : self.in_prefix], each[:, self.in_prefix :]
        if self.in_prefix == self.n_ctx:
            return of_prefix.expand(self.runs.prefixes, -1, -1).flatten(0, 1)
        of_runs = of_runs.expand(len(self.eot_rows), -1, -1).flatten(0, 1)
        return torch.cat([of_prefix.flatten(0, 1), of_runs])

    def states(self, rows: Tensor) -> Tensor:
        """What ``state_rows`` hold, [prefixes or runs, n, d]: one copy for each prefix where all of
        them stand there, else one for each run."""
        prefixes, first = self.runs.prefixes, self.states_in_prefix
        of_prefix = rows[: prefixes * first].unflatten(0, (prefixes, first))
        if first == self.n_ctx:
            return of_prefix
        of_runs = rows[prefixes * first :].unflatten(0, (-1, self.n_ctx - first))
        return torch.cat([of_prefix.expand(len(of_runs), -1, -1), of_runs], dim=1)


def token_order(name_lengths: Tensor, longest: int, n_ctx: int, position: Position) -> Tensor:
    """int64 [C, 1 + n_ctx + longest]: which entry of [SOS | context | suffix] stands at each place
    of a class, whose name has so many tokens."""
    place = torch.arange(1 + n_ctx + longest, device=name_lengths.device)
    place = place.expand(len(name_lengths), -1)
    if position == "end":
        return place
    before = vectors_before_name(n_ctx, position)
    name = name_lengths.unsqueeze(1)
    in_name = (place > before) & (place <= before + name)
    after_name = (place > before + name) & (place <= n_ctx + name)
    moved = torch.where(in_name, place + (n_ctx - before), place)
    return torch.where(after_name, place - name, moved)


def vectors_before_name(n_ctx: int, position: Position) -> int:
    """How many of the context vectors stand before the class name."""
    return {"end": n_ctx, "middle": n_ctx // 2, "front": 0}[position]


def common_tokens(suffix: Tensor, lengths: Tensor) -> int:
    """How many tokens all classes begin with, EOT not counted."""
    same = (suffix == suffix[0]).all(0).long().cumprod(0)
    return min(int(same.sum()), int(lengths.min()) - 1)
