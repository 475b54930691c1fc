"""One new token by one of the kernels of decode_kernels.py's table: what they have in common, and torch.compile's view of them.

Letters: B batch, S slots, H query heads, L kv_lora_rank, P rotated width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modeling.kernels.decode_kernels import EIGHT_BITS, OTHERS, check_dtype, check_no_gradient, check_widths


def _run(
    q_latent_BHL: Tensor,
    q_rope_BHP: Tensor | None,
    latent_BSL: Tensor,
    k_rope_BSP: Tensor | None,
    lengths_B: Tensor,
    latent_scale_BS: Tensor | None,
    scale: float,
    kernel: str,
) -> Tensor:
    return OTHERS[kernel].decode(q_latent_BHL, q_rope_BHP, latent_BSL, k_rope_BSP, lengths_B, latent_scale_BS, scale)


# Inside torch.compile a call is one opaque operator; called directly it would pay for the operator's bookkeeping.
_operator = torch.library.custom_op("latent_decode::other", _run, mutates_args=())


@_operator.register_fake
def _(q_latent_BHL: Tensor, *others: object) -> Tensor:
    return q_latent_BHL.new_empty(q_latent_BHL.shape)


def decode_by(
    kernel: str,
    q_latent_BHL: Tensor,
    q_rope_BHP: Tensor | None,
    latent_BSL: Tensor,
    k_rope_BSP: Tensor | None,
    lengths_B: Tensor,
    latent_scale_BS: Tensor | None,
    scale: float,
) -> Tensor:
    """As `latent_decode`. Raises Refusal for widths, dtypes and gradients that the kernel does not have."""
    tensors = [x for x in (q_latent_BHL, q_rope_BHP, k_rope_BSP) if x is not None]
    dtype, kept = q_latent_BHL.dtype, latent_BSL.dtype
    assert all(x.dtype == dtype for x in tensors), [x.dtype for x in tensors]
    assert kept in EIGHT_BITS if latent_scale_BS is not None else kept == dtype, (kept, dtype)
    check_widths(kernel, latent_BSL.shape[-1], 0 if k_rope_BSP is None else k_rope_BSP.shape[-1])
    check_dtype(kernel, dtype)
    check_no_gradient(kernel, *tensors, latent_BSL)
    run = _operator if torch.compiler.is_compiling() else _run
    return run(q_latent_BHL, q_rope_BHP, latent_BSL, k_rope_BSP, lengths_B, latent_scale_BS, scale, kernel)
