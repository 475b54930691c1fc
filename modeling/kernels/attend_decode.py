"""Attention of a decoding step, one query a row over explicit keys and values, by a kernel of EXPLICIT (decode_kernels.py).

It is that of attend.py where each row sees its first slots and no others. Letters: B batch, S slots, H query heads, G
key/value heads, K query/key width, V value width, P rotated width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modeling.kernels.decode_kernels import EXPLICIT, check_dtype, check_no_gradient


def _run(
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
    kernel: str,
) -> Tensor:
    return EXPLICIT[kernel].decode(q_BHK, k_BSGK, v_BSGV, k_rope_BSP, lengths_B, sinks_H, gain_K, cos_BSP, sin_BSP, scale)


# Inside torch.compile a call is one opaque operator; called directly it would pay for the operator's bookkeeping.
_operator = torch.library.custom_op("attend_decode::explicit", _run, mutates_args=())


@_operator.register_fake
def _(q_BHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, *others: object) -> Tensor:
    return q_BHK.new_empty(*q_BHK.shape[:2], v_BSGV.shape[-1])


def attend_decode(
    q_BHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    kernel: str,
    k_rope_BSP: Tensor | None = None,
    sinks_H: Tensor | None = None,
    turned: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over slots 0..min(lengths_B[b], S)-1 of each row; returns out_BHV. Nothing beyond is read.

    k_rope_BSP and sinks_H: as `attend` in attend.py takes them. turned: (gain_K, cos, sin), the last two (1 or B, S, 1, P) as
    `rotate` takes them, where keys are to be turned as `rotate_last` does (rope.py); k_BSGK is v_BSGV then. Queries, keys and
    values are of one dtype; logits, softmax and sums are in float32. lengths_B (integers, at least 1) stays on the device.
    Raises Refusal for another dtype, and for a gradient.
    """
    tensors = [x for x in (q_BHK, k_BSGK, v_BSGV, k_rope_BSP) if x is not None]
    assert all(x.dtype == q_BHK.dtype for x in tensors), [x.dtype for x in tensors]
    check_dtype(kernel, q_BHK.dtype, EXPLICIT)
    check_no_gradient(kernel, *tensors, *(turned or ()), sinks_H)
    gain_K, cos_BSP, sin_BSP = (None, None, None) if turned is None else (turned[0], *(x.squeeze(2) for x in turned[1:]))
    run = _operator if torch.compiler.is_compiling() else _run
    return run(q_BHK, k_BSGK, v_BSGV, k_rope_BSP, lengths_B, sinks_H, gain_K, cos_BSP, sin_BSP, scale, kernel)
