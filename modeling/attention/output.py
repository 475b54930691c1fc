"""What every mechanism of softmax attention ends with: heads over keys and values, and their way out.

Letters: B batch, T new tokens, S visible tokens, D d_model, H query heads, G key/value heads, K query/key width, V value
width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from modeling.kernels.attend import attend

if TYPE_CHECKING:
    from modeling.attention.cache import Placement


def attend_as(
    attention: Any, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, place: Placement, weights_out: list[Tensor] | None
) -> Tensor:
    """out_BTHV by the scale, dropout and backend of `attention`; keys and values in the dtype of the queries."""
    out_BTHV, weights_BHTS = attend(
        q_BTHK,
        k_BSGK.to(q_BTHK.dtype),
        v_BSGV.to(q_BTHK.dtype),
        scale=attention.scale,
        causal=place.causal,
        mask_BTS=place.mask_BTS,
        dropout=attention.dropout if attention.training else 0.0,
        backend=attention.backend,
        return_weights=weights_out is not None,
    )
    if weights_out is not None and weights_BHTS is not None:
        weights_out.append(weights_BHTS)
    return out_BTHV
