"""The decode kernel of latent attention for Hopper and few heads, in Gluon: slots by heads, of latents in 16 bits or 8.

With 16 heads a step waits for memory, but Hopper's matrix instruction takes 64 rows at least. So here slots, then columns, are
the rows and heads the 16 columns; more heads are other programs, which find the cache in L2:

    scores (64 slots x 16 heads)           =  c q^T
    sums   (512 columns x 16 heads)       +=  c^T p

Latents of 16 bits (bfloat16, float16) are read by both products where the copy engine put them, and one group of four warps
does all of that in less time than the next block takes to come: 68 matrix instructions and a softmax of 64 x 16 scores.

Latents of 8 bits (int8, fp8 e4m3) are widened on their way to registers, of which the instruction takes its first operand, and
never written back: to float16, in less than half the instructions that bfloat16 takes. Two of a slot's columns are read as one
number of 16 bits. For the sums even and odd columns are two planes that are multiplied apart. Of scores

- those with int8 are integer products: queries are whole numbers of 15 bits times a power of two that is about their head's
  largest, in two digits of 8 bits, and 128 (c high^T) + c low^T is exact;
- those with fp8 are of float16, and queries are divided by that power, so that nothing overflows. Numbers stay where they are
  widened: two columns of every four are a plane, the other two another, and queries are kept so too.

With t_s the scale that all elements of slot s share, the running maximum is m = max over s of (score_s + log2 t_s), so that no
weight is more than float16 holds:

    weights_s = 2^(score_s + log2 t_s - m) <= 1,    out = sum of weights_s c_s / sum of 2^(score_s - m)

Of 8 bits two groups of four warps walk a half of the program's range each, and a third brings blocks of 64 slots for them in
turns; at the end the second group's sums pass to the first through shared memory. A block that would pass its range's end
begins earlier, and what the block before has covered counts as -inf.

Letters: B batch, S slots, H query heads, L kv_lora_rank, P rotated width. In the kernel: c latents, k rotated keys, q queries.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's compiler gives the parameters of its kernels their types at each launch.

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from modeling.kernels.decode_kernels import EIGHT_BITS
from modeling.kernels.latent_decode_triton import Tile

HEADS, SLOTS, PAIRS, ROTATED = gl.constexpr(16), gl.constexpr(64), gl.constexpr(256), gl.constexpr(64)
PART = gl.constexpr(64)  # pairs of columns that are multiplied at a time
# Of one program, for the choice of splits: all groups together; of 8 bits, and of 16.
TILE = Tile(heads=16, slots=2 * 64, warps=4, stages=5, registers=168, resident=1, start=640)
WIDE_TILE = Tile(heads=16, slots=64, warps=4, stages=2, registers=168, resident=1, start=256)
# Of the groups that multiply; what is left of three times TILE's registers, 24, is for the one that copies.
WORKER_WARPS, WORKER_REGISTERS = gl.constexpr([4, 4]), gl.constexpr([240, 240])
WIDE_WARPS, WIDE_REGISTERS = gl.constexpr([4]), gl.constexpr([240])
MADE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 16, 16]))
COUNTED = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 16, 32]))
BYTES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0]))
SUMS = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[1, 0]))
QUERIES = gl.constexpr(gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0]))
WIDENED = gl.constexpr(gl.DotOperandLayout(0, MADE, 2))


class Memory(NamedTuple):
    """What a program has in shared memory, and the barriers that say when a stage may be read (`full`) or written (`empty`)."""

    q: Any  # (2, 16, 256): of 16 bits the halves; of fp8 the two planes, divided by `sizes`; of int8 (2, 16, 512) digits
    sizes: Any  # (16)
    q_rotated: Any  # (16, 64)
    c: Any  # (5, 64, 256) pairs of columns; of 16 bits (4, 64, 256), two halves a stage
    k: Any  # (stages, 64, 64)
    p: Any  # (groups, 16, 64): each group's weights
    full: Any
    empty: Any
    state: Any  # (2, 16): the second group's m and total, once it is done
    done: Any


class Place(NamedTuple):
    """Which part of the problem a program computes, and where what it needs and makes lies."""

    row: Any
    head: Any
    heads: Any
    split: Any
    splits: Any
    start: Any  # of its first group's range; the next group's follows
    per_range: Any
    length: Any
    scales: Any  # of the row's first slot
    scales_stride: Any
    out: Any
    lse: Any
    scale_log2: Any


@gluon.jit
def _range(place, group):
    """(first slot, slot behind the last) of a group; the first is no less where nothing is left."""
    start = place.start + group * place.per_range
    return start, gl.minimum(start + place.per_range, place.length)


@gluon.jit
def _fetch(latent, k_rope, shared, place, number, GROUPS: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr):
    """Begin the copy of a block; groups take blocks in turns."""
    PARTS: gl.constexpr = 2 if WIDE else 1
    stage = number % STAGES
    start, end = _range(place, number % GROUPS)
    slot = gl.minimum(start + SLOTS * (number // GROUPS), end - SLOTS)
    mbarrier.wait(shared.empty.index(stage), ((number // STAGES) & 1) ^ 1)
    mbarrier.expect(shared.full.index(stage), 2 * SLOTS * (PARTS * PAIRS + ROTATED))
    for part in gl.static_range(PARTS):
        c = shared.c.index(PARTS * stage + part)._reinterpret(latent.dtype, latent.block_type.shape, latent.layout)
        tma.async_copy_global_to_shared(latent, [place.row, slot, part * PAIRS], shared.full.index(stage), c)
    k = shared.k.index(stage)._reinterpret(k_rope.dtype, k_rope.block_type.shape, k_rope.layout)
    tma.async_copy_global_to_shared(k_rope, [place.row, slot, 0], shared.full.index(stage), k)


@gluon.jit
def _bring(latent, k_rope, shared, place, GROUPS: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr):
    """The copying group; the first copies, one a stage, were begun before."""
    for number in range(STAGES, GROUPS * (place.per_range // SLOTS)):
        _fetch(latent, k_rope, shared, place, number, GROUPS, STAGES, WIDE)


@gluon.jit
def _planes(pairs, INT8: gl.constexpr):
    """(even columns, odd ones) of pairs of columns, as float16; two pairs at a time. Exact.

    int8: with the sign's bit turned it is 0 to 255, and 0x6400 with that below it is 1,024 more.
    """
    if INT8:
        even, odd = gl.inline_asm_elementwise(
            """
            {
            .reg .b32 turned, bias;
            mov.b32 bias, 0x64806480;
            xor.b32 turned, $2, 0x80808080;
            prmt.b32 $0, turned, 0x64646464, 0x4240;
            prmt.b32 $1, turned, 0x64646464, 0x4341;
            sub.rn.f16x2 $0, $0, bias;
            sub.rn.f16x2 $1, $1, bias;
            }
            """,
            "=&r,=&r,r",
            [pairs],
            dtype=(gl.float16, gl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        even, odd = gl.inline_asm_elementwise(
            """
            {
            .reg .b16 low, high;
            .reg .b32 sorted;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {low, high}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }
            """,
            "=r,=r,r",
            [pairs],
            dtype=(gl.float16, gl.float16),
            is_pure=True,
            pack=2,
        )
    return even, odd


@gluon.jit
def _as_they_lie(pairs):
    """(columns 0 and 1 of every four, columns 2 and 3) of pairs of columns in fp8, as float16; two pairs at a time. Exact.

    A register holds two pairs that follow each other: what is widened from it takes two numbers' place in either result.
    """
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b16 low, high;
        mov.b32 {low, high}, $2;
        cvt.rn.f16x2.e4m3x2 $0, low;
        cvt.rn.f16x2.e4m3x2 $1, high;
        }
        """,
        "=r,=r,r",
        [pairs],
        dtype=(gl.float16, gl.float16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _scores_of_part(c, shared, scores, FIRST: gl.constexpr):
    """Scores of a block with a part of the columns more, widened."""
    left, right = _as_they_lie(c.slice(FIRST, PART, 1).load(WIDENED))
    q_left = shared.q.index(0).slice(FIRST, PART, 1).permute((1, 0))
    q_right = shared.q.index(1).slice(FIRST, PART, 1).permute((1, 0))
    scores = warpgroup_mma(left, q_left, scores, use_acc=FIRST > 0, is_async=True)
    scores = warpgroup_mma(right, q_right, scores, is_async=True)
    # Until its product is done an operand keeps its registers: more of them at once than this, and ptxas lets no two
    # products overlap.
    return warpgroup_mma_wait(1, deps=[scores])


@gluon.jit
def _scores(shared, stage, step, size, INT8: gl.constexpr, WIDE: gl.constexpr):
    """Scores of a block; step: the scales of its slots, size: what its heads' queries were divided by."""
    empty = gl.zeros([SLOTS, HEADS], gl.float32, MADE)
    rotated = warpgroup_mma(shared.k.index(stage), shared.q_rotated.permute((1, 0)), empty, use_acc=False, is_async=True)
    if WIDE:
        scores = warpgroup_mma(shared.c.index(2 * stage), shared.q.index(0).permute((1, 0)), rotated, is_async=True)
        scores = warpgroup_mma(shared.c.index(2 * stage + 1), shared.q.index(1).permute((1, 0)), scores, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
    elif INT8:
        c = shared.c.index(stage)._reinterpret(gl.int8, [SLOTS, 2 * PAIRS], BYTES)
        nothing = gl.zeros([SLOTS, HEADS], gl.int32, COUNTED)
        high = warpgroup_mma(c, shared.q.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
        low = warpgroup_mma(c, shared.q.index(1).permute((1, 0)), nothing, use_acc=False, is_async=True)
        high, low, rotated = warpgroup_mma_wait(0, deps=[high, low, rotated])
        counted = gl.convert_layout((high * 128 + low).to(gl.float32), MADE)
        scores = counted * step * (size * (1.0 / 8192)) + rotated
    else:
        c = shared.c.index(stage)
        scores = _scores_of_part(c, shared, empty, 0)
        scores = _scores_of_part(c, shared, scores, PART)
        scores = _scores_of_part(c, shared, scores, 2 * PART)
        scores = _scores_of_part(c, shared, scores, 3 * PART)
        scores, rotated = warpgroup_mma_wait(0, deps=[scores, rotated])
        scores = scores * step * size + rotated
    return scores


@gluon.jit
def _weighted(shared, stage, p, even_sums, odd_sums, shrink, FIRST: gl.constexpr, INT8: gl.constexpr, WIDE: gl.constexpr):
    """A part of the columns: its sums with those of a block more; of 16 bits its halves are what planes are of 8."""
    if WIDE:
        c = shared.c.index(2 * stage + 2 * FIRST // PAIRS)
        even = c.slice(2 * FIRST % PAIRS, PART, 1).permute((1, 0))
        odd = c.slice(2 * FIRST % PAIRS + PART, PART, 1).permute((1, 0))
    else:
        even, odd = _planes(shared.c.index(stage).slice(FIRST, PART, 1).permute((1, 0)).load(WIDENED), INT8)
    even_sums = warpgroup_mma(even, p, even_sums * shrink[None, :], is_async=True)
    odd_sums = warpgroup_mma(odd, p, odd_sums * shrink[None, :], is_async=True)
    if not WIDE:
        even_sums, odd_sums = warpgroup_mma_wait(1, deps=[even_sums, odd_sums])
    return even_sums, odd_sums


@gluon.jit
def _steps(place, slot, WIDE: gl.constexpr):
    """The scales of a block of slots, of 16 bits ones; before a row's first slot nothing is read."""
    if WIDE:
        steps = gl.full([SLOTS], 1.0, gl.float32, gl.SliceLayout(1, MADE))
    else:
        numbers = slot + gl.arange(0, SLOTS, gl.SliceLayout(1, MADE))
        steps = gl.load(place.scales + numbers * place.scales_stride, mask=numbers >= 0, other=0.0).to(gl.float32)
    return steps


@gluon.jit
def _store(place, places, sums, FIRST: gl.constexpr, PLANE: gl.constexpr, WIDE: gl.constexpr, filled, heads):
    between: gl.constexpr = 1 if WIDE else 2
    columns = 2 * FIRST + (PART if WIDE else 1) * PLANE + between * gl.arange(0, PART, gl.SliceLayout(1, MADE))
    places = place.out + places[None, :] * (2 * PAIRS) + columns[:, None]
    gl.store(places, sums.to(place.out.dtype.element_ty), mask=heads[None, :] < filled)


@gluon.jit
def _keep(other, sums, some, NUMBER: gl.constexpr):
    other.index(NUMBER).store(gl.where(some, sums, 0.0))


@gluon.jit
def _with(other, sums, own, its, NUMBER: gl.constexpr):
    return sums * own + other.index(NUMBER).load(MADE) * its


@gluon.jit
def _attend(
    shared,
    place,
    GROUP: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    INT8: gl.constexpr,
    WIDE: gl.constexpr,
    ONE: gl.constexpr,
):
    """One group's range, and the first one's with the second's."""
    start, end = _range(place, GROUP)
    even_0 = gl.zeros([PART, HEADS], gl.float32, MADE)
    even_1, even_2, even_3, odd_0, odd_1, odd_2, odd_3 = even_0, even_0, even_0, even_0, even_0, even_0, even_0
    size = shared.sizes.load(gl.SliceLayout(0, MADE))[None, :]
    parts = gl.zeros([SLOTS, HEADS], gl.float32, MADE)  # of total: warps meet for it once, behind the loop
    m = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(0, MADE))
    p = shared.p.index(GROUP).permute((1, 0))
    steps = _steps(place, gl.minimum(start, end - SLOTS), WIDE)
    for block in range(place.per_range // SLOTS):
        number = GROUPS * block + GROUP
        stage = number % STAGES
        first = start + SLOTS * block
        step = steps[:, None]
        # Of the next block, on their way meanwhile.
        steps = _steps(place, gl.minimum(first + SLOTS, end - SLOTS), WIDE)
        mbarrier.wait(shared.full.index(stage), (number // STAGES) & 1)
        scores = _scores(shared, stage, step, size, INT8, WIDE) * place.scale_log2
        numbers = gl.minimum(first, end - SLOTS) + gl.arange(0, SLOTS, gl.SliceLayout(1, MADE))
        scores = gl.where(numbers[:, None] >= first, scores, float("-inf"))
        stepped = scores + gl.log2(gl.maximum(step, 1e-30))
        largest = gl.maximum(m, gl.max(stepped, 0))
        shrink = gl.exp2(m - largest)
        parts = parts * shrink[None, :] + gl.exp2(scores - largest[None, :])
        m = largest
        p.store(gl.exp2(stepped - largest[None, :]).to(shared.p.dtype))
        fence_async_shared()
        even_0, odd_0 = _weighted(shared, stage, p, even_0, odd_0, shrink, 0, INT8, WIDE)
        even_1, odd_1 = _weighted(shared, stage, p, even_1, odd_1, shrink, PART, INT8, WIDE)
        even_2, odd_2 = _weighted(shared, stage, p, even_2, odd_2, shrink, 2 * PART, INT8, WIDE)
        even_3, odd_3 = _weighted(shared, stage, p, even_3, odd_3, shrink, 3 * PART, INT8, WIDE)
        even_0, even_1, even_2, even_3, odd_0, odd_1, odd_2, odd_3 = warpgroup_mma_wait(
            0, deps=[even_0, even_1, even_2, even_3, odd_0, odd_1, odd_2, odd_3]
        )
        mbarrier.arrive(shared.empty.index(stage), count=1)

    total = gl.sum(parts, 0)
    if GROUPS == 2:
        # The second group leaves its sums in the last stage, which only it has read.
        last = (GROUPS * (place.per_range // SLOTS) - 1) % STAGES
        other = shared.c.index(last)._reinterpret(gl.float32, [8, PART, HEADS], SUMS)
        if GROUP == 1:
            some = start < end
            shared.state.index(0).store(gl.where(some, m, float("-inf")))
            shared.state.index(1).store(gl.where(some, total, 0.0))
            _keep(other, even_0, some, 0)
            _keep(other, odd_0, some, 1)
            _keep(other, even_1, some, 2)
            _keep(other, odd_1, some, 3)
            _keep(other, even_2, some, 4)
            _keep(other, odd_2, some, 5)
            _keep(other, even_3, some, 6)
            _keep(other, odd_3, some, 7)
            mbarrier.arrive(shared.done, count=1)
        else:
            mbarrier.wait(shared.done, 0)
            its = shared.state.index(0).load(gl.SliceLayout(0, MADE))
            largest = gl.maximum(m, its)
            own = gl.exp2(m - largest)
            its = gl.exp2(its - largest)
            m = largest
            total = total * own + shared.state.index(1).load(gl.SliceLayout(0, MADE)) * its
            own = own[None, :]
            its = its[None, :]
            even_0 = _with(other, even_0, own, its, 0)
            odd_0 = _with(other, odd_0, own, its, 1)
            even_1 = _with(other, even_1, own, its, 2)
            odd_1 = _with(other, odd_1, own, its, 3)
            even_2 = _with(other, even_2, own, its, 4)
            odd_2 = _with(other, odd_2, own, its, 5)
            even_3 = _with(other, even_3, own, its, 6)
            odd_3 = _with(other, odd_3, own, its, 7)
    if GROUP == 0:
        heads = place.head + gl.arange(0, HEADS, gl.SliceLayout(0, MADE))
        places = place.row.to(gl.int64) * place.heads + heads
        filled = place.heads
        if not ONE:
            places = places * place.splits + place.split
            # A range beyond the row's length leaves -inf and no sums: the joining kernel passes over it.
            filled = gl.where(start < end, place.heads, 0)
            gl.store(place.lse + places, gl.where(start < end, m + gl.log2(total), float("-inf")), mask=heads < place.heads)
        share = (1.0 / total)[None, :]
        _store(place, places, even_0 * share, 0, 0, WIDE, filled, heads)
        _store(place, places, odd_0 * share, 0, 1, WIDE, filled, heads)
        _store(place, places, even_1 * share, PART, 0, WIDE, filled, heads)
        _store(place, places, odd_1 * share, PART, 1, WIDE, filled, heads)
        _store(place, places, even_2 * share, 2 * PART, 0, WIDE, filled, heads)
        _store(place, places, odd_2 * share, 2 * PART, 1, WIDE, filled, heads)
        _store(place, places, even_3 * share, 3 * PART, 0, WIDE, filled, heads)
        _store(place, places, odd_3 * share, 3 * PART, 1, WIDE, filled, heads)


@gluon.jit
def _load_queries(source, head, heads, stride, WIDTH: gl.constexpr, PLANE: gl.constexpr):
    """A block of heads: so many columns that follow each other, or two of every four; zeros for heads that are none."""
    rows = head + gl.arange(0, HEADS, gl.SliceLayout(1, QUERIES))
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, QUERIES))
    if PLANE:
        columns = 2 * columns - columns % 2
    return gl.load(source + rows[:, None] * stride + columns[None, :], mask=rows[:, None] < heads, other=0.0)


@gluon.jit
def _power_below(largest):
    """The power of two of each head's largest number."""
    return gl.exp2(gl.floor(gl.log2(gl.maximum(largest, 1e-30))))


# A stride of 1 would become a constant, which the groups cannot be given as a number.
@gluon.jit(do_not_specialize=["slots", "heads", "splits", "latent_scale_stride_s"])
def attend_kernel(
    q_latent,
    q_rope,
    latent,
    latent_scale,
    k_rope,
    lengths,
    out,
    lse,
    scale_log2,
    slots,
    heads,
    splits,
    q_latent_stride_b,
    q_latent_stride_h,
    q_rope_stride_b,
    q_rope_stride_h,
    latent_scale_stride_b,
    latent_scale_stride_s,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    INT8: gl.constexpr,
    WIDE: gl.constexpr,
    ONE: gl.constexpr,
):
    head = gl.program_id(0) * HEADS
    split = gl.program_id(1)
    row = gl.program_id(2)
    wide_row = row.to(gl.int64)
    length = gl.minimum(gl.load(lengths + row).to(gl.int32), slots)
    per_range = gl.cdiv(gl.cdiv(length, splits * GROUPS), SLOTS) * SLOTS
    start = split * GROUPS * per_range
    scales = latent_scale + wide_row * latent_scale_stride_b
    place = Place(
        row, head, heads, split, splits, start, per_range, length, scales, latent_scale_stride_s, out, lse, scale_log2
    )

    dtype: gl.constexpr = k_rope.dtype
    wide: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    number: gl.constexpr = dtype if WIDE else gl.float16
    if INT8:
        q = gl.allocate_shared_memory(gl.int8, [2, HEADS, 2 * PAIRS], BYTES)
    else:
        q = gl.allocate_shared_memory(number, [2, HEADS, PAIRS], wide)
    shared = Memory(
        q,
        gl.allocate_shared_memory(gl.float32, [HEADS], PLAIN),
        gl.allocate_shared_memory(dtype, [HEADS, ROTATED], wide),
        gl.allocate_shared_memory(latent.dtype, [(2 if WIDE else 1) * STAGES, SLOTS, PAIRS], wide),
        gl.allocate_shared_memory(dtype, [STAGES, SLOTS, ROTATED], wide),
        gl.allocate_shared_memory(number, [GROUPS, HEADS, SLOTS], wide),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.float32, [2, HEADS], PLAIN),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
    )
    mbarrier.init(shared.done, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(shared.full.index(i), count=1)
        mbarrier.init(shared.empty.index(i), count=1)
    fence_async_shared()
    # Before the queries are read, which takes as long as the first copies.
    for number in gl.static_range(STAGES):
        if number < GROUPS * (per_range // SLOTS):
            _fetch(latent, k_rope, shared, place, number, GROUPS, STAGES, WIDE)

    q_latent += wide_row * q_latent_stride_b
    if WIDE:
        shared.q.index(0).store(_load_queries(q_latent, head, heads, q_latent_stride_h, PAIRS, False))
        shared.q.index(1).store(_load_queries(q_latent + PAIRS, head, heads, q_latent_stride_h, PAIRS, False))
    elif INT8:
        found = _load_queries(q_latent, head, heads, q_latent_stride_h, 2 * PAIRS, False).to(gl.float32)
        size = _power_below(gl.max(gl.abs(found), 1))
        shared.sizes.store(size)
        # 15 bits of each number, the largest below 2^14: q = size / 8,192 (128 high + low). 2^14 more is positive, so that
        # one conversion rounds: each runs at an eighth of the rate of an addition, and there are 8,192 numbers.
        whole = (found * (8192.0 / size)[:, None] + 16384.5).to(gl.int32)
        shared.q.index(0).store(((whole >> 7) - 128).to(gl.int8))
        shared.q.index(1).store((whole & 127).to(gl.int8))
    else:
        left = _load_queries(q_latent, head, heads, q_latent_stride_h, PAIRS, True).to(gl.float32)
        right = _load_queries(q_latent + 2, head, heads, q_latent_stride_h, PAIRS, True).to(gl.float32)
        size = _power_below(gl.maximum(gl.max(gl.abs(left), 1), gl.max(gl.abs(right), 1)))
        shared.sizes.store(size)
        shared.q.index(0).store((left * (1.0 / size)[:, None]).to(gl.float16))
        shared.q.index(1).store((right * (1.0 / size)[:, None]).to(gl.float16))
    shared.q_rotated.store(_load_queries(q_rope + wide_row * q_rope_stride_b, head, heads, q_rope_stride_h, ROTATED, False))
    fence_async_shared()

    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_bring, (latent, k_rope, shared, place, GROUPS, STAGES, WIDE)),
                (_attend, (shared, place, 0, GROUPS, STAGES, INT8, WIDE, ONE)),
            ],
            WIDE_WARPS,
            WIDE_REGISTERS,
        )
    else:
        gl.warp_specialize(
            [
                (_bring, (latent, k_rope, shared, place, GROUPS, STAGES, WIDE)),
                (_attend, (shared, place, 0, GROUPS, STAGES, INT8, WIDE, ONE)),
                (_attend, (shared, place, 1, GROUPS, STAGES, INT8, WIDE, ONE)),
            ],
            WORKER_WARPS,
            WORKER_REGISTERS,
        )


def program(
    q_latent_BHL: Tensor,
    q_rope_BHP: Tensor,
    latent_BSL: Tensor,
    k_rope_BSP: Tensor,
    lengths_B: Tensor,
    latent_scale_BS: Tensor | None,
    partial_BHNL: Tensor,
    lse_BHN: Tensor,
    *,
    scale: float,
    splits: int,
    describe: Callable[[Tensor, list[int]], Any],
) -> tuple[tuple[int, int, int], tuple[Any, ...], dict[str, int | bool]]:
    """(grid, arguments of `attend_kernel`, its constants). describe: makes a descriptor of a tensor and a block."""
    B, H, _ = q_latent_BHL.shape
    copied = latent_BSL.view(torch.int16) if latent_BSL.dtype in EIGHT_BITS else latent_BSL
    # Latents of 16 bits have no scales; the kernel needs a pointer all the same.
    scales = q_latent_BHL if latent_scale_BS is None else latent_scale_BS
    arguments = (
        q_latent_BHL,
        q_rope_BHP,
        describe(copied, [1, SLOTS.value, PAIRS.value]),
        scales,
        describe(k_rope_BSP, [1, SLOTS.value, ROTATED.value]),
        lengths_B,
        partial_BHNL,
        lse_BHN,
        scale * math.log2(math.e),
        latent_BSL.shape[1],
        H,
        splits,
        *(stride for x in (q_latent_BHL, q_rope_BHP, scales) for stride in x.stride()[:2]),
    )
    return (triton.cdiv(H, HEADS.value), splits, B), arguments, attend_constants(latent_BSL.dtype, one=splits == 1)


def attend_constants(dtype: torch.dtype, *, one: bool) -> dict[str, int | bool]:
    """What `attend_kernel` is compiled for. one: a program has a row for itself."""
    wide = dtype not in EIGHT_BITS
    tile = WIDE_TILE if wide else TILE
    groups = tile.slots // SLOTS.value
    return {"GROUPS": groups, "STAGES": tile.stages, "INT8": dtype == torch.int8, "WIDE": wide, "ONE": one}
