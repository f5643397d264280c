"""Where runs of tokens lie when they are packed without padding, and which prefix each follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedRuns:
    """R runs of tokens in M rows: first N prefixes, then suffixes, divided evenly among them.

    The R - N suffixes go to the prefixes in order: with K = (R - N) / N, the first K of them follow
    prefix 0, the next K prefix 1, and so on. A token sees all of its prefix, and of its own run
    what stands before it and itself. Without prefixes (N = 0) it sees its own run alone.

    offsets: int32 [R + 1], run r is the rows offsets[r] to offsets[r + 1]. rows: int32 [4, M], of
    each row where its run begins and ends, and where its prefix begins and ends (both 0 if it has
    none). prefixes: N. longest_prefix, longest: rows of the longest prefix and suffix, as Python
    numbers, which can be read without stalling a GPU.
    """

    offsets: Tensor
    rows: Tensor
    prefixes: int
    longest_prefix: int
    longest: int

    @classmethod
    def of(
        cls,
        prefix_lengths: Sequence[int] | Tensor,
        suffix_lengths: Sequence[int] | Tensor,
        device: torch.device | str = "cpu",
    ) -> PackedRuns:
        """Lay out runs of these lengths, integers >= 0 on the CPU.

        Raises TypeError where lengths are no integers, ValueError where one is negative, or the
        suffixes can't be divided evenly.
        """
        of_prefix = _lengths("prefix_lengths", prefix_lengths)
        of_suffix = _lengths("suffix_lengths", suffix_lengths)
        prefixes, suffixes = len(of_prefix), len(of_suffix)
        if prefixes and suffixes % prefixes:
            raise ValueError(
                f"suffix_lengths: expected a multiple of the {prefixes} prefixes, got {suffixes}"
            )
        lengths = torch.cat([of_prefix, of_suffix])
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        if int(offsets[-1]) >= 2**31:
            raise ValueError(f"suffix_lengths: expected fewer than 2**31 rows, got {offsets[-1]}")
        starts, ends = offsets[:-1], offsets[1:]
        prefix_starts, prefix_ends = torch.zeros_like(starts), torch.zeros_like(starts)
        if prefixes:
            each = suffixes // prefixes
            prefix_starts[prefixes:] = starts[:prefixes].repeat_interleave(each)
            prefix_ends[prefixes:] = ends[:prefixes].repeat_interleave(each)
        rows = torch.stack([starts, ends, prefix_starts, prefix_ends])
        rows = rows.repeat_interleave(lengths, dim=1)
        return cls(
            offsets=offsets.to(torch.int32),
            rows=rows.to(torch.int32),
            prefixes=prefixes,
            longest_prefix=int(of_prefix.max()) if prefixes else 0,
            longest=int(of_suffix.max()) if suffixes else 0,
        ).to(device)

    def __len__(self) -> int:
        """R, the number of runs."""
        return len(self.offsets) - 1

    def to(self, device: torch.device | str) -> PackedRuns:
        """The same on another device."""
        # A copy to the CPU could be read before it has arrived.
        non_blocking = torch.device(device).type != "cpu"
        return PackedRuns(
            self.offsets.to(device, non_blocking=non_blocking),
            self.rows.to(device, non_blocking=non_blocking),
            self.prefixes,
            self.longest_prefix,
            self.longest,
        )


def _lengths(name: str, given: Sequence[int] | Tensor) -> Tensor:
    """int64 [number of runs], checked."""
    lengths = torch.as_tensor(given, device="cpu").reshape(-1)
    if len(lengths) == 0:
        return lengths.to(torch.int64)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers >= 0, got {lengths.dtype}")
    if int(lengths.min()) < 0:
        raise ValueError(f"{name}: expected lengths >= 0, got {int(lengths.min())}")
    return lengths.to(torch.int64)
