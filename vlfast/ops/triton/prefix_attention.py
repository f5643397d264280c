"""Attention of packed runs to a shared prefix on a GPU: one launch forward, two backward.

A program has a few rows of one head. Forward, and for the gradient of the queries, it goes through
the keys that its rows see: those of their prefixes and those of their runs, which are two spans of
rows. For the gradient of the keys and values it goes through the queries that see its rows: those
of their own runs and, behind a prefix, those of all its runs. The latter are many, while prefixes
are few: the sum over them is split among programs, and a last launch adds the parts in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# By the largest width they are for: the rows a program has, those it goes through at a time, and
# its warps, forward and backward. Runs have a few rows each, so that most of the scores of a larger
# tile would be masked. Operands of fp32 arithmetic go through registers, which hold fewer.
HALF_TILES = {64: (32, 64, 4, 8), 128: (32, 64, 8, 8), 256: (16, 32, 8, 8)}
SINGLE_TILES = {64: (32, 16, 8, 8), 128: (16, 16, 8, 8), 256: (8, 16, 8, 8)}
# Features multiplied at a time in fp32, for the same reason.
SINGLE_CHUNK = 16
# Features of a tile at least. Narrower ones in half precision spill more registers.
HALF_WIDTH, SINGLE_WIDTH = 64, 16
# Queries in a part of the sum over those that see a prefix, until there are too many parts.
QUERIES_OF_A_SPLIT, MOST_SPLITS = 128, 32
# Of the tile of partial sums, and of the programs that divide the rows of a prefix among them.
COLUMNS, LANES = 128, 16
# Another number of rows compiles nothing anew, and numbers do not hang on Triton's defaults.
ANY_VALUE = ["count", "prefixes", "each", "splits"]
FUSED = {"enable_fp_fusion": True}


def prefix_attention_forward(
    qkv: Tensor, offsets: Tensor, rows: Tensor, prefixes: int, scale: float
) -> tuple[Tensor, Tensor]:
    """What the rows attend to, [M, H, E] as qkv, and fp32 [M, H], the log of their normalisers.

    qkv [M, 3, H, E] is fp32, bf16 or fp16; offsets, rows and prefixes are those of a PackedRuns. A
    row that sees a key or value that is not finite is NaN, in that head.
    """
    qkv, rows = qkv.contiguous(), rows.contiguous()
    count, _, heads, width = qkv.shape
    output = torch.empty((count, heads, width), dtype=qkv.dtype, device=qkv.device)
    log_normaliser = torch.empty((count, heads), dtype=torch.float32, device=qkv.device)
    if count == 0:
        return output, log_normaliser
    tile = tile_of(qkv, backward=False)
    with torch.cuda.device_of(qkv):
        attend[(triton.cdiv(count, tile["BLOCK"]), heads)](
            qkv,
            rows,
            output,
            log_normaliser,
            count,
            scale,
            **tile,
            **FUSED,
        )
    return output, log_normaliser


def prefix_attention_backward(
    grad_output: Tensor,
    qkv: Tensor,
    output: Tensor,
    log_normaliser: Tensor,
    offsets: Tensor,
    rows: Tensor,
    prefixes: int,
    scale: float,
) -> Tensor:
    """The gradient to qkv, from that to the output and what the forward gave."""
    grad_output, qkv, output, log_normaliser, offsets, rows = (
        x.contiguous() for x in (grad_output, qkv, output, log_normaliser, offsets, rows)
    )
    count, _, heads, width = qkv.shape
    grad_qkv = torch.empty_like(qkv)
    if count == 0:
        return grad_qkv
    each = (len(offsets) - 1 - prefixes) // prefixes if prefixes else 0
    splits = triton.cdiv(count, QUERIES_OF_A_SPLIT * prefixes) if prefixes else 0
    splits = min(splits, MOST_SPLITS)
    # As many rows as prefixes could have: how many they have, the GPU alone knows. Where not all
    # splits have room, fewer are made.
    sums = torch.empty(
        (count if splits > 1 else 0, 2, heads, width), dtype=torch.float32, device=qkv.device
    )
    tile = tile_of(qkv, backward=True)
    with torch.cuda.device_of(qkv):
        differentiate[(prefixes * splits + 2 * triton.cdiv(count, tile["BLOCK"]), heads)](
            grad_output,
            qkv,
            output,
            log_normaliser,
            offsets,
            rows,
            sums,
            grad_qkv,
            count,
            prefixes,
            each,
            splits,
            scale,
            SPLIT=splits > 1,
            **tile,
            **FUSED,
        )
        if splits > 1:
            add_sums[(prefixes * LANES, triton.cdiv(2 * heads * width, COLUMNS))](
                sums,
                offsets,
                grad_qkv,
                count,
                prefixes,
                each,
                splits,
                SPLITS=MOST_SPLITS,
                LANES=LANES,
                COLUMNS=COLUMNS,
                STEP=tile["STEP"],
                HEADS=heads,
                WIDTH=width,
                num_warps=4,
                **FUSED,
            )
    return grad_qkv


def tile_of(qkv: Tensor, backward: bool) -> dict[str, int]:
    """The sizes that a kernel is compiled for."""
    _, _, heads, width = qkv.shape
    single = qkv.dtype == torch.float32
    tiles = SINGLE_TILES if single else HALF_TILES
    block, step, *warps = tiles[min((most for most in tiles if width <= most), default=256)]
    block_e = max(triton.next_power_of_2(width), SINGLE_WIDTH if single else HALF_WIDTH)
    return {
        "HEADS": heads,
        "WIDTH": width,
        "BLOCK": block,
        "STEP": step,
        "BLOCK_E": block_e,
        "CHUNK": SINGLE_CHUNK if single else block_e,
        "num_warps": warps[backward],
        "num_stages": 1,
    }


@triton.jit(do_not_specialize=ANY_VALUE)
def attend(
    qkv,
    rows,
    output,
    log_normaliser,
    count,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The attention of a block of rows to the keys they see, in one sweep."""
    head = tl.program_id(1)
    columns = qkv + head * WIDTH
    first = tl.program_id(0) * BLOCK
    query = first + tl.arange(0, BLOCK)
    is_query = query < count
    run_start, prefix_start, prefix_end = starts_of(rows, count, query, is_query)
    of_prefixes, prefix_rows, of_runs, run_rows = spans_of_keys(
        rows, count, first, prefix_start, prefix_end, BLOCK
    )
    q = load_rows(columns, query, is_query, 3 * HEADS * WIDTH, WIDTH, BLOCK_E)

    top = tl.full([BLOCK], float("-inf"), tl.float32)
    normaliser = tl.zeros([BLOCK], tl.float32)
    attended = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for start in range(0, prefix_rows + run_rows, STEP):
        position = start + tl.arange(0, STEP)
        is_key = position < prefix_rows + run_rows
        key = row_at(position, of_prefixes, prefix_rows, of_runs)
        k = load_rows(columns + HEADS * WIDTH, key, is_key, 3 * HEADS * WIDTH, WIDTH, BLOCK_E)
        v = load_rows(columns + 2 * HEADS * WIDTH, key, is_key, 3 * HEADS * WIDTH, WIDTH, BLOCK_E)
        seen = is_key[None, :] & sees(
            query, run_start, prefix_start, prefix_end, key, position < prefix_rows
        )
        # What is not finite reaches a row through its scores, where it can be masked: as a value
        # with a weight of zero it would reach them all.
        finite = tl.min((is_finite(k) & is_finite(v)).to(tl.int32), 1) > 0
        scores = inner_products(q, k, CHUNK) * scale
        scores = tl.where(finite[None, :], scores, float("nan"))
        scores = tl.where(seen, scores, float("-inf"))

        before = top
        top = tl.maximum(before, tl.max(scores, 1))
        shift = tl.where(top == float("-inf"), 0, top)
        weights = tl.exp(scores - shift[:, None])
        fall = tl.exp(before - shift)
        normaliser = normaliser * fall + tl.sum(weights, 1)
        attended = tl.dot(
            weights.to(v.dtype), finite_part(v), attended * fall[:, None], input_precision="ieee"
        )

    store_rows(
        output + head * WIDTH,
        query,
        is_query,
        HEADS * WIDTH,
        WIDTH,
        BLOCK_E,
        attended / normaliser[:, None],
    )
    tl.store(
        log_normaliser + query.to(tl.int64) * HEADS + head, top + tl.log(normaliser), mask=is_query
    )


@triton.jit(do_not_specialize=ANY_VALUE)
def differentiate(
    grad_output,
    qkv,
    output,
    log_normaliser,
    offsets,
    rows,
    sums,
    grad_qkv,
    count,
    prefixes,
    each,
    splits,
    scale,
    SPLIT: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The gradients of the keys of a prefix, of some queries, or of some keys of the runs."""
    head = tl.program_id(1)
    task = tl.program_id(0)
    qkv += head * WIDTH
    grad_qkv += head * WIDTH
    grad_output += head * WIDTH
    output += head * WIDTH
    log_normaliser += head
    of_prefix = task < prefixes * splits
    block = task - prefixes * splits
    blocks = tl.cdiv(count, BLOCK)
    if of_prefix or block >= blocks:
        prefix_rows = tl.load(offsets + prefixes)
        split = task % tl.maximum(splits, 1)
        if of_prefix:
            start, end, others_start, queries, share = queries_of_prefix(
                offsets, count, task // splits, prefixes, each, splits, STEP
            )
            own = end - start
            begin = split * share
            stop = tl.minimum(begin + share, queries)
        else:
            start = prefix_rows + (block - blocks) * BLOCK
            end = tl.minimum(start + BLOCK, count)
            # Where there is no row left, no query either.
            last = tl.load(rows + count.to(tl.int64) + end - 1, mask=start < count, other=0)
            own = last - start
            others_start = start
            begin = 0
            stop = own
        if begin < stop:
            for first in range(start, end, BLOCK):
                key = first + tl.arange(0, BLOCK)
                is_key = key < end
                grad_k, grad_v = gradients_of_keys(
                    grad_output,
                    qkv,
                    output,
                    log_normaliser,
                    key,
                    is_key,
                    tl.load(rows + count.to(tl.int64) + key, mask=is_key, other=0),
                    start,
                    own,
                    others_start,
                    begin,
                    stop,
                    scale,
                    HEADS,
                    WIDTH,
                    BLOCK,
                    STEP,
                    BLOCK_E,
                    CHUNK,
                )
                if SPLIT and of_prefix:
                    sums_k = sums + head * WIDTH
                    sums_k += split.to(tl.int64) * prefix_rows * (2 * HEADS * WIDTH)
                    sums_v = sums_k + HEADS * WIDTH
                    store_rows(sums_k, key, is_key, 2 * HEADS * WIDTH, WIDTH, BLOCK_E, grad_k)
                    store_rows(sums_v, key, is_key, 2 * HEADS * WIDTH, WIDTH, BLOCK_E, grad_v)
                else:
                    to_k = grad_qkv + HEADS * WIDTH
                    to_v = to_k + HEADS * WIDTH
                    store_rows(to_k, key, is_key, 3 * HEADS * WIDTH, WIDTH, BLOCK_E, grad_k)
                    store_rows(to_v, key, is_key, 3 * HEADS * WIDTH, WIDTH, BLOCK_E, grad_v)
    else:
        gradients_of_queries(
            grad_output,
            qkv,
            output,
            log_normaliser,
            rows,
            grad_qkv,
            count,
            block * BLOCK,
            scale,
            HEADS,
            WIDTH,
            BLOCK,
            STEP,
            BLOCK_E,
            CHUNK,
        )


@triton.jit
def gradients_of_queries(
    grad_output,
    qkv,
    output,
    log_normaliser,
    rows,
    grad_qkv,
    count,
    first,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    query = first + tl.arange(0, BLOCK)
    is_query = query < count
    run_start, prefix_start, prefix_end = starts_of(rows, count, query, is_query)
    of_prefixes, prefix_rows, of_runs, run_rows = spans_of_keys(
        rows, count, first, prefix_start, prefix_end, BLOCK
    )
    stride: tl.constexpr = 3 * HEADS * WIDTH
    q = load_rows(qkv, query, is_query, stride, WIDTH, BLOCK_E)
    upstream, delta, lse = upstream_of(
        grad_output, output, log_normaliser, query, is_query, HEADS, WIDTH, BLOCK_E
    )
    gradient = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for start in range(0, prefix_rows + run_rows, STEP):
        position = start + tl.arange(0, STEP)
        is_key = position < prefix_rows + run_rows
        key = row_at(position, of_prefixes, prefix_rows, of_runs)
        k = finite_part(load_rows(qkv + HEADS * WIDTH, key, is_key, stride, WIDTH, BLOCK_E))
        v = load_rows(qkv + 2 * HEADS * WIDTH, key, is_key, stride, WIDTH, BLOCK_E)
        seen = is_key[None, :] & sees(
            query, run_start, prefix_start, prefix_end, key, position < prefix_rows
        )
        scores = inner_products(q, k, CHUNK) * scale
        to_weights = inner_products(upstream, v, CHUNK)
        to_scores = tl.exp(scores - lse[:, None]) * (to_weights - delta[:, None])
        to_scores = tl.where(seen, to_scores, 0)
        gradient = tl.dot(to_scores.to(k.dtype), k, gradient, input_precision="ieee")
    store_rows(grad_qkv, query, is_query, stride, WIDTH, BLOCK_E, gradient * scale)


@triton.jit
def gradients_of_keys(
    grad_output,
    qkv,
    output,
    log_normaliser,
    key,
    is_key,
    run_end,
    own_start,
    own,
    others_start,
    begin,
    end,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Of keys and values, from the queries begin to end of two spans.

    Of the first span, own rows from own_start, each sees the keys of its run up to itself. Of the
    second each sees them all.
    """
    stride: tl.constexpr = 3 * HEADS * WIDTH
    k = load_rows(qkv + HEADS * WIDTH, key, is_key, stride, WIDTH, BLOCK_E)
    v = load_rows(qkv + 2 * HEADS * WIDTH, key, is_key, stride, WIDTH, BLOCK_E)
    grad_k = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    grad_v = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for start in range(begin, end, STEP):
        position = start + tl.arange(0, STEP)
        is_query = position < end
        query = row_at(position, own_start, own, others_start)
        upstream, delta, lse = upstream_of(
            grad_output, output, log_normaliser, query, is_query, HEADS, WIDTH, BLOCK_E
        )
        q = finite_part(load_rows(qkv, query, is_query, stride, WIDTH, BLOCK_E))
        in_run = (key[:, None] <= query[None, :]) & (query[None, :] < run_end[:, None])
        seen = is_query[None, :] & ((position >= own)[None, :] | in_run)
        scores = inner_products(k, q, CHUNK) * scale
        weights = tl.where(seen, tl.exp(scores - lse[None, :]), 0)
        grad_v = tl.dot(weights.to(upstream.dtype), upstream, grad_v, input_precision="ieee")
        to_weights = inner_products(v, upstream, CHUNK)
        to_scores = weights * (to_weights - delta[None, :])
        grad_k = tl.dot(to_scores.to(q.dtype), q, grad_k, input_precision="ieee")
    return grad_k * scale, grad_v


@triton.jit(do_not_specialize=ANY_VALUE)
def add_sums(
    sums,
    offsets,
    grad_qkv,
    count,
    prefixes,
    each,
    splits,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Gradients of the keys and values of a prefix: every LANES-th row, some columns."""
    task = tl.program_id(0)
    start, end, _, queries, share = queries_of_prefix(
        offsets, count, task // LANES, prefixes, each, splits, STEP
    )
    prefix_rows = tl.load(offsets + prefixes).to(tl.int64)
    split = tl.arange(0, SPLITS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < 2 * HEADS * WIDTH
    for row in range(start + task % LANES, end, LANES):
        parts = tl.load(
            sums + ((split * prefix_rows + row) * (2 * HEADS * WIDTH))[:, None] + column[None, :],
            mask=(split * share < queries)[:, None] & inside[None, :],
            other=0,
        )
        target = grad_qkv + tl.cast(row, tl.int64) * (3 * HEADS * WIDTH) + HEADS * WIDTH
        tl.store(target + column, tl.sum(parts, 0), mask=inside)


@triton.jit
def queries_of_prefix(offsets, count, prefix, prefixes, each, splits, STEP: tl.constexpr):
    """What sees the keys of a prefix, its own rows and those of the runs behind it.

    Where the prefix starts and ends; where its runs start; how many rows they all have, and how
    many of them are for a split.
    """
    start = tl.load(offsets + prefix)
    end = tl.load(offsets + prefix + 1)
    behind = prefixes + prefix * each
    others_start = tl.load(offsets + behind)
    queries = end - start + tl.load(offsets + behind + each) - others_start
    splits = tl.minimum(splits, count // tl.maximum(tl.load(offsets + prefixes), 1))
    share = tl.cdiv(tl.cdiv(queries, splits), STEP) * STEP
    return start, end, others_start, queries, share


@triton.jit
def starts_of(rows, count, row, inside):
    """Where the run of each row starts, and where its prefix starts and ends."""
    count = count.to(tl.int64)
    run_start = tl.load(rows + row, mask=inside, other=0)
    prefix_start = tl.load(rows + 2 * count + row, mask=inside, other=0)
    prefix_end = tl.load(rows + 3 * count + row, mask=inside, other=0)
    return run_start, prefix_start, prefix_end


@triton.jit
def spans_of_keys(rows, count, first, prefix_start, prefix_end, BLOCK: tl.constexpr):
    """The rows that a block of rows sees: in prefixes, and in runs. Each a start and a length."""
    start = tl.min(tl.where(prefix_start < prefix_end, prefix_start, count), 0)
    length = tl.maximum(tl.max(prefix_end, 0) - start, 0)
    run_start = tl.load(rows + first)
    return start, length, run_start, tl.minimum(first + BLOCK, count) - run_start


@triton.jit
def row_at(position, first, length, second):
    """The row at this position of two spans, which start at first and second."""
    return tl.where(position < length, first + position, second + position - length)


@triton.jit
def sees(query, run_start, prefix_start, prefix_end, key, of_prefix):
    """Whether a query sees a key, be it of a prefix or of a run."""
    start = tl.where(of_prefix[None, :], prefix_start[:, None], run_start[:, None])
    end = tl.where(of_prefix[None, :], prefix_end[:, None], query[:, None] + 1)
    return (start <= key[None, :]) & (key[None, :] < end)


@triton.jit
def upstream_of(
    grad_output,
    output,
    log_normaliser,
    row,
    inside,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The gradient to the output, its product with the output, and the log of the normaliser.

    The last is NaN where one of the others is not finite, and with it all that comes of the row.
    They themselves are made finite, and may be multiplied by the weight zero of a row unseen.
    """
    gradient = load_rows(grad_output, row, inside, HEADS * WIDTH, WIDTH, BLOCK_E)
    o = load_rows(output, row, inside, HEADS * WIDTH, WIDTH, BLOCK_E)
    delta = tl.sum(gradient.to(tl.float32) * o.to(tl.float32), 1)
    lse = tl.load(log_normaliser + row.to(tl.int64) * HEADS, mask=inside, other=0)
    return finite_part(gradient), finite_part(delta), tl.where(is_finite(delta), lse, float("nan"))


@triton.jit
def load_rows(start, row, inside, stride: tl.constexpr, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr):
    e = tl.arange(0, BLOCK_E)
    return tl.load(
        start + (row.to(tl.int64) * stride)[:, None] + e[None, :],
        mask=inside[:, None] & (e < WIDTH)[None, :],
        other=0,
    )


@triton.jit
def store_rows(
    start, row, inside, stride: tl.constexpr, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, values
):
    e = tl.arange(0, BLOCK_E)
    tl.store(
        start + (row.to(tl.int64) * stride)[:, None] + e[None, :],
        values,
        mask=inside[:, None] & (e < WIDTH)[None, :],
    )


@triton.jit
def inner_products(x, y, CHUNK: tl.constexpr):
    """Of each row of x with each of y, in fp32 as a sum over chunks of the features."""
    if x.shape[1] > CHUNK:
        parts = tl.dot(
            chunks(x, CHUNK), tl.permute(chunks(y, CHUNK), 0, 2, 1), input_precision="ieee"
        )
        return tl.sum(parts, 0)
    else:
        return tl.dot(x, tl.trans(y), input_precision="ieee")


@triton.jit
def chunks(x, CHUNK: tl.constexpr):
    x = tl.reshape(x, x.shape[0], x.shape[1] // CHUNK, CHUNK)
    return tl.permute(x, 1, 0, 2)


@triton.jit
def is_finite(x):
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def finite_part(x):
    """Zero in place of what is not finite: a NaN times a weight of zero would be a NaN."""
    return tl.where(is_finite(x), x, 0)
