"""Decoding with latent attention, absorbed: one new token a row against the cached latents, in torch or by another kernel.

All heads share the cached row as key and its latent part as value (DeepSeek-V2, arXiv 2405.04434, appendix C):

    p_hs = softmax over s of  scale * (q_latent_h . latent_s + q_rope_h . k_rope_s),    out_h = sum over s of p_hs latent_s

The scale is 1/sqrt(N + P) of the heads as they are compared, never of the latent. Here stand the equation in plain
torch, for one query or many; the other kernels stand in a table (modeling/kernels/decode_kernels.py).
Letters: B batch, T queries, S slots of the cache, H query heads, L kv_lora_rank, P rotated width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modeling.kernels.decode_kernels import EIGHT_BITS, OTHERS, check_dtype, check_no_gradient, check_widths


def latent_decode(
    q_latent_BHL: Tensor,
    q_rope_BHP: Tensor | None,
    latent_BSL: Tensor,
    k_rope_BSP: Tensor | None,
    lengths_B: Tensor,
    latent_scale_BS: Tensor | None = None,
    *,
    scale: float,
    kernel: str = "torch",
) -> Tensor:
    """softmax(scale * (q_latent . latent + q_rope . k_rope)) latent over slots 0..lengths_B[b]-1; returns out_BHL.

    q_rope_BHP and k_rope_BSP are None for plain MLA. All tensors are of one dtype, but for latents of 8 bits (int8 or fp8),
    which are multiples of their slot's latent_scale_BS; the caches may be views, their last dimension contiguous.
    lengths_B (integers, at least 1) stays on the device, and S may be larger: a preallocated cache.
    All kernels compute logits, softmax and sums in float32 at least (torch keeps float64; on a CPU it rounds logits to
    the inputs' dtype first). kernel="triton" and "gluon" never look beyond a row's length; kernel="torch" gives those slots
    weight 0, so they must hold finite numbers, as those of a `Cache` do: 0 * NaN is NaN.
    Raises Refusal for what another kernel cannot do: see `Kernel`; none has float64 or a backward pass.
    """
    assert (q_rope_BHP is None) == (k_rope_BSP is None)
    if kernel != "torch":
        tensors = [x for x in (q_latent_BHL, q_rope_BHP, k_rope_BSP) if x is not None]
        dtype, kept = q_latent_BHL.dtype, latent_BSL.dtype
        assert all(x.dtype == dtype for x in tensors), [x.dtype for x in tensors]
        assert kept in EIGHT_BITS if latent_scale_BS is not None else kept == dtype, (kept, dtype)
        check_widths(kernel, latent_BSL.shape[-1], 0 if k_rope_BSP is None else k_rope_BSP.shape[-1])
        check_dtype(kernel, dtype)
        check_no_gradient(kernel, *tensors, latent_BSL)
        run = _operator if torch.compiler.is_compiling() else _by_kernel
        return run(q_latent_BHL, q_rope_BHP, latent_BSL, k_rope_BSP, lengths_B, latent_scale_BS, scale, kernel)
    if latent_scale_BS is not None:
        latent_BSL = latent_BSL.to(q_latent_BHL.dtype) * latent_scale_BS.to(q_latent_BHL.dtype).unsqueeze(-1)
    mask_B1S = torch.arange(latent_BSL.shape[1], device=lengths_B.device) < lengths_B[:, None, None]
    out_B1HL, _ = latent_attend(
        q_latent_BHL.unsqueeze(1),
        None if q_rope_BHP is None else q_rope_BHP.unsqueeze(1),
        latent_BSL,
        k_rope_BSP,
        latent_BSL,
        scale=scale,
        mask_BTS=mask_B1S,
    )
    return out_B1HL.squeeze(1)


def _by_kernel(
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
_operator = torch.library.custom_op("latent_decode::other", _by_kernel, mutates_args=())


@_operator.register_fake
def _(q_latent_BHL: Tensor, *others: object) -> Tensor:
    return q_latent_BHL.new_empty(q_latent_BHL.shape)


def latent_attend(
    q_latent_BTHL: Tensor,
    q_rope_BTHP: Tensor | None,
    key_BSL: Tensor,
    k_rope_BSP: Tensor | None,
    value_BSL: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask_BTS: Tensor | None = None,
    sinks_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same for any number of queries and any mask, in plain torch: (out_BTHL, weights_BHTS).

    causal: query t sees keys 0..t (T == S). mask_BTS: True where query t may see key s, first dimension 1 or B. sinks_H: a
    logit of each head that takes its share of the softmax and brings no value; it is in none of the weights. Joint
    latents pass one tensor as key and value, split ones their two. Neither cache is copied or joined with the other: the
    logits are the sum of two products, in each of which all queries and heads read a key once.
    """
    B, T, H, L = q_latent_BTHL.shape
    S = key_BSL.shape[1]
    logits_BMS = wide_product(q_latent_BTHL.reshape(B, T * H, L), key_BSL.transpose(1, 2))  # M = T * H
    if q_rope_BTHP is not None and k_rope_BSP is not None:
        logits_BMS = logits_BMS + wide_product(q_rope_BTHP.reshape(B, T * H, -1), k_rope_BSP.transpose(1, 2))
    weights_BTHS = masked_softmax(scale * logits_BMS.view(B, T, H, S), causal=causal, mask_BTS=mask_BTS, sinks_H=sinks_H)
    out_BML = torch.bmm(weights_BTHS.reshape(B, T * H, S).to(value_BSL.dtype), value_BSL)
    return out_BML.view(B, T, H, -1), weights_BTHS.transpose(1, 2)


def masked_softmax(logits_BTHS: Tensor, *, causal: bool, mask_BTS: Tensor | None, sinks_H: Tensor | None = None) -> Tensor:
    """The weights of the keys that a query may see, as `latent_attend` says; 0 of the others."""
    if causal:
        _, T, _, S = logits_BTHS.shape
        mask_BTS = torch.ones(1, T, S, dtype=torch.bool, device=logits_BTHS.device).tril()
    if mask_BTS is not None:
        logits_BTHS = logits_BTHS.masked_fill(~mask_BTS.unsqueeze(2), float("-inf"))
    if sinks_H is None:
        return logits_BTHS.softmax(dim=-1)
    sinks_BTH1 = sinks_H.to(logits_BTHS.dtype)[:, None].expand(*logits_BTHS.shape[:3], 1)
    return torch.cat((logits_BTHS, sinks_BTH1), dim=-1).softmax(dim=-1)[..., :-1]


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """A batched matrix product whose result is float32 at least.

    Logits around 30 that are rounded to bfloat16 are off by up to 0.06, so a weight is off by 6 %: where torch's product
    can keep its float32 sums, it does.
    """
    if a.is_cuda and torch.version.hip is None and a.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b).to(torch.promote_types(a.dtype, torch.float32))
