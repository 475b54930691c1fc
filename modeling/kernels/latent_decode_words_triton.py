"""The decode kernel of latent_decode_triton.py over latents of 8 bits (int8, fp8 e4m3), read as they are stored.

All elements of a slot share one scale, which multiplies the slot's score and its weight instead of its elements. Elements
are read four to a word, and a word's four bytes are four planes: a program multiplies columns j, j + 4, j + 8, ... of the
queries with plane j and keeps their weighted sums apart, so that no byte has to change its place. The rotated key has 16
bits or 32, as the queries.

Letters: B batch, S slots, H query heads, L kv_lora_rank, W = L / 4 words, P rotated width.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's compiler gives the parameters of its kernels their types at each launch.

from __future__ import annotations

import triton
import triton.language as tl

from modeling.kernels.latent_decode_shared_triton import load_rows, slots_of_program, weights_so_far


@triton.jit
def _plane(words, j: tl.constexpr, like, INT8: tl.constexpr):
    """Byte j of every word as a number of like's type."""
    byte = (words >> (8 * j)).to(tl.int8)
    return byte.to(like.dtype) if INT8 else byte.to(tl.float8e4nv, bitcast=True).to(like.dtype)


@triton.jit
def _planes_by_bits(words, INT8: tl.constexpr):
    """The four as bfloat16, two at a time. Exact.

    int8: 0x4300 with 7 bits below it is 128 plus those, and with the sign's bit alone 128 or 256; the difference is the number.
    fp8: its bits moved to where bfloat16 has exponent and mantissa, times 2^120 for the other bias.
    """
    if INT8:
        a, b, c, d = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 pair, low, high;
            prmt.b32 pair, $4, 0x43434343, 0x4140;
            and.b32 low, pair, 0xff7fff7f;
            and.b32 high, pair, 0xff80ff80;
            sub.rn.bf16x2 pair, low, high;
            mov.b32 {$0, $1}, pair;
            prmt.b32 pair, $4, 0x43434343, 0x4342;
            and.b32 low, pair, 0xff7fff7f;
            and.b32 high, pair, 0xff80ff80;
            sub.rn.bf16x2 pair, low, high;
            mov.b32 {$2, $3}, pair;
            }
            """,
            "=h,=h,=h,=h,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=1,
        )
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 pair, sign, bias;
            mov.b32 bias, 0x7b807b80;
            prmt.b32 pair, $4, 0, 0x1404;
            and.b32 sign, pair, 0x80008000;
            and.b32 pair, pair, 0x7f007f00;
            shr.b32 pair, pair, 4;
            or.b32 pair, pair, sign;
            mul.rn.bf16x2 pair, pair, bias;
            mov.b32 {$0, $1}, pair;
            prmt.b32 pair, $4, 0, 0x3424;
            and.b32 sign, pair, 0x80008000;
            and.b32 pair, pair, 0x7f007f00;
            shr.b32 pair, pair, 4;
            or.b32 pair, pair, sign;
            mul.rn.bf16x2 pair, pair, bias;
            mov.b32 {$2, $3}, pair;
            }
            """,
            "=h,=h,=h,=h,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=1,
        )
    return a, b, c, d


@triton.jit
def _load_queries(q_rows, columns, j: tl.constexpr, is_head, RANK: tl.constexpr):
    """Columns j, j + 4, ... of a block of heads."""
    return tl.load(q_rows + 4 * columns[None, :] + j, mask=is_head & (4 * columns[None, :] < RANK), other=0.0)


@triton.jit(do_not_specialize=["slots", "splits"])
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
    splits,
    q_latent_stride_b,
    q_latent_stride_h,
    q_rope_stride_b,
    q_rope_stride_h,
    latent_stride_b,
    latent_stride_s,
    latent_scale_stride_b,
    latent_scale_stride_s,
    k_rope_stride_b,
    k_rope_stride_s,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    PADDED_ROPE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    INT8: tl.constexpr,
    BY_BITS: tl.constexpr,
):
    block = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    heads = block * BLOCK_H + tl.arange(0, BLOCK_H)
    columns = tl.arange(0, PADDED_RANK // 4)
    rope_columns = tl.arange(0, PADDED_ROPE)

    start, end = slots_of_program(lengths, row, split, splits, slots, BLOCK_S)

    is_head = heads[:, None] < HEADS
    q_rows = q_latent + row * q_latent_stride_b + heads[:, None] * q_latent_stride_h
    q_0 = _load_queries(q_rows, columns, 0, is_head, RANK)
    q_1 = _load_queries(q_rows, columns, 1, is_head, RANK)
    q_2 = _load_queries(q_rows, columns, 2, is_head, RANK)
    q_3 = _load_queries(q_rows, columns, 3, is_head, RANK)
    if ROPE > 0:
        qr = tl.load(
            q_rope + row * q_rope_stride_b + heads[:, None] * q_rope_stride_h + rope_columns[None, :],
            mask=is_head & (rope_columns[None, :] < ROPE),
            other=0.0,
        )

    latent += row * latent_stride_b
    latent_scale += row * latent_scale_stride_b
    k_rope += row * k_rope_stride_b
    largest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    weighted_0 = tl.zeros([BLOCK_H, PADDED_RANK // 4], tl.float32)
    weighted_1 = tl.zeros([BLOCK_H, PADDED_RANK // 4], tl.float32)
    weighted_2 = tl.zeros([BLOCK_H, PADDED_RANK // 4], tl.float32)
    weighted_3 = tl.zeros([BLOCK_H, PADDED_RANK // 4], tl.float32)
    # The compiler fetches none of these tiles ahead: each is loaded while the one before is worked on.
    rows = tl.minimum(start + tl.arange(0, BLOCK_S), end - 1)[:, None].to(tl.int64)
    words = load_rows(latent + rows * latent_stride_s, columns, RANK // 4, PADDED_RANK // 4)
    for first in tl.range(start, end, BLOCK_S, num_stages=STAGES):
        if BY_BITS:
            c_0, c_1, c_2, c_3 = _planes_by_bits(words, INT8)
        else:
            c_0 = _plane(words, 0, q_0, INT8)
            c_1 = _plane(words, 1, q_0, INT8)
            c_2 = _plane(words, 2, q_0, INT8)
            c_3 = _plane(words, 3, q_0, INT8)
        numbers = first + tl.arange(0, BLOCK_S)
        following = tl.minimum(numbers + BLOCK_S, end - 1)[:, None].to(tl.int64)
        words = load_rows(latent + following * latent_stride_s, columns, RANK // 4, PADDED_RANK // 4)
        slot = tl.minimum(numbers, end - 1).to(tl.int64)
        steps = tl.load(latent_scale + slot * latent_scale_stride_s).to(tl.float32)[None, :]
        scores = tl.dot(q_0, tl.trans(c_0), input_precision="ieee")
        scores = tl.dot(q_1, tl.trans(c_1), scores, input_precision="ieee")
        scores = tl.dot(q_2, tl.trans(c_2), scores, input_precision="ieee")
        scores = tl.dot(q_3, tl.trans(c_3), scores, input_precision="ieee") * steps
        if ROPE > 0:
            k = load_rows(k_rope + slot[:, None] * k_rope_stride_s, rope_columns, ROPE, PADDED_ROPE)
            scores = tl.dot(qr, tl.trans(k), scores, input_precision="ieee")
        weights, shrink, largest, total = weights_so_far(scores, numbers, end, scale_log2, largest, total)
        weights = (weights * steps).to(c_0.dtype)
        weighted_0 = tl.dot(weights, c_0, weighted_0 * shrink[:, None], input_precision="ieee")
        weighted_1 = tl.dot(weights, c_1, weighted_1 * shrink[:, None], input_precision="ieee")
        weighted_2 = tl.dot(weights, c_2, weighted_2 * shrink[:, None], input_precision="ieee")
        weighted_3 = tl.dot(weights, c_3, weighted_3 * shrink[:, None], input_precision="ieee")

    out_rows = row * HEADS + heads
    filled_heads = HEADS
    if not ONE_SPLIT:
        out_rows = out_rows * splits + split
        # A range beyond the row's length leaves -inf (not 0/0) and no sum: `join_kernel` passes over it.
        total = tl.where(start < end, total, 1.0)
        filled_heads = tl.where(start < end, HEADS, 0)
        tl.store(lse + out_rows, largest + tl.log2(total), mask=heads < HEADS)
    places = out + out_rows[:, None] * RANK + 4 * columns[None, :]
    mask = (heads[:, None] < filled_heads) & (4 * columns[None, :] < RANK)
    tl.store(places, (weighted_0 / total[:, None]).to(out.dtype.element_ty), mask=mask)
    tl.store(places + 1, (weighted_1 / total[:, None]).to(out.dtype.element_ty), mask=mask)
    tl.store(places + 2, (weighted_2 / total[:, None]).to(out.dtype.element_ty), mask=mask)
    tl.store(places + 3, (weighted_3 / total[:, None]).to(out.dtype.element_ty), mask=mask)
