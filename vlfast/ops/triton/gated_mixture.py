"""The gated mixture on a GPU, in four launches and without a word to the host.

A kernel selects the heads of each image, one lists the images of each head, one computes the
logits of the selected teachers as products of those lists with the text features of their head,
and one turns the logits of an image into its losses and gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of the tile of gate products: features times heads, and features alone.
GATE_TILE, MOST_FEATURES = 8192, 512
# Of the tile of logits: teachers and student, times classes.
LOGIT_TILE = 8192
LISTED_IMAGES = 1024
# Of the heads whose gradients are written at once.
HEAD_TILE = 16
# Images, classes and features of a tile of a product. An image selects few of the heads, so that
# a head has few images. The second is for operands that go through registers: those of fp32
# arithmetic, and rows that are not aligned, which are read element by element.
WIDE_PRODUCT = {"BLOCK_B": 32, "BLOCK_C": 64, "BLOCK_D": 64, "num_warps": 4, "num_stages": 4}
NARROW_PRODUCT = {"BLOCK_B": 32, "BLOCK_C": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 4}
# Another size of the batch compiles nothing anew, and numbers do not hang on Triton's defaults.
ANY_VALUE = ["images", "heads", "top_k"]
FUSED = {"enable_fp_fusion": True}


def gated_mixture(
    image_features: Tensor,
    gate: Tensor,
    hard_text_features: Tensor,
    student_logits: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
    temperature: Tensor | float,
    top_k: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both losses, the gradient of distillation to the student, those of both to the scores.

    [B], [B], [B, C], [B, H], [B, H], all fp32; the last three are empty without a gradient.
    image_features [B, d], gate [d, H], hard_text_features [H, C, d] and student_logits [B, C] are
    fp32, bf16 or fp16 each; labels int64 [B]. A label out of range gives NaN in its row.
    """
    image_features, gate, hard_text_features, student_logits, labels = (
        x.contiguous() for x in (image_features, gate, hard_text_features, student_logits, labels)
    )
    images, width = image_features.shape
    heads, classes, _ = hard_text_features.shape

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=image_features.device)

    distillation, selection = empty(images), empty(images)
    distillation_to_student = empty(*((images, classes) if with_gradient else (0, 0)))
    distillation_to_scores, selection_to_scores = (
        empty(*((images, heads) if with_gradient else (0, 0))) for _ in range(2)
    )
    results = (
        distillation,
        selection,
        distillation_to_student,
        distillation_to_scores,
        selection_to_scores,
    )
    if images == 0:
        return results

    weights = empty(images, top_k)
    slots = empty(heads, images, dtype=torch.int32)
    members = empty(heads, images, dtype=torch.int32)
    counts = empty(heads, dtype=torch.int32)
    # Rows that start where a wide load may. Beyond the classes they hold zeros.
    stride = triton.cdiv(classes, 16) * 16
    teachers = empty(images * top_k, stride)

    head_block = triton.next_power_of_2(heads)
    halves = image_features.dtype == hard_text_features.dtype != torch.float32
    product = WIDE_PRODUCT if halves and width % 16 == 0 else NARROW_PRODUCT
    # Every head that was selected at all may leave a tile partly filled.
    pairs = images * top_k
    tiles = pairs // product["BLOCK_B"] + min(pairs, heads)
    rows = triton.next_power_of_2(top_k + 1)

    with torch.cuda.device_of(image_features):
        select_heads[(images,)](
            image_features,
            gate,
            weights,
            slots,
            images,
            width,
            heads,
            top_k,
            BLOCK_D=min(max(GATE_TILE // head_block, 1), MOST_FEATURES),
            BLOCK_H=head_block,
            num_warps=8,
            **FUSED,
        )
        list_images[(heads,)](
            slots, members, counts, images, top_k, BLOCK_B=LISTED_IMAGES, num_warps=4, **FUSED
        )
        multiply_selected[(tiles, triton.cdiv(classes, product["BLOCK_C"]))](
            image_features,
            hard_text_features,
            members,
            counts,
            as_the_kernels_take(logit_scale, image_features),
            teachers,
            images,
            width,
            heads,
            classes,
            stride,
            top_k,
            BLOCK_H=head_block,
            **product,
            **FUSED,
        )
        compare_with_student[(images,)](
            student_logits,
            teachers,
            weights,
            slots,
            labels,
            as_the_kernels_take(temperature, image_features),
            *results,
            images,
            heads,
            classes,
            stride,
            top_k,
            WITH_GRADIENT=with_gradient,
            ROWS=rows,
            BLOCK_C=max(min(LOGIT_TILE // rows, triton.next_power_of_2(classes)), 16),
            BLOCK_H=HEAD_TILE,
            num_warps=16,
            **FUSED,
        )
    return results


def as_the_kernels_take(number: Tensor | float, beside: Tensor) -> Tensor | float:
    """A tensor on the GPU stays there; one on the CPU is read, as it holds no GPU up."""
    if isinstance(number, Tensor) and number.device == beside.device:
        return number
    return float(number)


@triton.jit
def number_of(number):
    """A number that came as it is, or as the address of a 0-d tensor."""
    number = tl.to_tensor(number)
    if number.dtype.is_ptr():
        return tl.load(number).to(tl.float32)
    else:
        return number.to(tl.float32)


@triton.jit(do_not_specialize=ANY_VALUE)
def select_heads(
    image_features,
    gate,
    weights,
    slots,
    images,
    width,
    heads,
    top_k,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """For an image: the place among the selected of each head, or -1, and the weights by place."""
    image = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    is_head = head < heads
    products = tl.zeros([BLOCK_D, BLOCK_H], tl.float32)
    for start in range(0, width, BLOCK_D):
        feature = start + tl.arange(0, BLOCK_D)
        inside = feature < width
        x = tl.load(image_features + image * width + feature, mask=inside, other=0)
        w = tl.load(
            gate + feature[:, None] * heads + head[None, :],
            mask=inside[:, None] & is_head[None, :],
            other=0,
        )
        products += x.to(tl.float32)[:, None] * w.to(tl.float32)
    scores = tl.sum(products, 0)

    # Whatever the scores, every round takes another head: NaN counts as minus infinity.
    finite = tl.abs(scores) < float("inf")
    ordered = tl.where(finite, scores, float("-inf"))
    slot = tl.full([BLOCK_H], -1, tl.int32)
    for place in range(top_k):
        free = is_head & (slot < 0)
        best = tl.max(tl.where(free, ordered, float("-inf")), 0)
        taken = tl.min(tl.where(free & (ordered == best), head, BLOCK_H), 0)
        slot = tl.where(head == taken, place, slot)

    selected = slot >= 0
    top = tl.max(tl.where(selected, scores, float("-inf")), 0)
    exponentials = tl.where(selected, tl.exp(scores - top), 0)
    broken = tl.max(tl.where(is_head & (finite == 0), 1, 0), 0) > 0
    weight = tl.where(broken, float("nan"), tl.div_rn(exponentials, tl.sum(exponentials, 0)))
    tl.store(weights + image * top_k + slot, weight, mask=selected)
    tl.store(slots + head.to(tl.int64) * images + image, slot, mask=is_head)


@triton.jit(do_not_specialize=["images", "top_k"])
def list_images(slots, members, counts, images, top_k, BLOCK_B: tl.constexpr):
    """For a head: the images that selected it, as image * top_k + place, and how many they are."""
    head = tl.program_id(0).to(tl.int64)
    count = tl.full([], 0, tl.int32)
    for start in range(0, images, BLOCK_B):
        image = start + tl.arange(0, BLOCK_B)
        slot = tl.load(slots + head * images + image, mask=image < images, other=-1)
        selected = (slot >= 0).to(tl.int32)
        position = count + tl.cumsum(selected, 0) - selected
        tl.store(members + head * images + position, image * top_k + slot, mask=slot >= 0)
        count += tl.sum(selected, 0)
    tl.store(counts + head, count)


@triton.jit(do_not_specialize=ANY_VALUE)
def multiply_selected(
    image_features,
    text_features,
    members,
    counts,
    logit_scale,
    teachers,
    images,
    width,
    heads,
    classes,
    stride,
    top_k,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Teacher logits of a block of classes, for up to BLOCK_B of the images of one head."""
    every_head = tl.arange(0, BLOCK_H)
    tiles = tl.cdiv(tl.load(counts + every_head, mask=every_head < heads, other=0), BLOCK_B)
    tile = tl.program_id(0)
    # The tiles of the heads stand one after the other; the grid has room for the most there can be.
    head = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    if head >= heads:
        return
    tile -= tl.sum(tl.where(every_head < head, tiles, 0), 0)

    head = head.to(tl.int64)
    position = tile * BLOCK_B + tl.arange(0, BLOCK_B)
    filled = position < tl.load(counts + head)
    member = tl.load(members + head * images + position, mask=filled, other=0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_class = c < classes
    image_rows = image_features + (member // top_k * width)[:, None]
    text_rows = text_features + ((head * classes + c) * width)[None, :]
    products = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for start in range(0, width, BLOCK_D):
        feature = start + tl.arange(0, BLOCK_D)
        inside = feature < width
        x = tl.load(image_rows + feature[None, :], mask=filled[:, None] & inside[None, :], other=0)
        w = tl.load(text_rows + feature[:, None], mask=inside[:, None] & is_class[None, :], other=0)
        if x.dtype != w.dtype:
            x, w = x.to(tl.float32), w.to(tl.float32)
        products = tl.dot(x, w, products, input_precision="ieee")
    tl.store(
        teachers + (member * stride)[:, None] + c[None, :],
        products * number_of(logit_scale),
        mask=filled[:, None] & (c < stride)[None, :],
    )


@triton.jit(do_not_specialize=ANY_VALUE)
def compare_with_student(
    student_logits,
    teachers,
    weights,
    slots,
    labels,
    temperature,
    distillation,
    selection,
    distillation_to_student,
    distillation_to_scores,
    selection_to_scores,
    images,
    heads,
    classes,
    stride,
    top_k,
    WITH_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The losses and gradients of an image, in two sweeps over the logits."""
    image = tl.program_id(0).to(tl.int64)
    temperature = number_of(temperature)
    sharpness = tl.div_rn(1.0, temperature)
    row = tl.arange(0, ROWS)
    is_teacher = row < top_k
    is_student = row == top_k
    teacher_rows = teachers + ((image * top_k + row) * stride)[:, None]
    student_row = student_logits + image * classes

    # The student is the row after the teachers: where it equals one, their normalisers are equal
    # to the last bit.
    top = tl.full([ROWS], float("-inf"), tl.float32)
    softened = tl.zeros([ROWS], tl.float32)
    plain = tl.zeros([ROWS], tl.float32)
    broken = tl.zeros([ROWS], tl.int32)
    for start in range(0, classes, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        is_class = c < classes
        student = tl.load(student_row + c, mask=is_class, other=0).to(tl.float32)
        teacher = tl.load(
            teacher_rows + c[None, :], mask=is_teacher[:, None] & (c < stride)[None, :], other=0
        )
        logits = tl.where(is_student[:, None], student[None, :], teacher)
        broken |= tl.max((tl.abs(logits) < float("inf")).to(tl.int32) ^ 1, 1)
        logits = tl.where(is_class[None, :], logits, float("-inf"))
        before = top
        top = tl.maximum(before, tl.max(logits, 1))
        fall = logits - top[:, None]
        softened *= tl.exp((before - top) * sharpness)
        softened += tl.sum(tl.exp(fall * sharpness), 1)
        plain *= tl.exp(before - top)
        plain += tl.sum(tl.exp(fall), 1)
    softened = tl.where(broken > 0, float("nan"), softened)
    plain = tl.where(broken > 0, float("nan"), plain)
    student_top = tl.sum(tl.where(is_student, top, 0), 0)
    student_softened = tl.sum(tl.where(is_student, softened, 0), 0)
    # Triton's own division may miss the 1 that equal normalisers must give.
    log_ratio = tl.log(tl.div_rn(softened, student_softened))
    to_p, to_q = tl.div_rn(1.0, softened), tl.div_rn(1.0, student_softened)

    weight = tl.load(weights + image * top_k + row, mask=is_teacher, other=0)
    divergence = tl.zeros([ROWS], tl.float32)
    for start in range(0, classes, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        is_class = c < classes
        is_term = is_teacher[:, None] & is_class[None, :]
        student = tl.load(student_row + c, mask=is_class, other=0).to(tl.float32) - student_top
        teacher = tl.load(
            teacher_rows + c[None, :], mask=is_teacher[:, None] & (c < stride)[None, :], other=0
        )
        teacher -= top[:, None]
        p = tl.exp(teacher * sharpness) * to_p[:, None]
        q = (tl.exp(student * sharpness) * to_q)[None, :]
        d = (teacher - student[None, :]) * sharpness - log_ratio[:, None]
        forward, difference = kl_terms(p, q, d)
        divergence += tl.sum(tl.where(is_term, forward, 0), 1)
        if WITH_GRADIENT:
            gradient = tl.sum(tl.where(is_term, weight[:, None] * difference, 0), 0)
            tl.store(
                distillation_to_student + image * classes + c, temperature * gradient, mask=is_class
            )

    label = tl.load(labels + image)
    known = (label >= 0) & (label < classes)
    label = tl.where(known, label, 0)
    of_label = tl.load(teachers + (image * top_k + row) * stride + label, mask=is_teacher, other=0)
    cross_entropy = tl.where(known, tl.log(plain) - (of_label - top), float("nan"))
    divergence *= temperature * temperature
    distilled = tl.sum(tl.where(is_teacher, weight * divergence, 0), 0)
    selected = tl.sum(tl.where(is_teacher, weight * cross_entropy, 0), 0)
    tl.store(distillation + image, distilled)
    tl.store(selection + image, selected)
    if WITH_GRADIENT:
        of_divergence = weight * (divergence - distilled)
        of_cross_entropy = weight * (cross_entropy - selected)
        for start in range(0, heads, BLOCK_H):
            head = start + tl.arange(0, BLOCK_H)
            is_head = head < heads
            slot = tl.load(slots + head.to(tl.int64) * images + image, mask=is_head, other=-1)
            at = row[:, None] == slot[None, :]
            scores = image * heads + head
            tl.store(
                distillation_to_scores + scores,
                tl.sum(tl.where(at, of_divergence[:, None], 0), 0),
                mask=is_head,
            )
            tl.store(
                selection_to_scores + scores,
                tl.sum(tl.where(at, of_cross_entropy[:, None], 0), 0),
                mask=is_head,
            )


@triton.jit
def kl_terms(p, q, d):
    """As csrc/include/vlfast/kl_terms.h has them: the forward term, and q - p."""
    x = d * d
    tail = 1 / 720 + x * (1 / 40320 + x * (1 / 3628800))
    even = x * (0.5 + x * (1 / 24 + x * tail))
    tail = 1 / 5040 + x * (1 / 362880 + x * (1 / 39916800))
    odd = d * x * (1 / 6 + x * (1 / 120 + x * tail))
    near = x <= 1
    forward = tl.where(near, p * (even - odd), p * (d - 1) + q)
    return forward, tl.where(near, p * (even - odd - d), q - p)
