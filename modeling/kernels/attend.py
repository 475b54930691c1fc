"""Softmax attention over explicit keys and values: a readable reference and torch's SDPA kernels, one signature.

Letters: B batch, T queries, S keys, H query heads, G key/value heads (G divides H), K query/key width, V value width.
Query head h reads key/value head h // (H / G) (Ainslie et al. 2023, arXiv 2305.13245).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from modeling.kernels.latent_decode import latent_attend
from modeling.refusal import Refusal

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

SINK_WIDTH = 8  # by which sinks widen queries and keys: kernels like multiples of it


def attend(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    scale: float,
    k_rope_BSP: Tensor | None = None,
    causal: bool = False,
    mask_BTS: Tensor | None = None,
    window: int | None = None,
    sink_logits_H: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "sdpa",
    return_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """softmax(scale * q k^T) v.

    k_rope_BSP: what the last P dimensions of every head's key are, which then has but its first K - P from k_BSGK.
    causal: query t sees keys 0..t (needs T == S and no mask), with a window those of t-window+1..t. mask_BTS: True where
    query t may see key s; its first dimension may be 1. sink_logits_H: a logit of each head that takes its share of the
    softmax and brings no value (gpt-oss): p_s = exp(l_s) / (exp(sink) + sum exp(l_s')). Returns (out_BTHV, weights_BHTS or
    None); weights only from the reference backend, those of a sink left out.
    """
    if causal and (mask_BTS is not None or q_BTHK.shape[1] != k_BSGK.shape[1]):
        raise ValueError("causal=True is for T == S without a mask; pass the mask alone")
    T, K = q_BTHK.shape[1], q_BTHK.shape[3]
    if window is not None and not causal:
        raise ValueError(f"window={window} is for causal=True; a mask says itself what is seen")
    # For the one query of a decoding step kernels that know no sinks and one key a head would have the whole cache copied. Keys
    # as wide as values are copied on a GPU: a fused kernel then takes them, in half of the time of the products (docs/LOG.md).
    fused = q_BTHK.is_cuda and v_BSGV.shape[-1] == K
    plain = sink_logits_H is None and (k_rope_BSP is None or fused)
    if T == 1 and not (plain or dropout or backend == "reference" or return_weights or q_BTHK.requires_grad):
        return _by_products(q_BTHK, k_BSGK, v_BSGV, k_rope_BSP, scale, mask_BTS, sink_logits_H), None
    if k_rope_BSP is not None:
        k_rope_BSGP = k_rope_BSP.unsqueeze(2).expand(-1, -1, k_BSGK.shape[2], -1)
        k_BSGK = torch.cat((k_BSGK[..., : K - k_rope_BSP.shape[-1]], k_rope_BSGP), dim=-1)
    if window is not None and window < T and (backend == "reference" or 2 * window >= T):
        causal, mask_BTS = False, band(T, window, q_BTHK.device)[None]
    if backend == "reference":
        out_BTHV, weights_BHTS = _reference(q_BTHK, k_BSGK, v_BSGV, scale, causal, mask_BTS, sink_logits_H, dropout)
        return out_BTHV, weights_BHTS if return_weights else None
    if return_weights:
        raise Refusal(f"attention weights come from backend='reference' only, not from '{backend}'")
    options: dict[str, Any] = {"scale": scale, "dropout": dropout, "backend": backend}
    if window is not None and 2 * window < T:
        return _in_blocks(q_BTHK, k_BSGK, v_BSGV, window, sink_logits_H, **options), None
    if sink_logits_H is not None:
        q_BTHK, k_BSGK, v_BSGV, mask_BTS = _with_sink_key(q_BTHK, k_BSGK, v_BSGV, scale, causal, mask_BTS, sink_logits_H)
        out_BTHV, _ = attend(q_BTHK, k_BSGK, v_BSGV, causal=causal, mask_BTS=mask_BTS, **options)
        return out_BTHV[:, -T:], None
    return _by_sdpa(q_BTHK, k_BSGK, v_BSGV, scale, causal, mask_BTS, dropout, backend), None


def _by_sdpa(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    scale: float,
    causal: bool,
    mask_BTS: Tensor | None,
    dropout: float,
    backend: str,
) -> Tensor:
    """out_BTHV by torch's kernels; values are padded for those that know one width alone."""
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
    return out_BHTV.transpose(1, 2)[..., :v_width]


def band(T: int, window: int, device: torch.device) -> Tensor:
    """(T, T), True where query t sees key s: the newest `window` up to its own place."""
    seen_TT = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    return seen_TT.triu(1 - window)


def _in_blocks(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, window: int, sink_logits_H: Tensor | None, **options: Any
) -> Tensor:
    """A window through kernels that know none: blocks of `window` queries, each with its own keys and the block's before.

    2 w keys a query in place of T, and one mask of (w, 2 w) for all blocks. The first block is plain causal attention.
    """
    B, T = q_BTHK.shape[:2]
    count = -(-T // window)
    if count * window > T:  # keys behind the last query are hidden from all that are kept
        q_BTHK, k_BTGK, v_BTGV = (F.pad(x, (0, 0, 0, 0, 0, count * window - T)) for x in (q_BTHK, k_BTGK, v_BTGV))
    first_BwHV, _ = attend(
        *(x[:, :window] for x in (q_BTHK, k_BTGK, v_BTGV)), causal=True, sink_logits_H=sink_logits_H, **options
    )
    queries = q_BTHK[:, window:].unflatten(0, (B, 1)).unflatten(2, (count - 1, window)).flatten(0, 2)
    keys, values = (
        torch.cat([x.unflatten(1, (count, window))[:, part] for part in (slice(None, -1), slice(1, None))], dim=2).flatten(0, 1)
        for x in (k_BTGK, v_BTGV)
    )
    seen_wS = band(2 * window, window, q_BTHK.device)[window:]
    others, _ = attend(queries, keys, values, mask_BTS=seen_wS[None], sink_logits_H=sink_logits_H, **options)
    return torch.cat((first_BwHV, others.unflatten(0, (B, count - 1)).flatten(1, 2)), dim=1)[:, :T]


def _with_sink_key(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float, causal: bool, mask_BTS: Tensor | None, sink_logits_H: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Sinks through kernels that know none: a key before all others, of value 0, that every query meets with its sink's logit.

    Queries and keys are wider by SINK_WIDTH, of which the first is sink / scale times 1 at that key
    and times 0 at the others. Causal attention stays square: a query of zeros stands before the others, to be cut off.
    """
    B, T, H, _ = q_BTHK.shape
    own_BTH1 = (sink_logits_H / scale).to(q_BTHK.dtype)[:, None].expand(B, T, H, 1)
    q_BTHK = torch.cat((q_BTHK, F.pad(own_BTH1, (0, SINK_WIDTH - 1))), dim=-1)
    k_BSGK = F.pad(k_BSGK, (0, SINK_WIDTH, 0, 0, 1, 0))
    at_sink = torch.zeros(k_BSGK.shape[-1], dtype=k_BSGK.dtype, device=k_BSGK.device)
    at_sink[-SINK_WIDTH] = 1
    k_BSGK = torch.cat((at_sink.expand_as(k_BSGK[:, :1]), k_BSGK[:, 1:]), dim=1)
    if causal:
        q_BTHK = F.pad(q_BTHK, (0, 0, 0, 0, 1, 0))
    return q_BTHK, k_BSGK, F.pad(v_BSGV, (0, 0, 0, 0, 1, 0)), None if mask_BTS is None else F.pad(mask_BTS, (1, 0), value=True)


def _by_products(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    k_rope_BSP: Tensor | None,
    scale: float,
    mask_BTS: Tensor | None,
    sink_logits_H: Tensor | None,
) -> Tensor:
    """out_BTHV by two products a head over keys and values where they lie, the groups of a token side by side as one vector.

    A query is as wide as that, and zero where the keys of other groups are: reading the cache takes longer than to multiply
    G times as many numbers. So it is attention with one key for all heads, as through latents.
    """
    (B, T, H, K), G, P = q_BTHK.shape, k_BSGK.shape[2], 0 if k_rope_BSP is None else k_rope_BSP.shape[-1]
    q_BTHN, q_BTHP = q_BTHK.split((K - P, P), dim=-1)
    wide_BTGhGK = q_BTHK.new_zeros(B, T, G, H // G, *k_BSGK.shape[2:])
    own_BThKG = wide_BTGhGK.diagonal(dim1=2, dim2=4)
    own_BThKG[..., : K - P, :] = q_BTHN.unflatten(2, (G, -1)).permute(0, 1, 3, 4, 2)
    out_BTHL, _ = latent_attend(
        wide_BTGhGK.flatten(4).flatten(2, 3),
        q_BTHP if P else None,
        k_BSGK.flatten(2),
        k_rope_BSP,
        v_BSGV.flatten(2),
        scale=scale,
        mask_BTS=mask_BTS,
        sinks_H=sink_logits_H,
    )
    return out_BTHL.unflatten(3, (G, -1)).unflatten(2, (G, -1)).diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3).flatten(2, 3)


def _reference(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    scale: float,
    causal: bool,
    mask_BTS: Tensor | None,
    sink_logits_H: Tensor | None,
    dropout: float,
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
        if sink_logits_H is None:
            weights_BHTS = logits_BHTS.softmax(dim=-1)
        else:
            sinks_BHT1 = sink_logits_H.to(dtype)[:, None, None].expand(*logits_BHTS.shape[:3], 1)
            weights_BHTS = torch.cat((logits_BHTS, sinks_BHT1), dim=-1).softmax(dim=-1)[..., :-1]
        weights_BHTS = F.dropout(weights_BHTS, dropout)
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
    at the unfused one, which takes anything. Raises Refusal when a kernel asked for by name cannot run them.
    """
    if requested not in BACKENDS:
        raise Refusal(f"attention.backend={requested} is unknown; choose one of {', '.join(BACKENDS)}")
    if requested in ("reference", "sdpa"):
        return requested
    order = {"cuda": ("sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "sdpa_math"), "cpu": ("sdpa_flash", "sdpa_math")}
    candidates = order.get(device.type, ("sdpa_math",)) if requested == "auto" else (requested,)
    shapes = ((n_heads, qk_width), (n_kv_heads, qk_width), (n_kv_heads, v_width))
    tensors = [torch.zeros(1, 128, *shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
    for candidate in candidates:
        if _runs(candidate, tensors, dropout):
            return candidate
    raise Refusal(
        f"attention.backend={requested} cannot run {n_heads} heads of width {qk_width}/{v_width} in {dtype} on "
        f"{device.type}; attention.backend=auto picks a kernel that can"
    )


def _runs(backend: str, qkv: Sequence[Tensor], dropout: float) -> bool:
    """Does a small forward and backward pass go through this kernel?"""
    device = qkv[0].device
    rng = torch.random.get_rng_state(), (torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def trial(backend: str) -> None:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SDPA's explanations of a refusal: the next candidate is tried
            out, _ = attend(*qkv, scale=1.0, causal=True, dropout=dropout, backend=backend)
            out.sum().backward()

    try:
        trial(backend)
    except RuntimeError:  # SDPA's word for "no kernel of the allowed set takes this", and torch's for mistakes of ours:
        trial("sdpa_math")  # it takes whatever is right
        return False
    finally:  # dropout drew numbers: the probe must not shift the run's
        torch.random.set_rng_state(rng[0])
        if rng[1] is not None:
            torch.cuda.set_rng_state(rng[1], device)
    return True
