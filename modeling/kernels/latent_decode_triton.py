"""The decode kernel of latent attention in Triton: the equation of latent_decode.py with the cache split over programs.

A program takes a block of heads and a range of one row's slots, reads each tile of latents once for both products
(scores and weighted sum) and keeps a running maximum and sum (online softmax, Milakov and Gimelshein, arXiv 1805.02867).
With several ranges a row ("splits") a second kernel joins their results by their log-sum-exp, as Flash-Decoding does.
Ranges follow from each row's own length, on the device; their number follows from shapes alone, so that a launch waits
for nothing and can be captured in a CUDA graph. No atomics: results repeat bit for bit.

Letters: B batch, S slots, H query heads, L kv_lora_rank, P rotated width. Inside the kernels: rows of a tile are heads
or slots, columns are the widths, padded to a power of two.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's compiler gives the parameters of its kernels their types at each launch.

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from modeling.kernels.decode_kernels import EIGHT_BITS
from modeling.kernels.latent_decode_shared_triton import load_rows, slots_of_program, weights_so_far
from modeling.kernels.latent_decode_words_triton import attend_words_kernel

MAX_SPLITS = 128


@dataclass(frozen=True)
class Tile:
    """What one program works on, heads x slots at a time, and what it takes of a multiprocessor.

    registers: the most that a thread may take. Left alone, the compiler takes 194 at 16 x 32 with one split and 127 with
    several; held to 128 it spills nothing, and four programs are resident instead of two.
    resident: programs that a Hopper multiprocessor holds at a time, by registers and shared memory
    (python benchmarks/latent_decode.py --offline compiles every tile and says).
    start: what a program costs beside its slots, in slots: about 12 us on a full H200, fitted to docs/PERFORMANCE.md's table.
    """

    heads: int
    slots: int
    warps: int
    stages: int
    registers: int
    resident: int
    start: int = 64


@dataclass(frozen=True)
class Plan:
    tile: Tile
    splits: int


# Padded latent width -> tile, the first row whose width suffices.
# WIDE: 64 heads fill wgmma, Hopper's matrix instruction, which has no smaller tile; below it only mma.sync is left and
# a cache row is read once per 16 heads (from L2). NARROW: enough for 16 heads, which wait for memory in any case.
WIDE = {128: Tile(64, 64, 4, 2, 168, 3), 256: Tile(64, 64, 8, 2, 255, 1), 512: Tile(64, 64, 8, 2, 255, 1, 195)}
NARROW = {128: Tile(16, 128, 4, 2, 128, 3), 256: Tile(16, 64, 4, 2, 128, 4), 512: Tile(16, 32, 4, 2, 128, 4)}
# Latents of 8 bits: what is loaded ahead of its use waits in registers.
NARROW_WORDS = {128: Tile(16, 64, 4, 2, 168, 3), 256: Tile(16, 32, 4, 2, 168, 3), 512: Tile(16, 32, 4, 2, 168, 3)}
# float32 on the ordinary cores: half the slots, since an element takes twice the room.
NARROW_FLOAT32 = {128: Tile(16, 64, 4, 2, 168, 3), 256: Tile(16, 32, 4, 2, 168, 3), 512: Tile(16, 16, 8, 2, 128, 2)}


def choose_tile(*, n_heads: int, kv_lora_rank: int, dtype: torch.dtype, has_wgmma: bool, words: bool = False) -> Tile:
    """The tile for these shapes. Up to 16 heads are narrow; more are padded to 64, which costs no memory traffic.

    dtype: of the queries. words: latents of 8 bits.
    """
    narrow = NARROW_WORDS if words else NARROW
    half_precision = WIDE if has_wgmma and n_heads > 16 else narrow
    table = NARROW_FLOAT32 if dtype == torch.float32 else half_precision
    return next(tile for width, tile in table.items() if kv_lora_rank <= width)


@functools.lru_cache(maxsize=4096)
def choose_splits(*, batch_size: int, slots: int, n_heads: int, tile: Tile, multiprocessors: int) -> int:
    """How many ranges each row is split into: the number that ends first by an estimate, in slots of one program.

    A program walks its range and pays for its start. Programs run in waves of as many as the device holds. Several ranges
    have to be joined, which costs a quarter of a start (3 us of 12, fitted as `Tile.start` is) and their partial sums,
    written and read again (2 x 4 bytes against a slot's 2: about 4 slots each, spread over the device).
    """
    blocks = batch_size * -(-n_heads // tile.heads)
    lanes = multiprocessors * tile.resident
    best, least = 1, float(-(-blocks // lanes) * (slots + tile.start))
    for splits in range(2, min(MAX_SPLITS, -(-slots // tile.slots)) + 1):
        per_split = -(-slots // (splits * tile.slots)) * tile.slots
        joining = tile.start / 4 + 4 * batch_size * n_heads * splits / lanes + splits
        cost = -(-blocks * splits // lanes) * (per_split + tile.start) + joining
        if cost < least:
            best, least = splits, cost
    return best


@functools.cache
def size_of(device: torch.device) -> tuple[int, bool]:
    """(multiprocessors, has wgmma). The interpreter on a CPU stands for a small device."""
    if device.type != "cuda":
        return 8, False
    major, _ = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_properties(device).multi_processor_count, major == 9  # Blackwell has no wgmma any more


@triton.jit(do_not_specialize=["slots", "splits"])
def attend_kernel(
    q_latent,
    q_rope,
    latent,
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
):
    # Head blocks that read the same slots run side by side and share them in L2.
    block = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)  # offsets of a whole row pass 2^31
    heads = block * BLOCK_H + tl.arange(0, BLOCK_H)
    columns = tl.arange(0, PADDED_RANK)
    rope_columns = tl.arange(0, PADDED_ROPE)

    start, end = slots_of_program(lengths, row, split, splits, slots, BLOCK_S)

    is_head = heads[:, None] < HEADS
    q = tl.load(
        q_latent + row * q_latent_stride_b + heads[:, None] * q_latent_stride_h + columns[None, :],
        mask=is_head & (columns[None, :] < RANK),
        other=0.0,
    )
    if ROPE > 0:
        qr = tl.load(
            q_rope + row * q_rope_stride_b + heads[:, None] * q_rope_stride_h + rope_columns[None, :],
            mask=is_head & (rope_columns[None, :] < ROPE),
            other=0.0,
        )

    latent += row * latent_stride_b
    k_rope += row * k_rope_stride_b
    largest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    weighted = tl.zeros([BLOCK_H, PADDED_RANK], tl.float32)
    for first in tl.range(start, end, BLOCK_S, num_stages=STAGES):
        numbers = first + tl.arange(0, BLOCK_S)
        # The last valid slot stands in for those beyond the end: nothing beyond is read, and where a mask on the load
        # takes 191 registers at 16 heads x 32 slots, this takes 128 (twice the programs a multiprocessor).
        rows = tl.minimum(numbers, end - 1)[:, None].to(tl.int64)
        c = load_rows(latent + rows * latent_stride_s, columns, RANK, PADDED_RANK)
        scores = tl.dot(q, tl.trans(c), input_precision="ieee")
        if ROPE > 0:
            k = load_rows(k_rope + rows * k_rope_stride_s, rope_columns, ROPE, PADDED_ROPE)
            scores = tl.dot(qr, tl.trans(k), scores, input_precision="ieee")
        weights, shrink, largest, total = weights_so_far(scores, numbers, end, scale_log2, largest, total)
        weighted = tl.dot(weights.to(c.dtype), c, weighted * shrink[:, None], input_precision="ieee")

    out_rows = row * HEADS + heads
    if ONE_SPLIT:
        tl.store(
            out + out_rows[:, None] * RANK + columns[None, :],
            (weighted / total[:, None]).to(out.dtype.element_ty),
            mask=is_head & (columns[None, :] < RANK),
        )
    else:
        out_rows = out_rows * splits + split
        # A range beyond the row's length leaves -inf (not 0/0) and no sum: `join_kernel` passes over it.
        total = tl.where(start < end, total, 1.0)
        filled_heads = tl.where(start < end, HEADS, 0)
        tl.store(lse + out_rows, largest + tl.log2(total), mask=heads < HEADS)
        tl.store(
            out + out_rows[:, None] * RANK + columns[None, :],
            weighted / total[:, None],
            mask=(heads[:, None] < filled_heads) & (columns[None, :] < RANK),
        )


@triton.jit(do_not_specialize=["splits"])
def join_kernel(
    partial, lse, out, splits, HEADS: tl.constexpr, RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr
):
    # One warp: what a head's ranges have in common passes between threads without a barrier, and most devices hold 32 such
    # programs a multiprocessor. Four warps on 16 ranges took 50 us for 4,096 heads of 2 ranges on an H200.
    columns = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    row = tl.program_id(2).to(tl.int64) * HEADS + tl.program_id(1)
    lse += row * splits
    partial += row * splits * RANK
    largest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    weighted = tl.zeros([BLOCK_L], tl.float32)
    for first in range(0, splits, BLOCK_N):
        numbers = first + tl.arange(0, BLOCK_N)
        each = tl.load(lse + numbers, mask=numbers < splits, other=float("-inf"))
        # Sums of a range beyond the row's length were never written: they are read, so as not to wait for `each`, and dropped.
        sums = tl.load(
            partial + numbers[:, None] * RANK + columns[None, :],
            mask=(numbers < splits)[:, None] & (columns[None, :] < RANK),
            other=0.0,
        )
        sums = tl.where((each > float("-inf"))[:, None], sums, 0.0)
        new_largest = tl.maximum(largest, tl.max(each, 0))  # finite: the first split of a row is never empty
        shrink = tl.exp2(largest - new_largest)
        weights = tl.exp2(each - new_largest)
        total = total * shrink + tl.sum(weights, 0)
        weighted = weighted * shrink + tl.sum(weights[:, None] * sums, 0)
        largest = new_largest
    tl.store(out + row * RANK + columns, (weighted / total).to(out.dtype.element_ty), mask=columns < RANK)


def launch(
    q_latent_BHL: Tensor,
    q_rope_BHP: Tensor | None,
    latent_BSL: Tensor,
    k_rope_BSP: Tensor | None,
    lengths_B: Tensor,
    latent_scale_BS: Tensor | None = None,
    *,
    scale: float,
    plan: Plan,
) -> Tensor:
    """Run the kernel by this plan; returns out_BHL. Every plan gives the same result up to rounding."""
    B, H, L = q_latent_BHL.shape
    S = latent_BSL.shape[1]
    P = 0 if q_rope_BHP is None else q_rope_BHP.shape[-1]
    tile, splits = plan.tile, plan.splits
    assert latent_BSL.stride(-1) == 1 and (k_rope_BSP is None or k_rope_BSP.stride(-1) == 1)
    constants = attend_constants(n_heads=H, kv_lora_rank=L, qk_rope_head_dim=P, plan=plan)
    kernel, latents = attend_kernel, [latent_BSL]
    if latent_scale_BS is not None:
        kernel, latents = attend_words_kernel, [latent_BSL.view(torch.int32), latent_scale_BS]
        by_bits = q_latent_BHL.is_cuda and q_latent_BHL.dtype == torch.bfloat16
        constants |= words_constants(L, latent_BSL.dtype, by_bits=by_bits)
    q_latent_BHL = _with_whole_rows(q_latent_BHL)
    # Without a rotated part the kernel reads neither; it needs pointers all the same.
    q_rope_BHP = q_latent_BHL if q_rope_BHP is None else _with_whole_rows(q_rope_BHP)
    k_rope_BSP = q_latent_BHL if k_rope_BSP is None else k_rope_BSP

    out_BHL = torch.empty((B, H, L), dtype=q_latent_BHL.dtype, device=q_latent_BHL.device)
    partial_BHNL, lse_BHN = partial_sums(out_BHL, splits)
    inputs = [q_latent_BHL, q_rope_BHP, *latents, k_rope_BSP]
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(out_BHL.device) if out_BHL.is_cuda else contextlib.nullcontext():
        kernel[(triton.cdiv(H, tile.heads), splits, B)](
            *inputs,
            lengths_B.contiguous(),
            partial_BHNL,
            lse_BHN,
            scale * math.log2(math.e),
            S,
            splits,
            *(stride for tensor in inputs for stride in tensor.stride()[:2]),
            **constants,
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=tile.registers,
        )
        join(partial_BHNL, lse_BHN, out_BHL, splits)
    return out_BHL


def partial_sums(out_BHL: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """(partial_BHNL, lse_BHN) for a kernel to write, N splits; with one split it writes the output itself."""
    if splits == 1:
        return out_BHL, out_BHL
    B, H, L = out_BHL.shape
    partial_BHNL = torch.empty((B, H, splits, L), dtype=torch.float32, device=out_BHL.device)
    return partial_BHNL, torch.empty((B, H, splits), dtype=torch.float32, device=out_BHL.device)


def join(partial_BHNL: Tensor, lse_BHN: Tensor, out_BHL: Tensor, splits: int) -> None:
    """Write the output from the partial sums, where there are any; on the current device."""
    if splits > 1:
        B, H, L = out_BHL.shape
        constants = join_constants(n_heads=H, kv_lora_rank=L, splits=splits)
        grid = (triton.cdiv(L, constants["BLOCK_L"]), H, B)
        join_kernel[grid](partial_BHNL, lse_BHN, out_BHL, splits, **constants, num_warps=1)


def attend_constants(*, n_heads: int, kv_lora_rank: int, qk_rope_head_dim: int, plan: Plan) -> dict[str, int | bool]:
    """What `attend_kernel` is compiled for."""
    return {
        "HEADS": n_heads,
        "RANK": kv_lora_rank,
        "ROPE": qk_rope_head_dim,
        "PADDED_RANK": max(16, triton.next_power_of_2(kv_lora_rank)),  # 16: the narrowest matrix product
        "PADDED_ROPE": max(16, triton.next_power_of_2(qk_rope_head_dim)),
        "BLOCK_H": plan.tile.heads,
        "BLOCK_S": plan.tile.slots,
        "STAGES": plan.tile.stages,
        "ONE_SPLIT": plan.splits == 1,
    }


def words_constants(kv_lora_rank: int, dtype: torch.dtype, *, by_bits: bool) -> dict[str, int | bool]:
    """What `attend_words_kernel` is compiled for beside that, for latents of 8 bits. by_bits: assembly widens them."""
    narrowest = 4 * 16  # a matrix product for each of the four planes
    return {
        "PADDED_RANK": max(narrowest, triton.next_power_of_2(kv_lora_rank)),
        "INT8": dtype == torch.int8,
        "BY_BITS": by_bits,
    }


def join_constants(*, n_heads: int, kv_lora_rank: int, splits: int) -> dict[str, int]:
    """What `join_kernel` is compiled for: up to 64 partial sums at a time, 2,048 numbers, which are 64 a thread."""
    ranges = min(64, triton.next_power_of_2(splits))
    columns = min(2048 // ranges, triton.next_power_of_2(kv_lora_rank))
    return {"HEADS": n_heads, "RANK": kv_lora_rank, "BLOCK_N": ranges, "BLOCK_L": columns}


def _with_whole_rows(q: Tensor) -> Tensor:
    return q if q.stride(-1) == 1 else q.contiguous()


def splits_for(q_latent_BHL: Tensor, latent_BSL: Tensor, tile: Tile) -> int:
    """How many ranges a row is split into, on these tensors' device.

    As for a multiple of 256 slots, so that a cache that grows token by token asks for a new number every 256 tokens only.
    """
    B, H, _ = q_latent_BHL.shape
    S = latent_BSL.shape[1]
    multiprocessors, _ = size_of(q_latent_BHL.device)
    splits = choose_splits(batch_size=B, slots=-(-S // 256) * 256, n_heads=H, tile=tile, multiprocessors=multiprocessors)
    return min(splits, -(-S // tile.slots))


def plan_for(q_latent_BHL: Tensor, latent_BSL: Tensor) -> Plan:
    """The plan for these tensors on their device, from shapes and the device's size alone."""
    _, H, L = q_latent_BHL.shape
    _, has_wgmma = size_of(q_latent_BHL.device)
    words = latent_BSL.dtype in EIGHT_BITS
    tile = choose_tile(n_heads=H, kv_lora_rank=L, dtype=q_latent_BHL.dtype, has_wgmma=has_wgmma, words=words)
    return Plan(tile, splits_for(q_latent_BHL, latent_BSL, tile))


def decode(
    q_latent_BHL: Tensor,
    q_rope_BHP: Tensor | None,
    latent_BSL: Tensor,
    k_rope_BSP: Tensor | None,
    lengths_B: Tensor,
    latent_scale_BS: Tensor | None,
    scale: float,
) -> Tensor:
    """As `latent_decode`."""
    plan = plan_for(q_latent_BHL, latent_BSL)
    return launch(q_latent_BHL, q_rope_BHP, latent_BSL, k_rope_BSP, lengths_B, latent_scale_BS, scale=scale, plan=plan)
