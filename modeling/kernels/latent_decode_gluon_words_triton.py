"""Gluon's decode kernel for Hopper, few heads and latents of 8 bits (int8, fp8 e4m3): slots by heads, widened in registers.

With 16 heads a step waits for memory, so half the bytes should be half the time; but Hopper's matrix instruction takes 64 rows
at least, and only its first operand from registers. So here slots, then columns, are the rows and heads the 16 columns:

    scores (64 slots x 16 heads)           =  c q^T        c from registers, q from shared memory
    sums   (512 columns x 16 heads)       +=  c^T p        c^T from registers, p from shared memory

and what the copy engine brought in 8 bits is widened on its way into registers, twice, and never written back. A slot's two
neighbouring columns are read as one number of 16 bits: even and odd columns are two planes that are multiplied apart, as
queries are kept apart. They are widened to float16, in less than half the instructions that bfloat16 takes. So that nothing
overflows there, queries are divided by a power of two that is about their head's largest, and with t_s the scale that all
elements of slot s share, the running maximum is not that of the scores but m = max over s of (score_s + log2 t_s):

    weights_s = 2^(score_s + log2 t_s - m) <= 1,    out = sum of weights_s c_s / sum of 2^(score_s - m)

Two groups of four warps each walk a range of their own, and a third brings blocks of 64 slots for them in turns. Groups
share nothing but the queries: to `join_kernel` of latent_decode_triton.py each is a range as any other. A block that would pass
its range's end begins earlier, and what the block before has covered counts as -inf.

Letters: B batch, S slots, H query heads, L kv_lora_rank, P rotated width. In the kernel: c latents, k rotated keys, q queries.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's compiler gives the parameters of its kernels their types at each launch.

from __future__ import annotations

import contextlib
import functools
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

from modeling.kernels.latent_decode_parts_gluon_triton import check_copied, descriptor
from modeling.kernels.latent_decode_triton import MAX_SPLITS, Tile, choose_splits, join, partial_sums, rounded_slots, size_of

HEADS, SLOTS, PAIRS, ROTATED = gl.constexpr(16), gl.constexpr(64), gl.constexpr(256), gl.constexpr(64)
PART = gl.constexpr(64)  # pairs of columns that are widened at a time
GROUPS, STAGES = gl.constexpr(2), gl.constexpr(5)
# Of one program, for the choice of splits: all groups together.
TILE = Tile(heads=16, slots=2 * 64, warps=4, stages=5, registers=168, resident=1, start=640)
# Of the groups that multiply; what is left of three times TILE's registers, 24, is for the one that copies.
WORKER_WARPS, WORKER_REGISTERS = gl.constexpr([4, 4]), gl.constexpr([240, 240])
MADE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 16, 16]))
QUERIES = gl.constexpr(gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0]))
WIDENED = gl.constexpr(gl.DotOperandLayout(0, MADE, 2))


class Memory(NamedTuple):
    """What a program has in shared memory, and the barriers that say when a stage may be read (`full`) or written (`empty`)."""

    q: Any  # (2, 16, 256): even columns and odd ones, divided by `sizes`
    sizes: Any  # (16)
    q_rotated: Any  # (16, 64)
    c: Any  # (5, 64, 256) pairs of columns
    k: Any  # (5, 64, 64)
    p: Any  # (2, 16, 64): each group's weights
    full: Any
    empty: Any


class Place(NamedTuple):
    """Which part of the problem a program computes."""

    row: Any
    head: Any
    heads: Any
    first_range: Any  # its first group's
    ranges: Any
    per_range: Any
    length: Any


@gluon.jit
def _range(place, GROUP: gl.constexpr):
    """(first slot, slot behind the last) of a group; the first is no less where nothing is left."""
    start = (place.first_range + GROUP) * place.per_range
    return start, gl.minimum(start + place.per_range, place.length)


@gluon.jit
def _bring(latent, k_rope, shared, place):
    """The copying group: a block for each of the others in turns."""
    for block in range(place.per_range // SLOTS):
        for group in gl.static_range(GROUPS):
            number = GROUPS * block + group
            stage = number % STAGES
            start, end = _range(place, group)
            slot = gl.minimum(start + SLOTS * block, end - SLOTS)
            mbarrier.wait(shared.empty.index(stage), ((number // STAGES) & 1) ^ 1)
            mbarrier.expect(shared.full.index(stage), 2 * SLOTS * (PAIRS + ROTATED))
            c = shared.c.index(stage)._reinterpret(latent.dtype, latent.block_type.shape, latent.layout)
            k = shared.k.index(stage)._reinterpret(k_rope.dtype, k_rope.block_type.shape, k_rope.layout)
            tma.async_copy_global_to_shared(latent, [place.row, slot, 0], shared.full.index(stage), c)
            tma.async_copy_global_to_shared(k_rope, [place.row, slot, 0], shared.full.index(stage), k)


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
            .reg .b16 first, second;
            .reg .b32 low, high;
            mov.b32 {first, second}, $2;
            cvt.rn.f16x2.e4m3x2 low, first;
            cvt.rn.f16x2.e4m3x2 high, second;
            prmt.b32 $0, low, high, 0x5410;
            prmt.b32 $1, low, high, 0x7632;
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
def _scores(c, shared, scores, FIRST: gl.constexpr, INT8: gl.constexpr):
    """Scores of a block with a part of the columns more."""
    even, odd = _planes(c.slice(FIRST, PART, 1).load(WIDENED), INT8)
    q_even = shared.q.index(0).slice(FIRST, PART, 1).permute((1, 0))
    q_odd = shared.q.index(1).slice(FIRST, PART, 1).permute((1, 0))
    scores = warpgroup_mma(even, q_even, scores, use_acc=FIRST > 0, is_async=True)
    scores = warpgroup_mma(odd, q_odd, scores, is_async=True)
    # Until its product is done an operand keeps its registers: more of them at once than this, and ptxas lets no two
    # products overlap.
    return warpgroup_mma_wait(1, deps=[scores])


@gluon.jit
def _weighted(c, p, even_sums, odd_sums, shrink, FIRST: gl.constexpr, INT8: gl.constexpr):
    """A part of the columns: its sums with those of a block more."""
    even, odd = _planes(c.slice(FIRST, PART, 1).permute((1, 0)).load(WIDENED), INT8)
    even_sums = warpgroup_mma(even, p, even_sums * shrink[None, :], is_async=True)
    odd_sums = warpgroup_mma(odd, p, odd_sums * shrink[None, :], is_async=True)
    return warpgroup_mma_wait(1, deps=[even_sums, odd_sums])


@gluon.jit
def _steps(scales, slot, stride):
    """The scales of a block of slots; before a row's first slot nothing is read."""
    numbers = slot + gl.arange(0, SLOTS, gl.SliceLayout(1, MADE))
    return gl.load(scales + numbers * stride, mask=numbers >= 0, other=0.0).to(gl.float32)


@gluon.jit
def _store(out, places, sums, FIRST: gl.constexpr, filled, heads):
    columns = FIRST + 2 * gl.arange(0, PART, gl.SliceLayout(1, MADE))
    gl.store(out + places[None, :] * (2 * PAIRS) + columns[:, None], sums, mask=heads[None, :] < filled)


@gluon.jit
def _attend(shared, place, scales, stride, out, lse, scale_log2, GROUP: gl.constexpr, INT8: gl.constexpr):
    """One group's range."""
    start, end = _range(place, GROUP)
    even_0 = gl.zeros([PART, HEADS], gl.float32, MADE)
    even_1, even_2, even_3, odd_0, odd_1, odd_2, odd_3 = even_0, even_0, even_0, even_0, even_0, even_0, even_0
    size = shared.sizes.load(gl.SliceLayout(0, MADE))[None, :]
    total = gl.zeros([HEADS], gl.float32, gl.SliceLayout(0, MADE))
    m = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(0, MADE))
    p = shared.p.index(GROUP).permute((1, 0))
    steps = _steps(scales, gl.minimum(start, end - SLOTS), stride)
    for block in range(place.per_range // SLOTS):
        number = GROUPS * block + GROUP
        stage = number % STAGES
        first = start + SLOTS * block
        step = steps[:, None]
        steps = _steps(scales, gl.minimum(first + SLOTS, end - SLOTS), stride)  # of the next block, on their way meanwhile
        mbarrier.wait(shared.full.index(stage), (number // STAGES) & 1)
        c = shared.c.index(stage)
        empty = gl.zeros([SLOTS, HEADS], gl.float32, MADE)
        rotated = warpgroup_mma(shared.k.index(stage), shared.q_rotated.permute((1, 0)), empty, use_acc=False, is_async=True)
        scores = _scores(c, shared, empty, 0, INT8)
        scores = _scores(c, shared, scores, PART, INT8)
        scores = _scores(c, shared, scores, 2 * PART, INT8)
        scores = _scores(c, shared, scores, 3 * PART, INT8)
        scores, rotated = warpgroup_mma_wait(0, deps=[scores, rotated])
        scores = (scores * step * size + rotated) * scale_log2
        numbers = gl.minimum(first, end - SLOTS) + gl.arange(0, SLOTS, gl.SliceLayout(1, MADE))
        scores = gl.where(numbers[:, None] >= first, scores, float("-inf"))
        stepped = scores + gl.log2(gl.maximum(step, 1e-30))
        largest = gl.maximum(m, gl.max(stepped, 0))
        shrink = gl.exp2(m - largest)
        total = total * shrink + gl.sum(gl.exp2(scores - largest[None, :]), 0)
        m = largest
        p.store(gl.exp2(stepped - largest[None, :]).to(gl.float16))
        fence_async_shared()
        even_0, odd_0 = _weighted(c, p, even_0, odd_0, shrink, 0, INT8)
        even_1, odd_1 = _weighted(c, p, even_1, odd_1, shrink, PART, INT8)
        even_2, odd_2 = _weighted(c, p, even_2, odd_2, shrink, 2 * PART, INT8)
        even_3, odd_3 = _weighted(c, p, even_3, odd_3, shrink, 3 * PART, INT8)
        even_0, even_1, even_2, even_3, odd_0, odd_1, odd_2, odd_3 = warpgroup_mma_wait(
            0, deps=[even_0, even_1, even_2, even_3, odd_0, odd_1, odd_2, odd_3]
        )
        mbarrier.arrive(shared.empty.index(stage), count=1)

    heads = place.head + gl.arange(0, HEADS, gl.SliceLayout(0, MADE))
    places = (place.row.to(gl.int64) * place.heads + heads) * place.ranges + place.first_range + GROUP
    # A range beyond the row's length leaves -inf and no sums: the joining kernel passes over it.
    filled = gl.where(start < end, place.heads, 0)
    gl.store(lse + places, gl.where(start < end, m + gl.log2(total), float("-inf")), mask=heads < place.heads)
    share = (1.0 / total)[None, :]
    _store(out, places, even_0 * share, 0, filled, heads)
    _store(out, places, odd_0 * share, 1, filled, heads)
    _store(out, places, even_1 * share, 2 * PART, filled, heads)
    _store(out, places, odd_1 * share, 2 * PART + 1, filled, heads)
    _store(out, places, even_2 * share, 4 * PART, filled, heads)
    _store(out, places, odd_2 * share, 4 * PART + 1, filled, heads)
    _store(out, places, even_3 * share, 6 * PART, filled, heads)
    _store(out, places, odd_3 * share, 6 * PART + 1, filled, heads)


@gluon.jit
def _load_queries(source, head, heads, stride, step, WIDTH: gl.constexpr):
    """A block of heads: columns 0, step, 2 step and so on; zeros for heads that are none."""
    rows = head + gl.arange(0, HEADS, gl.SliceLayout(1, QUERIES))
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, QUERIES))
    return gl.load(source + rows[:, None] * stride + columns[None, :] * step, mask=rows[:, None] < heads, other=0.0)


# A stride of 1 would become a constant, which the groups cannot be given as a number.
@gluon.jit(do_not_specialize=["slots", "heads", "programs", "latent_scale_stride_s"])
def attend_words_kernel(
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
    programs,
    q_latent_stride_b,
    q_latent_stride_h,
    q_rope_stride_b,
    q_rope_stride_h,
    latent_scale_stride_b,
    latent_scale_stride_s,
    INT8: gl.constexpr,
):
    head = gl.program_id(0) * HEADS
    row = gl.program_id(2)
    wide_row = row.to(gl.int64)
    ranges = programs * GROUPS
    length = gl.minimum(gl.load(lengths + row).to(gl.int32), slots)
    per_range = gl.cdiv(gl.cdiv(length, ranges), SLOTS) * SLOTS
    place = Place(row, head, heads, gl.program_id(1) * GROUPS, ranges, per_range, length)

    dtype: gl.constexpr = k_rope.dtype
    wide: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    shared = Memory(
        gl.allocate_shared_memory(gl.float16, [2, HEADS, PAIRS], wide),
        gl.allocate_shared_memory(gl.float32, [HEADS], gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])),
        gl.allocate_shared_memory(dtype, [HEADS, ROTATED], wide),
        gl.allocate_shared_memory(latent.dtype, [STAGES, SLOTS, PAIRS], wide),
        gl.allocate_shared_memory(dtype, [STAGES, SLOTS, ROTATED], wide),
        gl.allocate_shared_memory(gl.float16, [GROUPS, HEADS, SLOTS], wide),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
    )
    q_latent += wide_row * q_latent_stride_b
    even = _load_queries(q_latent, head, heads, q_latent_stride_h, 2, PAIRS).to(gl.float32)
    odd = _load_queries(q_latent + 1, head, heads, q_latent_stride_h, 2, PAIRS).to(gl.float32)
    largest = gl.maximum(gl.max(gl.abs(even), 1), gl.max(gl.abs(odd), 1))
    size = gl.exp2(gl.floor(gl.log2(gl.maximum(largest, 1e-30))))
    shared.sizes.store(size)
    shared.q.index(0).store((even * (1.0 / size)[:, None]).to(gl.float16))
    shared.q.index(1).store((odd * (1.0 / size)[:, None]).to(gl.float16))
    shared.q_rotated.store(_load_queries(q_rope + wide_row * q_rope_stride_b, head, heads, q_rope_stride_h, 1, ROTATED))
    for i in gl.static_range(STAGES):
        mbarrier.init(shared.full.index(i), count=1)
        mbarrier.init(shared.empty.index(i), count=1)
    fence_async_shared()

    scales = latent_scale + wide_row * latent_scale_stride_b
    gl.warp_specialize(
        [
            (_bring, (latent, k_rope, shared, place)),
            (_attend, (shared, place, scales, latent_scale_stride_s, out, lse, scale_log2, 0, INT8)),
            (_attend, (shared, place, scales, latent_scale_stride_s, out, lse, scale_log2, 1, INT8)),
        ],
        WORKER_WARPS,
        WORKER_REGISTERS,
    )


def programs_for(q_latent_BHL: Tensor, latent_BSL: Tensor) -> int:
    """How many programs share a row, on these tensors' device; half of the ranges."""
    B, H, _ = q_latent_BHL.shape
    multiprocessors, _ = size_of(q_latent_BHL.device)
    slots = latent_BSL.shape[1]
    return min(_programs(B, rounded_slots(slots), H, multiprocessors), -(-slots // TILE.slots))


@functools.lru_cache(maxsize=4096)
def _programs(batch_size: int, slots: int, n_heads: int, multiprocessors: int) -> int:
    chosen = choose_splits(batch_size=batch_size, slots=slots, n_heads=n_heads, tile=TILE, multiprocessors=multiprocessors)
    return min(chosen, MAX_SPLITS // GROUPS.value)


def launch(
    q_latent_BHL: Tensor,
    q_rope_BHP: Tensor,
    latent_BSL: Tensor,
    k_rope_BSP: Tensor,
    lengths_B: Tensor,
    latent_scale_BS: Tensor,
    *,
    scale: float,
    programs: int,
) -> Tensor:
    """Run the kernel with so many programs a row; returns out_BHL. All give the same result up to rounding."""
    out_BHL = torch.empty_like(q_latent_BHL, memory_format=torch.contiguous_format)
    ranges = programs * GROUPS.value
    partial_BHNL, lse_BHN = partial_sums(out_BHL, ranges)
    grid, arguments, constants = program(
        q_latent_BHL,
        q_rope_BHP,
        latent_BSL,
        k_rope_BSP,
        lengths_B,
        latent_scale_BS,
        partial_BHNL,
        lse_BHN,
        scale=scale,
        programs=programs,
    )
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(out_BHL.device) if out_BHL.is_cuda else contextlib.nullcontext():
        attend_words_kernel[grid](*arguments, **constants, num_warps=TILE.warps, maxnreg=TILE.registers)
        join(partial_BHNL, lse_BHN, out_BHL, ranges)
    return out_BHL


def program(
    q_latent_BHL: Tensor,
    q_rope_BHP: Tensor,
    latent_BSL: Tensor,
    k_rope_BSP: Tensor,
    lengths_B: Tensor,
    latent_scale_BS: Tensor,
    partial_BHNL: Tensor,
    lse_BHN: Tensor,
    *,
    scale: float,
    programs: int,
    describe: Callable[[Tensor, list[int]], Any] | None = None,
) -> tuple[tuple[int, int, int], tuple[Any, ...], dict[str, bool]]:
    """(grid, arguments of `attend_words_kernel`, its constants). describe: makes a descriptor of a tensor and a block."""
    describe = describe or descriptor
    B, H, _ = q_latent_BHL.shape
    q_latent_BHL, q_rope_BHP = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_latent_BHL, q_rope_BHP))
    pairs_BSI = latent_BSL.view(torch.int16)
    check_copied(pairs_BSI, k_rope_BSP)
    arguments = (
        q_latent_BHL,
        q_rope_BHP,
        describe(pairs_BSI, [1, SLOTS.value, PAIRS.value]),
        latent_scale_BS,
        describe(k_rope_BSP, [1, SLOTS.value, ROTATED.value]),
        lengths_B.contiguous(),
        partial_BHNL,
        lse_BHN,
        scale * math.log2(math.e),
        latent_BSL.shape[1],
        H,
        programs,
        *(stride for x in (q_latent_BHL, q_rope_BHP, latent_scale_BS) for stride in x.stride()[:2]),
    )
    return (triton.cdiv(H, TILE.heads), programs, B), arguments, {"INT8": latent_BSL.dtype == torch.int8}
