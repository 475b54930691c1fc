"""The decode kernel of latent attention for Hopper and many heads, in Gluon: two warpgroups that share one output.

64 heads times 512 columns of sums fill half of a multiprocessor's registers, so two warpgroups own 256 columns each, and
there is no second output to work on while a softmax is computed. So they take turns, as FlashMLA's do ("seesaw", DeepSeek,
docs/20250422-new-kernel-deep-dive.md in deepseek-ai/FlashMLA): of two blocks of 64 slots each warpgroup makes the scores and
the weights of one, and multiplies both blocks' weights with its half of the columns. With m the largest score so far:

    left:   m_0 = max(m, s_0)      p_0 = exp(s_0 - m_0)    left  = left e^(m - m_0) + p_0 c_0       (its own registers)
    right:  m_1 = max(m_0, s_1)    p_1 = exp(s_1 - m_1)    right = right e^(m - m_1) + p_1 c_1      (its own registers)
    left:   p_0 <- p_0 e^(m_0 - m_1), for right            left  = left e^(m_0 - m_1) + p_1 c_1     (p_1 from shared memory)
    right:                                                 right = right + p_0 c_0                  (p_0 from shared memory)

A third group has the copy engine bring the blocks, in halves of 256 columns that are free at different times, and in pieces
of 64, whose scores begin when they have come. A block that would pass its range's end begins earlier, and what the block
before has covered counts as -inf: nothing beyond a row's length is read, and before its first slot the copy engine writes
zeros.

Letters: B batch, S slots, H query heads, L kv_lora_rank, P rotated width. In the kernel: c latents, k rotated keys, q queries.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's compiler gives the parameters of its kernels their types at each launch.

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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

from modeling.kernels.latent_decode_triton import Tile

HEADS, SLOTS, COLUMNS, ROTATED = gl.constexpr(64), gl.constexpr(64), gl.constexpr(256), gl.constexpr(64)
PIECE, PIECES = gl.constexpr(64), gl.constexpr(4)  # of a half: columns that one copy brings
# Of one program, for the choice of splits: it takes a multiprocessor for itself, and two blocks at a time.
TILE = Tile(heads=64, slots=128, warps=4, stages=1, registers=168, resident=1, start=385)
# Of the two groups that multiply; what is left of three times TILE's registers, 24, is for the one that copies.
WORKER_WARPS, WORKER_REGISTERS = gl.constexpr([4, 4]), gl.constexpr([240, 240])
SCORES = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
OUTPUT = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16]))


class ManyHeadsMemory(NamedTuple):
    """What a program has in shared memory, and the barriers that say when it may be read (`full`, `ready`) or written."""

    q: Any  # (2, 64, 256): the halves of the columns
    q_rotated: Any  # (64, 64)
    c: Any  # (4, 64, 256): the halves of the first block, and of the second
    k: Any  # (2, 64, 64), and in their place, once multiplied, the block's weights
    largest: Any  # (2, 64)
    q_full: Any
    full: Any
    empty: Any
    largest_ready: Any
    weights_ready: Any


class ManyHeadsPlace(NamedTuple):
    """Which part of the problem a program computes."""

    row: Any
    head: Any
    heads: Any
    split: Any
    splits: Any
    start: Any
    end: Any
    pairs: Any


@gluon.jit
def _fetch(source, place, full, target):
    """Begin the copy of a block to `target`; `full` counts its bytes."""
    box = target._reinterpret(source.dtype, source.block_type.shape, source.layout)
    tma.async_copy_global_to_shared(source, place, full, box)


@gluon.jit
def _fetch_half(latent, k_rope, shared, row, slot, pair, BLOCK: gl.constexpr, HALF: gl.constexpr):
    part: gl.constexpr = 2 * BLOCK + HALF
    mbarrier.wait(shared.empty.index(part), (pair & 1) ^ 1)
    for i in gl.static_range(PIECES):
        full = shared.full.index(PIECES * part + i)
        if BLOCK == HALF or i < PIECES - 1:
            mbarrier.expect(full, 2 * SLOTS * PIECE)
        else:  # with the half that the other group multiplies last: then this block's weights, in the same place, are read too
            mbarrier.expect(full, 2 * SLOTS * (PIECE + ROTATED))
            _fetch(k_rope, [row, slot, 0], full, shared.k.index(BLOCK))
        _fetch(latent, [row, slot, HALF * COLUMNS + PIECE * i], full, shared.c.index(part).slice(PIECE * i, PIECE, 1))


@gluon.jit
def _bring(q_latent, q_rope, latent, k_rope, shared, place):
    """The copying group: in the order in which halves become free."""
    mbarrier.expect(shared.q_full, 2 * HEADS * (2 * COLUMNS + ROTATED))
    _fetch(q_latent, [place.row, place.head, 0], shared.q_full, shared.q.index(0))
    _fetch(q_latent, [place.row, place.head, COLUMNS], shared.q_full, shared.q.index(1))
    _fetch(q_rope, [place.row, place.head, 0], shared.q_full, shared.q_rotated)
    for pair in range(place.pairs):
        first = gl.minimum(place.start + 2 * SLOTS * pair, place.end - SLOTS)
        second = gl.minimum(place.start + 2 * SLOTS * pair + SLOTS, place.end - SLOTS)
        _fetch_half(latent, k_rope, shared, place.row, first, pair, 0, 0)
        _fetch_half(latent, k_rope, shared, place.row, second, pair, 1, 1)
        _fetch_half(latent, k_rope, shared, place.row, first, pair, 0, 1)
        _fetch_half(latent, k_rope, shared, place.row, second, pair, 1, 0)


@gluon.jit
def _seen(scores, slot, first):
    """Scores of a block; those that the block before has covered are -inf."""
    numbers = slot + gl.arange(0, SLOTS, gl.SliceLayout(0, SCORES))
    return gl.where(numbers[None, :] >= first, scores, float("-inf"))


@gluon.jit
def _times(sums, factors):
    """Each head's sums times its factor."""
    return sums * gl.convert_layout(factors, gl.SliceLayout(1, OUTPUT))[:, None]


@gluon.jit
def _as_operand(weights, dtype: gl.constexpr):
    return gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, OUTPUT, 2))


@gluon.jit
def _scores_of_half(shared, phase, scores, BLOCK: gl.constexpr, HALF: gl.constexpr):
    """Scores of a block with a half of the columns more, piece by piece as they come; they begin with its own group's."""
    part: gl.constexpr = 2 * BLOCK + HALF
    for i in gl.static_range(PIECES):
        mbarrier.wait(shared.full.index(PIECES * part + i), phase)
        q = shared.q.index(HALF).slice(PIECE * i, PIECE, 1)
        c = shared.c.index(part).slice(PIECE * i, PIECE, 1).permute((1, 0))
        scores = warpgroup_mma(q, c, scores, use_acc=BLOCK != HALF or i > 0, is_async=True)
    return scores


@gluon.jit
def _left_pair(shared, place, scale_log2, pair, sums, total, m):
    """Scores of the first block of a pair, and both blocks times columns 0 to 255: (sums, total, m)."""
    dtype: gl.constexpr = shared.q.dtype
    phase = pair & 1
    first = place.start + 2 * SLOTS * pair
    scores = gl.zeros([HEADS, SLOTS], gl.float32, SCORES)
    scores = _scores_of_half(shared, phase, scores, 0, 0)
    scores = _scores_of_half(shared, phase, scores, 0, 1)
    scores = warpgroup_mma(shared.q_rotated, shared.k.index(0).permute((1, 0)), scores, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    scores = _seen(scores, gl.minimum(first, place.end - SLOTS), first)
    m_0 = gl.maximum(m, gl.max(scores, 1) * scale_log2)
    shared.largest.index(0).store(m_0)
    mbarrier.arrive(shared.largest_ready.index(0), count=1)
    shrink = gl.exp2(m - m_0)
    p = gl.exp2(scores * scale_log2 - m_0[:, None])
    total = total * shrink + gl.sum(p, 1)
    operand = _as_operand(p, dtype)
    sums = warpgroup_mma(operand, shared.c.index(0), _times(sums, shrink), is_async=True)
    mbarrier.wait(shared.largest_ready.index(1), phase)
    m_1 = shared.largest.index(1).load(gl.SliceLayout(1, SCORES))
    shrink = gl.exp2(m_0 - m_1)
    shared.k.index(0).store((p * shrink[:, None]).to(dtype))
    fence_async_shared()
    mbarrier.arrive(shared.weights_ready.index(0), count=1)
    sums = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(shared.empty.index(0), count=1)
    sums = _times(sums, shrink)
    mbarrier.wait(shared.weights_ready.index(1), phase)
    sums = warpgroup_mma(shared.k.index(1), shared.c.index(2), sums, is_async=True)
    sums = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(shared.empty.index(2), count=1)
    return sums, total * shrink, m_1


@gluon.jit
def _right_pair(shared, place, scale_log2, pair, sums, total, m):
    """Scores of the second block of a pair, and both blocks times columns 256 to 511: (sums, total, m)."""
    dtype: gl.constexpr = shared.q.dtype
    phase = pair & 1
    first = place.start + 2 * SLOTS * pair + SLOTS
    scores = gl.zeros([HEADS, SLOTS], gl.float32, SCORES)
    scores = _scores_of_half(shared, phase, scores, 1, 1)
    scores = _scores_of_half(shared, phase, scores, 1, 0)
    scores = warpgroup_mma(shared.q_rotated, shared.k.index(1).permute((1, 0)), scores, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    scores = _seen(scores, gl.minimum(first, place.end - SLOTS), first)
    own = gl.max(scores, 1) * scale_log2
    mbarrier.wait(shared.largest_ready.index(0), phase)
    m_1 = gl.maximum(shared.largest.index(0).load(gl.SliceLayout(1, SCORES)), own)
    shared.largest.index(1).store(m_1)
    mbarrier.arrive(shared.largest_ready.index(1), count=1)
    shrink = gl.exp2(m - m_1)
    p = gl.exp2(scores * scale_log2 - m_1[:, None])
    total = total * shrink + gl.sum(p, 1)
    shared.k.index(1).store(p.to(dtype))
    fence_async_shared()
    mbarrier.arrive(shared.weights_ready.index(1), count=1)
    operand = _as_operand(p, dtype)
    sums = warpgroup_mma(operand, shared.c.index(3), _times(sums, shrink), is_async=True)
    mbarrier.wait(shared.weights_ready.index(0), phase)
    sums = warpgroup_mma(shared.k.index(0), shared.c.index(1), sums, is_async=True)
    sums = warpgroup_mma_wait(1, deps=[sums])
    mbarrier.arrive(shared.empty.index(3), count=1)
    sums = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(shared.empty.index(1), count=1)
    return sums, total, m_1


@gluon.jit
def _finish(shared, place, out, lse, sums, total, m, HALF: gl.constexpr, ONE_SPLIT: gl.constexpr):
    """Join both groups' sums of weights, and write this one's columns."""
    shared.largest.index(HALF).store(total)
    mbarrier.arrive(shared.largest_ready.index(HALF), count=1)
    mbarrier.wait(shared.largest_ready.index(1 - HALF), place.pairs & 1)
    total += shared.largest.index(1 - HALF).load(gl.SliceLayout(1, SCORES))
    rows = place.head + gl.arange(0, HEADS, gl.SliceLayout(1, OUTPUT))
    columns = HALF * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, OUTPUT))
    places = place.row.to(gl.int64) * place.heads + rows
    filled = place.heads
    if not ONE_SPLIT:
        places = places * place.splits + place.split
        # A range beyond the row's length leaves -inf and no sums: the joining kernel passes over it.
        filled = gl.where(place.start < place.end, place.heads, 0)
        if HALF == 0:
            found = gl.where(place.start < place.end, m + gl.log2(total), float("-inf"))
            gl.store(lse + places, gl.convert_layout(found, gl.SliceLayout(1, OUTPUT)), mask=rows < place.heads)
    sums = _times(sums, 1.0 / total)
    at = out + places[:, None] * (2 * COLUMNS) + columns[None, :]
    gl.store(at, sums.to(out.dtype.element_ty), mask=rows[:, None] < filled)


@gluon.jit
def _multiply(shared, place, out, lse, scale_log2, HALF: gl.constexpr, ONE_SPLIT: gl.constexpr):
    """The group of one half of the columns."""
    sums = gl.zeros([HEADS, COLUMNS], gl.float32, OUTPUT)
    total = gl.zeros([HEADS], gl.float32, gl.SliceLayout(1, SCORES))
    m = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    mbarrier.wait(shared.q_full, 0)
    work: gl.constexpr = _left_pair if HALF == 0 else _right_pair
    for pair in range(place.pairs):
        sums, total, m = work(shared, place, scale_log2, pair, sums, total, m)
    _finish(shared, place, out, lse, sums, total, m, HALF, ONE_SPLIT)


@gluon.jit(do_not_specialize=["slots", "heads", "splits"])
def attend_kernel(
    q_latent, q_rope, latent, k_rope, lengths, out, lse, scale_log2, slots, heads, splits, ONE_SPLIT: gl.constexpr
):
    # Head blocks that read the same slots run side by side and share them in L2.
    head = gl.program_id(0) * HEADS
    split = gl.program_id(1)
    row = gl.program_id(2)
    length = gl.minimum(gl.load(lengths + row).to(gl.int32), slots)
    per_split = gl.cdiv(gl.cdiv(length, splits), 2 * SLOTS) * (2 * SLOTS)
    start = split * per_split
    end = gl.minimum(start + per_split, length)
    pairs = gl.maximum(gl.cdiv(end - start, 2 * SLOTS), 1)  # an empty range takes one too, and keeps nothing of it

    dtype: gl.constexpr = latent.dtype
    wide: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    shared = ManyHeadsMemory(
        gl.allocate_shared_memory(dtype, [2, HEADS, COLUMNS], wide),
        gl.allocate_shared_memory(dtype, [HEADS, ROTATED], wide),
        gl.allocate_shared_memory(dtype, [4, SLOTS, COLUMNS], wide),
        gl.allocate_shared_memory(dtype, [2, SLOTS, ROTATED], wide),
        gl.allocate_shared_memory(gl.float32, [2, HEADS], plain),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [4 * PIECES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
    )
    mbarrier.init(shared.q_full, count=1)
    for i in gl.static_range(4 * PIECES):
        mbarrier.init(shared.full.index(i), count=1)
    for i in gl.static_range(4):
        mbarrier.init(shared.empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(shared.largest_ready.index(i), count=1)
        mbarrier.init(shared.weights_ready.index(i), count=1)
    fence_async_shared()

    place = ManyHeadsPlace(row, head, heads, split, splits, start, end, pairs)
    gl.warp_specialize(
        [
            (_bring, (q_latent, q_rope, latent, k_rope, shared, place)),
            (_multiply, (shared, place, out, lse, scale_log2, 0, ONE_SPLIT)),
            (_multiply, (shared, place, out, lse, scale_log2, 1, ONE_SPLIT)),
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
    latent_scale_BS: None,
    partial_BHNL: Tensor,
    lse_BHN: Tensor,
    *,
    scale: float,
    splits: int,
    describe: Callable[[Tensor, list[int]], Any],
) -> tuple[tuple[int, int, int], tuple[Any, ...], dict[str, int | bool]]:
    """(grid, arguments of `attend_kernel`, its constants). describe: makes a descriptor of a tensor and a block."""
    B, H, _ = q_latent_BHL.shape
    arguments = (
        describe(q_latent_BHL, [1, HEADS.value, COLUMNS.value]),
        describe(q_rope_BHP, [1, HEADS.value, ROTATED.value]),
        describe(latent_BSL, [1, SLOTS.value, PIECE.value]),
        describe(k_rope_BSP, [1, SLOTS.value, ROTATED.value]),
        lengths_B,
        partial_BHNL,
        lse_BHN,
        scale * math.log2(math.e),
        latent_BSL.shape[1],
        H,
        splits,
    )
    return (triton.cdiv(H, TILE.heads), splits, B), arguments, {"ONE_SPLIT": splits == 1}
