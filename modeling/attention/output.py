"""What every mechanism of softmax attention ends with: heads over keys and values, a gate if any, and their way out.

The gate (Qiu et al. 2025, arXiv 2505.06708, position G1; Qwen3-Next's attention) multiplies what the heads give, before o_proj,
by sigmoid(x W_G): with gate=element each of its H V numbers by one of its own, with gate=head each head by one. Nothing is
cached. W_G is drawn as the other matrices are, so that gates begin near 1/2, as published (there its rows are part of W_Q).

Letters: B batch, T new tokens, S visible tokens, D d_model, H query heads, G key/value heads, K query/key width, V value
width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modeling.attention.refusals import check_choice
from modeling.attention.rope import rotate_last
from modeling.kernels.attend import attend
from modeling.kernels.attend_decode import attend_decode
from modeling.kernels.decode_kernels import explicit_kernels, select_explicit

if TYPE_CHECKING:
    from modeling.attention.cache import Placement


def attend_as(
    attention: Any,
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    place: Placement,
    weights_out: list[Tensor] | None,
    k_rope_BSP: Tensor | None = None,
    turned: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """out_BTHV by the scale, sinks, dropout, backend and kernel of `attention`; keys and values in the dtype of the queries.

    k_rope_BSP: the last dimensions of the keys of all heads, where they share these. turned: (gain, cos, sin) where k_BSGK are
    the values, of which `rotate_last` makes the keys: a kernel does so as it reads them.
    """
    dtype, sinks_H = q_BTHK.dtype, getattr(attention, "sink_logits", None)
    k_BSGK, v_BSGV = k_BSGK.to(dtype), v_BSGV.to(dtype)
    k_rope_BSP = None if k_rope_BSP is None else k_rope_BSP.to(dtype)
    dropout = attention.dropout if attention.training else 0.0
    kernel = decode_kernel(attention, dtype, q_BTHK.device) if place.first and weights_out is None and not dropout else "torch"
    if kernel != "torch":
        out_BHV = attend_decode(
            q_BTHK[:, 0],
            k_BSGK,
            v_BSGV,
            place.lengths_B(k_BSGK),
            scale=attention.scale,
            kernel=kernel,
            k_rope_BSP=k_rope_BSP,
            sinks_H=sinks_H,
            turned=turned,
        )
        return out_BHV.unsqueeze(1)
    if turned is not None:
        k_BSGK = rotate_last(k_BSGK, turned[1:], turned[0])
    out_BTHV, weights_BHTS = attend(
        q_BTHK,
        k_BSGK,
        v_BSGV,
        scale=attention.scale,
        k_rope_BSP=k_rope_BSP,
        causal=place.causal,
        mask_BTS=place.mask_BTS,
        window=place.window,
        sink_logits_H=sinks_H,
        dropout=dropout,
        backend=attention.backend,
        return_weights=weights_out is not None,
    )
    if weights_out is not None and weights_BHTS is not None:
        weights_out.append(place.by_token(weights_BHTS))
    return out_BTHV


def kernels_of(attention: Any) -> dict[str, str | None]:
    """The `kernels` of a layer that attends by `attend_as` to keys and values as they are cached (protocol.py)."""
    return explicit_kernels(attention.qk_width, attention.v_head_dim)


def decode_kernel(attention: Any, dtype: torch.dtype, device: torch.device) -> str:
    """What computes one new token a row of such a layer, through a cache that is read in this dtype; torch for all others."""
    if not hasattr(type(attention), "kernels"):  # the class is asked: a layer would make them anew in each call
        return "torch"
    name = "torch" if attention.kernel == "auto" and attention.backend == "reference" else attention.kernel
    return select_explicit(name, device=device, dtype=dtype, K=attention.qk_width, V=attention.v_head_dim)


def gate_projection(gate: str, *, d_model: int, n_heads: int, v_head_dim: int, bias: bool) -> nn.Linear | None:
    """W_G; None for gate=none. Raises Refusal for a gate that is none of the three."""
    check_choice("gate", gate, ("none", "element", "head"))
    if gate == "none":
        return None
    return nn.Linear(d_model, n_heads * (v_head_dim if gate == "element" else 1), bias=bias)


def project_out(attention: Any, out_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
    """x_BTD of the layer's own input -> x_BTD of its output: the heads gated, where there is a gate_proj, and joined."""
    if attention.gate_proj is not None:
        out_BTHV = out_BTHV * attention.gate_proj(x_BTD).unflatten(-1, (out_BTHV.shape[2], -1)).sigmoid()
    return attention.o_proj(out_BTHV.flatten(2))
