"""Softmax attention over explicit keys and values: a readable reference and torch's SDPA kernels, one signature.

Letters: B batch, T queries, S keys, H query heads, G key/value heads (G divides H), K query/key width, V value width.
Query head h reads key/value head h // (H / G) (Ainslie et al. 2023, arXiv 2305.13245).
"""

from __future__ import annotations

import contextlib
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# "sdpa" leaves the kernel to torch; the others pin one. A pinned kernel is used for every call without an explicit mask
# (all of training); calls with a mask (ragged batches, chunked prefill) leave it to torch, since flash takes no mask.
PINNED = {
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
BACKENDS = ("auto", "reference", "sdpa", *PINNED)

# Flash kernels want one width for keys and values; the narrower are padded with zeros and the output is cut.
# On two CPU cores (T 256, widths 48/32) padded flash takes 0.82 of the time of the unfused kernel.
_ONE_WIDTH = ("sdpa_flash",)


def attend(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask_BTS: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "sdpa",
    return_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """softmax(scale * q k^T) v.

    causal: query t sees keys 0..t (needs T == S and no mask). mask_BTS: True where query t may see key s; its first
    dimension may be 1. Returns (out_BTHV, weights_BHTS or None); weights only from the reference backend.
    """
    if causal and (mask_BTS is not None or q_BTHK.shape[1] != k_BSGK.shape[1]):
        raise ValueError("causal=True is for T == S without a mask; pass the mask alone")
    if backend == "reference":
        out_BTHV, weights_BHTS = _reference(q_BTHK, k_BSGK, v_BSGV, scale, causal, mask_BTS, dropout)
        return out_BTHV, weights_BHTS if return_weights else None
    if return_weights:
        raise ValueError(f"attention weights come from backend='reference' only, not from '{backend}'")

    v_width = v_BSGV.shape[-1]
    if backend in _ONE_WIDTH and mask_BTS is None and v_width != q_BTHK.shape[-1]:
        width = max(q_BTHK.shape[-1], v_width)
        q_BTHK, k_BSGK, v_BSGV = (F.pad(x, (0, width - x.shape[-1])) for x in (q_BTHK, k_BSGK, v_BSGV))
    pinned = backend in PINNED and mask_BTS is None
    with sdpa_kernel(PINNED[backend]) if pinned else contextlib.nullcontext():
        out_BHTV = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2),
            k_BSGK.transpose(1, 2),
            v_BSGV.transpose(1, 2),
            attn_mask=None if mask_BTS is None else mask_BTS.unsqueeze(1),
            is_causal=causal,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
        )
    return out_BHTV.transpose(1, 2)[..., :v_width], None


def _reference(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float, causal: bool, mask_BTS: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """The equation as it stands, in float32 at least, rounded once: the output."""
    heads_per_group = q_BTHK.shape[2] // k_BSGK.shape[2]
    dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
    q_BHTK, k_BHSK, v_BHSV = (
        x.repeat_interleave(repeats, dim=2).transpose(1, 2).to(dtype)
        for x, repeats in ((q_BTHK, 1), (k_BSGK, heads_per_group), (v_BSGV, heads_per_group))
    )
    with torch.autocast(q_BTHK.device.type, enabled=False):  # which would round the operands again
        logits_BHTS = scale * (q_BHTK @ k_BHSK.transpose(-1, -2))
        if causal:
            T = logits_BHTS.shape[-1]
            mask_BTS = torch.ones(1, T, T, dtype=torch.bool, device=logits_BHTS.device).tril()
        if mask_BTS is not None:
            logits_BHTS = logits_BHTS.masked_fill(~mask_BTS.unsqueeze(1), float("-inf"))
        weights_BHTS = F.dropout(logits_BHTS.softmax(dim=-1), dropout)
        out_BHTV = weights_BHTS @ v_BHSV
    return out_BHTV.transpose(1, 2).to(v_BSGV.dtype), weights_BHTS


def choose_backend(
    requested: str,
    *,
    n_heads: int,
    n_kv_heads: int,
    qk_width: int,
    v_width: int,
    dropout: float,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """The concrete backend that `requested` ("auto" or a name) means for these shapes, found by running it once.

    "auto" tries the fused kernels in the order in which they were fastest for training (docs/PERFORMANCE.md) and ends
    at the unfused one, which takes anything. Raises ValueError when a kernel asked for by name cannot run them.
    """
    if requested not in BACKENDS:
        raise ValueError(f"attention.backend={requested} is unknown; choose one of {', '.join(BACKENDS)}")
    if requested in ("reference", "sdpa"):
        return requested
    order = {"cuda": ("sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "sdpa_math"), "cpu": ("sdpa_flash", "sdpa_math")}
    candidates = order.get(device.type, ("sdpa_math",)) if requested == "auto" else (requested,)
    for candidate in candidates:
        if _runs(candidate, n_heads, n_kv_heads, qk_width, v_width, dropout, device, dtype):
            return candidate
    raise ValueError(
        f"attention.backend={requested} cannot run {n_heads} heads of width {qk_width}/{v_width} in {dtype} on "
        f"{device.type}; attention.backend=auto picks a kernel that can"
    )


def _runs(
    backend: str,
    n_heads: int,
    n_kv_heads: int,
    qk_width: int,
    v_width: int,
    dropout: float,
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    """Does a small forward and backward pass go through this kernel?"""
    T = 128
    q = torch.zeros(1, T, n_heads, qk_width, device=device, dtype=dtype, requires_grad=True)
    k = torch.zeros(1, T, n_kv_heads, qk_width, device=device, dtype=dtype, requires_grad=True)
    v = torch.zeros(1, T, n_kv_heads, v_width, device=device, dtype=dtype, requires_grad=True)
    rng = torch.random.get_rng_state(), (torch.cuda.get_rng_state(device) if device.type == "cuda" else None)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SDPA's explanations of a refusal: the next candidate is tried
            out, _ = attend(q, k, v, scale=1.0, causal=True, dropout=dropout, backend=backend)
            out.sum().backward()
    except RuntimeError:  # SDPA's word for "no kernel of the allowed set takes this"
        return False
    finally:  # dropout drew numbers: the probe must not shift the run's
        torch.random.set_rng_state(rng[0])
        if rng[1] is not None:
            torch.cuda.set_rng_state(rng[1], device)
    return True
