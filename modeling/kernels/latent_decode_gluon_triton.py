"""attention.kernel=gluon: two decode kernels in Gluon, Triton's language a level below, for Hopper's matrix unit and copies.

A step with few heads waits for memory, and one with many for products, and the matrix instruction takes 64 rows at least. So
up to FEW_HEADS, and for latents of 8 bits whatever the heads, slots are its rows (latent_decode_gluon_slots_triton.py), and
above heads are (latent_decode_gluon_heads_triton.py). Ranges of a row ("splits") are joined by `join_kernel` of
latent_decode_triton.py. No atomics: results repeat bit for bit. Triton's interpreter does not run Gluon: on a CPU
tests/support/gluon_emulation.py does.

Letters: B batch, S slots, H query heads, L kv_lora_rank, P rotated width.
"""

from __future__ import annotations

import contextlib
from types import ModuleType

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from modeling.kernels import latent_decode_gluon_heads_triton as by_heads
from modeling.kernels import latent_decode_gluon_slots_triton as by_slots
from modeling.kernels.decode_kernels import EIGHT_BITS
from modeling.kernels.latent_decode_triton import Tile, join, partial_sums, splits_for
from modeling.refusal import Refusal

# Measured in 16 bits with 128 rows on an H200 (docs/PERFORMANCE.md): slots take 0.9 of the other's time at 32 heads, 1.7 at 64.
FEW_HEADS = 32


def form_for(q_latent_BHL: Tensor, latent_BSL: Tensor) -> tuple[ModuleType, Tile]:
    """(the kernel's module, what one program works on) for these tensors."""
    if latent_BSL.dtype in EIGHT_BITS:
        return by_slots, by_slots.TILE
    if q_latent_BHL.shape[1] <= FEW_HEADS:
        return by_slots, by_slots.WIDE_TILE
    return by_heads, by_heads.TILE


def decode(
    q_latent_BHL: Tensor,
    q_rope_BHP: Tensor | None,
    latent_BSL: Tensor,
    k_rope_BSP: Tensor | None,
    lengths_B: Tensor,
    latent_scale_BS: Tensor | None,
    scale: float,
) -> Tensor:
    """As `latent_decode`. Raises Refusal for caches that the copy engine cannot read."""
    assert q_rope_BHP is not None and k_rope_BSP is not None
    splits = splits_for(q_latent_BHL, latent_BSL, form_for(q_latent_BHL, latent_BSL)[1])
    caches = latent_BSL, k_rope_BSP, lengths_B, latent_scale_BS
    return launch(q_latent_BHL, q_rope_BHP, *caches, scale=scale, splits=splits)


def launch(
    q_latent_BHL: Tensor,
    q_rope_BHP: Tensor,
    latent_BSL: Tensor,
    k_rope_BSP: Tensor,
    lengths_B: Tensor,
    latent_scale_BS: Tensor | None,
    *,
    scale: float,
    splits: int,
) -> Tensor:
    """Run the kernel with rows split so; returns out_BHL. Every number of splits gives the same result up to rounding."""
    kernel, tile = form_for(q_latent_BHL, latent_BSL)
    for name, cache in (("latents", latent_BSL), ("rotated keys", k_rope_BSP)):
        if not is_copied(cache):
            raise Refusal(
                f"the kernels in Gluon copy slots that begin at multiples of 16 bytes, and the {name} begin at "
                f"{cache.data_ptr()} with strides {cache.stride()} of {cache.itemsize} bytes; take attention.kernel=triton"
            )
    q_latent_BHL, q_rope_BHP = (
        x if is_copied(x) else x.clone(memory_format=torch.contiguous_format) for x in (q_latent_BHL, q_rope_BHP)
    )
    out_BHL = torch.empty_like(q_latent_BHL, memory_format=torch.contiguous_format)
    partial_BHNL, lse_BHN = partial_sums(out_BHL, splits)
    inputs = q_latent_BHL, q_rope_BHP, latent_BSL, k_rope_BSP, lengths_B.contiguous(), latent_scale_BS
    grid, arguments, constants = kernel.program(*inputs, partial_BHNL, lse_BHN, scale=scale, splits=splits, describe=descriptor)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(out_BHL.device) if out_BHL.is_cuda else contextlib.nullcontext():
        kernel.attend_kernel[grid](*arguments, **constants, num_warps=tile.warps, maxnreg=tile.registers)
        join(partial_BHNL, lse_BHN, out_BHL, splits)
    return out_BHL


def is_copied(x: Tensor) -> bool:
    """Whether the copy engine reads blocks of a three-dimensional tensor: rows that are whole, at multiples of 16 bytes."""
    between = [stride for stride, size in zip(x.stride()[:2], x.shape[:2], strict=True) if size > 1]
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride * x.itemsize % 16 == 0 for stride in between)


def descriptor(x: Tensor, block_shape: list[int]) -> TensorDescriptor:
    """What the copy engine is told of a three-dimensional tensor of 16 bits, to copy such blocks of it."""
    # A dimension of one row may have any stride in torch; the copy engine checks it all the same.
    strides = [stride if size > 1 else x.shape[-1] for stride, size in zip(x.stride()[:2], x.shape[:2], strict=True)]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block_shape, layout)
