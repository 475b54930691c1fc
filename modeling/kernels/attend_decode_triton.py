"""Attention of one query a row over explicit keys and values where they lie in a cache, in Triton.

A program takes the query heads of one group and a range of one row's slots, reads each tile of keys and values once for all of
these heads and keeps a running softmax; ranges of a row are joined as in latent_decode_triton.py, whose plan this is too. So
a launch waits for nothing, and results repeat bit for bit. What keys are made of is known when it is compiled:

    own        each group has its own, of all K dimensions or of the first K - P, before P that all groups share (k_rope)
    tied       they are the values' tile, which is read once: all of it, its first K - P dimensions, or
    turned     the tile times a gain, its last P dimensions rotated by their slot's angle (keys that a cache holds un-rotated)

A rotation takes a dimension of the first half of P together with one of the second, so these halves are tiles of their own,
each a contiguous load, beside one of the dimensions before them: gathered in another order, they cannot be copied ahead.
A sink is what the first range of a row begins its sum with. Letters: B batch, S slots, H query heads, G key/value heads,
K query/key width, V value width, P width that is shared or turned.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's compiler gives the parameters of its kernels their types at each launch.

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from modeling.kernels.latent_decode_shared_triton import load_rows, slots_of_program, weights_so_far
from modeling.kernels.latent_decode_triton import Plan, Tile, choose_splits, join, partial_sums, size_of

LOG2_E = math.log2(math.e)


@triton.jit(do_not_specialize=["slots", "splits"])
def attend_kernel(
    q,
    k,
    v,
    k_rope,
    gain,
    cos,
    sin,
    sinks,
    lengths,
    out,
    lse,
    scale_log2,
    slots,
    splits,
    q_stride_b,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_g,
    v_stride_b,
    v_stride_s,
    v_stride_g,
    k_rope_stride_b,
    k_rope_stride_s,
    table_stride_b,
    table_stride_s,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    OWN: tl.constexpr,
    ROPE: tl.constexpr,
    TURNED: tl.constexpr,
    VALUE: tl.constexpr,
    PADDED_OWN: tl.constexpr,
    PADDED_ROPE: tl.constexpr,
    PADDED_PLAIN: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    TIED: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
):
    # Groups that read the same slots run side by side: a token's heads are neighbours in memory.
    blocks: tl.constexpr = (HEADS // GROUPS + BLOCK_H - 1) // BLOCK_H
    group = tl.program_id(0) // blocks
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)  # offsets of a whole row pass 2^31
    in_group = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = in_group < HEADS // GROUPS
    heads = group * (HEADS // GROUPS) + in_group
    own_columns = tl.arange(0, PADDED_OWN)
    rope_columns = tl.arange(0, PADDED_ROPE)
    plain: tl.constexpr = VALUE - TURNED  # columns of values that are not turned
    half: tl.constexpr = TURNED // 2
    plain_columns = tl.arange(0, PADDED_PLAIN)
    half_columns = tl.arange(0, PADDED_HALF)

    start, end = slots_of_program(lengths, row, split, splits, slots, BLOCK_S)

    q_rows = q + row * q_stride_b + heads[:, None] * q_stride_h
    q_own = tl.load(q_rows + own_columns[None, :], mask=is_head[:, None] & (own_columns[None, :] < OWN), other=0.0)
    if ROPE > 0:
        is_rope = is_head[:, None] & (rope_columns[None, :] < ROPE)
        q_rope = tl.load(q_rows + OWN + rope_columns[None, :], mask=is_rope, other=0.0)
    if TURNED > 0:
        is_half = is_head[:, None] & (half_columns[None, :] < half)
        q_first = tl.load(q_rows + plain + half_columns[None, :], mask=is_half, other=0.0)
        q_second = tl.load(q_rows + plain + half + half_columns[None, :], mask=is_half, other=0.0)
        plain_gain = tl.load(gain + plain_columns, mask=plain_columns < plain, other=0.0).to(tl.float32)
        first_gain = tl.load(gain + plain + half_columns, mask=half_columns < half, other=0.0).to(tl.float32)
        second_gain = tl.load(gain + plain + half + half_columns, mask=half_columns < half, other=0.0).to(tl.float32)
        # Each angle stands in a table twice, where the second sine has no sign: half of a table is read.
        cos += row * table_stride_b + half
        sin += row * table_stride_b + half

    k += row * k_stride_b + group * k_stride_g
    v += row * v_stride_b + group * v_stride_g
    k_rope += row * k_rope_stride_b
    largest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    if SINKS:
        sunk = tl.load(sinks + heads, mask=is_head, other=0.0).to(tl.float32) * 1.4426950408889634  # log2 e
        largest = tl.where(split == 0, sunk, largest)
        total = tl.where(split == 0, 1.0, total)
    weighted = tl.zeros([BLOCK_H, PADDED_PLAIN], tl.float32)
    weighted_first = tl.zeros([BLOCK_H, PADDED_HALF], tl.float32)
    weighted_second = tl.zeros([BLOCK_H, PADDED_HALF], tl.float32)
    for first_slot in tl.range(start, end, BLOCK_S, num_stages=STAGES):
        numbers = first_slot + tl.arange(0, BLOCK_S)
        # The last valid slot stands in for those beyond the end: nothing beyond is read.
        rows = tl.minimum(numbers, end - 1)[:, None].to(tl.int64)
        scores = tl.zeros([BLOCK_H, BLOCK_S], tl.float32)
        if plain > 0:
            values = load_rows(v + rows * v_stride_s, plain_columns, plain, PADDED_PLAIN)
            if TURNED > 0:
                keys = (values.to(tl.float32) * plain_gain[None, :]).to(values.dtype)
            elif TIED:
                keys = values
            else:
                keys = load_rows(k + rows * k_stride_s, own_columns, OWN, PADDED_OWN)
            scores = tl.dot(q_own, tl.trans(keys), scores, input_precision="ieee")
        if TURNED > 0:
            first = load_rows(v + plain + rows * v_stride_s, half_columns, half, PADDED_HALF)
            second = load_rows(v + plain + half + rows * v_stride_s, half_columns, half, PADDED_HALF)
            cosine = load_rows(cos + rows * table_stride_s, half_columns, half, PADDED_HALF)
            sine = load_rows(sin + rows * table_stride_s, half_columns, half, PADDED_HALF)
            by_first, by_second = first.to(tl.float32) * first_gain[None, :], second.to(tl.float32) * second_gain[None, :]
            keys_first = (by_first * cosine - by_second * sine).to(first.dtype)
            keys_second = (by_second * cosine + by_first * sine).to(first.dtype)
            scores = tl.dot(q_first, tl.trans(keys_first), scores, input_precision="ieee")
            scores = tl.dot(q_second, tl.trans(keys_second), scores, input_precision="ieee")
        if ROPE > 0:
            shared = load_rows(k_rope + rows * k_rope_stride_s, rope_columns, ROPE, PADDED_ROPE)
            scores = tl.dot(q_rope, tl.trans(shared), scores, input_precision="ieee")
        weights, shrink, largest, total = weights_so_far(scores, numbers, end, scale_log2, largest, total)
        weights = weights.to(v.dtype.element_ty)
        if plain > 0:
            weighted = tl.dot(weights, values, weighted * shrink[:, None], input_precision="ieee")
        if TURNED > 0:
            weighted_first = tl.dot(weights, first, weighted_first * shrink[:, None], input_precision="ieee")
            weighted_second = tl.dot(weights, second, weighted_second * shrink[:, None], input_precision="ieee")

    out_rows = row * HEADS + heads
    if not ONE_SPLIT:
        out_rows = out_rows * splits + split
        total = tl.where(start < end, total, 1.0)  # a range beyond the row's length leaves -inf (not 0/0) and 0
        tl.store(lse + out_rows, largest + tl.log2(total), mask=is_head)
    out += out_rows[:, None] * VALUE
    if plain > 0:
        is_plain = is_head[:, None] & (plain_columns[None, :] < plain)
        tl.store(out + plain_columns[None, :], (weighted / total[:, None]).to(out.dtype.element_ty), mask=is_plain)
    if TURNED > 0:
        out += plain + half_columns[None, :]
        tl.store(out, (weighted_first / total[:, None]).to(out.dtype.element_ty), mask=is_half)
        tl.store(out + half, (weighted_second / total[:, None]).to(out.dtype.element_ty), mask=is_half)


def decode(
    q_BHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    k_rope_BSP: Tensor | None,
    lengths_B: Tensor,
    sinks_H: Tensor | None,
    gain_K: Tensor | None,
    cos_BSP: Tensor | None,
    sin_BSP: Tensor | None,
    scale: float,
    *,
    plan: Plan | None = None,
) -> Tensor:
    """As `attend_decode`. Every plan gives the same result up to rounding."""
    (B, H, K), (_, S, G, V) = q_BHK.shape, v_BSGV.shape
    own = K - (0 if k_rope_BSP is None else k_rope_BSP.shape[-1])
    q_BHK, k_BSGK, v_BSGV = map(_with_whole_rows, (q_BHK, k_BSGK, v_BSGV))
    tied = (k_BSGK.data_ptr(), k_BSGK.stride()) == (v_BSGV.data_ptr(), v_BSGV.stride())
    turned = 0 if cos_BSP is None else cos_BSP.shape[-1]
    assert tied or not turned, "keys that are turned are the values"
    # What is absent is not read; the kernel needs pointers all the same.
    k_rope_BSP = q_BHK if k_rope_BSP is None else _with_whole_rows(k_rope_BSP)
    gain_K, sinks_H = (q_BHK if each is None else each.contiguous() for each in (gain_K, sinks_H))
    if cos_BSP is None or sin_BSP is None:
        cos_BSP = sin_BSP = q_BHK
    else:
        cos_BSP, sin_BSP = (_with_whole_rows(each).expand(B, -1, -1) for each in (cos_BSP, sin_BSP))
        assert cos_BSP.stride() == sin_BSP.stride()
    plan = plan or plan_for(q_BHK, v_BSGV, turned=bool(turned))
    tile, splits = plan.tile, plan.splits
    constants = attend_constants(n_heads=H, n_kv_heads=G, own=own, rope=K - own, turned=turned, v_width=V, tied=tied, plan=plan)
    out_BHV = torch.empty((B, H, V), dtype=q_BHK.dtype, device=q_BHK.device)
    partial_BHNV, lse_BHN = partial_sums(out_BHV, splits)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(out_BHV.device) if out_BHV.is_cuda else contextlib.nullcontext():
        attend_kernel[(G * triton.cdiv(H // G, tile.heads), splits, B)](
            *(q_BHK, k_BSGK, v_BSGV, k_rope_BSP, gain_K, cos_BSP, sin_BSP, sinks_H, lengths_B.contiguous()),
            partial_BHNV,
            lse_BHN,
            scale * LOG2_E,
            S,
            splits,
            *(*q_BHK.stride()[:2], *k_BSGK.stride()[:3], *v_BSGV.stride()[:3], *k_rope_BSP.stride()[:2], *cos_BSP.stride()[:2]),
            SINKS=sinks_H is not q_BHK,
            **constants,
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=tile.registers,
        )
        join(partial_BHNV, lse_BHN, out_BHV, splits)
    return out_BHV


def attend_constants(
    *, n_heads: int, n_kv_heads: int, own: int, rope: int, turned: int, v_width: int, tied: bool, plan: Plan
) -> dict[str, int | bool]:
    """What `attend_kernel` is compiled for, but for sinks. own: K without what all groups share."""
    widths = own - turned, rope, v_width - turned, turned // 2
    padded_own, padded_rope, padded_plain, padded_half = (max(16, triton.next_power_of_2(width)) for width in widths)
    padded_half = max(32, padded_half)  # 8 columns a warp: of fewer, warps compute the same thing
    return {
        "HEADS": n_heads,
        "GROUPS": n_kv_heads,
        "OWN": own - turned,
        "ROPE": rope,
        "TURNED": turned,
        "VALUE": v_width,
        "PADDED_OWN": padded_plain if tied else padded_own,
        "PADDED_ROPE": padded_rope,
        "PADDED_PLAIN": padded_plain,
        "PADDED_HALF": padded_half,
        "TIED": tied,
        "BLOCK_H": plan.tile.heads,
        "BLOCK_S": plan.tile.slots,
        "STAGES": plan.tile.stages,
        "ONE_SPLIT": plan.splits == 1,
    }


def choose_tile(*, n_heads: int, K: int, V: int, dtype: torch.dtype, turned: bool = False, wide: bool = True) -> Tile:
    """The tile for so many query heads a group, which reads 32 KiB of keys and values, and less where it holds more besides.

    wide: more than 16 heads are padded to 64, which fill Hopper's matrix instruction, as in latent_decode_triton.py, but where
    keys are turned: from a computed tile of 256 x 16 that instruction came out wrong (docs/LOG.md). Registers and programs are
    what `benchmarks/latent_decode.py --offline` says; a start costs what it does there, in bytes of slots.
    """
    width, full = max(64, triton.next_power_of_2(max(K, V))), dtype == torch.float32
    wide = wide and n_heads > 16 and not full and not turned
    slots = max(16, 8192 // width // 2 ** (wide + full))
    registers, resident = (168, 3) if wide or turned else (128, 4)
    if (wide and width == 256) or (turned and full):
        registers, resident = 255, 2
    return Tile(64 if wide else 16, slots, 4, 2, registers, resident, 64 * 576 // (K + V))


def plan_for(q_BHK: Tensor, v_BSGV: Tensor, *, turned: bool) -> Plan:
    """The plan for these tensors on their device, as for a multiple of 256 slots: see latent_decode_triton.py."""
    (B, S, G, V), (_, H, K) = v_BSGV.shape, q_BHK.shape
    multiprocessors, has_wgmma = size_of(q_BHK.device)
    tile = choose_tile(n_heads=H // G, K=K, V=V, dtype=q_BHK.dtype, turned=turned, wide=has_wgmma)
    slots = -(-S // 256) * 256
    splits = choose_splits(batch_size=B * G, slots=slots, n_heads=H // G, tile=tile, multiprocessors=multiprocessors)
    return Plan(tile, min(splits, -(-S // tile.slots)))


def _with_whole_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
