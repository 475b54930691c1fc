"""Decoding with latent attention, absorbed: one new token a row against the cached latents, in torch or by another kernel.

All heads share the cached row as key and its latent part as value (DeepSeek-V2, arXiv 2405.04434, section 2.1):

    p_hs = softmax over s of  scale * (q_latent_h . latent_s + q_rope_h . k_rope_s),    out_h = sum over s of p_hs latent_s

The scale is 1/sqrt(N + P) of the heads as they are compared, never of the latent. Here stand the equation in plain
torch, for one query or many, the table of the other kernels (each imported only when chosen) and the choice among them.
Letters: B batch, T queries, S slots of the cache, H query heads, L kv_lora_rank, P rotated width.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.kernels.availability import TRITON_DTYPES, runs_gluon, runs_triton

EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)  # of latents, with one scale a slot


@dataclass(frozen=True)
class Kernel:
    """A kernel for one new token beside torch's: where it stands, what it needs and what it takes.

    file: in modeling/kernels, with a function `decode` of the positional arguments of `latent_decode` and the scale.
    package: that it imports; install: how to get that. dtypes: of queries and latents. latents, rotated: widths L and P.
    capability: of one in Gluon, the major compute capability it is for; None: all. reads_8_bits: latents as they are stored.
    auto_heads: from how many heads on auto takes it, before kernels that stand above it in the table; None: never.
    auto_8_bits: auto takes it for latents that are read in 8 bits too.
    interpreted: TRITON_INTERPRET runs it on any device. plans_on_host: each step anew, so that no CUDA graph can hold it.
    """

    file: str
    package: str
    install: str
    dtypes: Sequence[torch.dtype]
    latents: Sequence[int]
    rotated: Sequence[int]
    capability: int | None = None
    auto_heads: int | None = None
    auto_8_bits: bool = False
    reads_8_bits: bool = False
    interpreted: bool = False
    plans_on_host: bool = False


HALF_PRECISION = (torch.bfloat16, torch.float16)
TRITON = "pip install -r requirements-kernels.txt"
OTHERS = {
    "triton": Kernel(
        "latent_decode_triton",
        "triton",
        TRITON,
        TRITON_DTYPES,
        range(1, 513),
        range(65),
        auto_heads=1,
        auto_8_bits=True,
        reads_8_bits=True,
        interpreted=True,
    ),
    # More than 16 heads are 64 to both kernels, and there this one is the faster in all that was measured on an H200, by 1.1
    # to 1.9 times (docs/PERFORMANCE.md). Up to 16 Triton has a narrower tile, and is the faster where memory binds.
    "gluon": Kernel(
        "latent_decode_gluon_triton",
        "triton.experimental.gluon",
        TRITON,
        HALF_PRECISION,
        (512,),
        (64,),
        capability=9,
        auto_heads=17,
        reads_8_bits=True,
    ),
    "flashinfer": Kernel(
        "latent_decode_flashinfer",
        "flashinfer",
        "pip install flashinfer-python",
        HALF_PRECISION,
        (128, 256, 512),
        (64,),
        plans_on_host=True,
    ),
}
KERNELS = ("auto", "torch", *OTHERS)


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
    Raises ValueError for what another kernel cannot do: see `Kernel`; none has float64 or a backward pass.
    """
    assert (q_rope_BHP is None) == (k_rope_BSP is None)
    if kernel != "torch":
        from modeling.kernels.latent_decode_others import decode_by

        return decode_by(kernel, q_latent_BHL, q_rope_BHP, latent_BSL, k_rope_BSP, lengths_B, latent_scale_BS, scale)
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


def check_kernel(name: str, device: torch.device | str) -> None:
    """Raise ValueError, with the remedy, if attention.kernel=name cannot run on this device."""
    if name not in KERNELS:
        raise ValueError(f"attention.kernel={name} is unknown; choose {', '.join(KERNELS[:-1])} or {KERNELS[-1]}")
    kernel = OTHERS.get(name)
    if kernel is None:
        return
    device = torch.device(device)
    as_triton_reads_it = ("1", "true", "on", "yes", "y")
    interpreted = kernel.interpreted and os.environ.get("TRITON_INTERPRET", "").lower() in as_triton_reads_it
    kind = "rocm" if device.type == "cuda" and torch.version.hip else device.type  # torch gives both one name
    if kind != "cuda" and not interpreted:
        raise ValueError(f"attention.kernel={name} needs a CUDA device and this one is {kind}; take attention.kernel=torch")
    if not _is_installed(kernel.package):
        raise ValueError(
            f"attention.kernel={name} needs the package {kernel.package}: {kernel.install}, or take attention.kernel=torch"
        )
    if kernel.capability is not None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        if major != kernel.capability:
            raise ValueError(
                f"attention.kernel={name} is for devices of compute capability {kernel.capability} and this one has "
                f"{major}.{minor}; take attention.kernel=triton"
            )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # one that it would be in is missing
        return False


def check_capture(name: str) -> None:
    """Raise ValueError if a step with attention.kernel=name cannot be a CUDA graph."""
    if name in OTHERS and OTHERS[name].plans_on_host:
        raise ValueError(
            f"attention.kernel={name} plans each step on the host, which no CUDA graph can hold (step=graph, and auto on "
            "CUDA); take step=eager or attention.kernel=triton"
        )


def check_widths(name: str, kv_lora_rank: int, qk_rope_head_dim: int) -> None:
    """Raise ValueError if a kernel of the table has nothing for a latent and a rotated key of these widths."""
    kernel = OTHERS[name]
    if kv_lora_rank not in kernel.latents or qk_rope_head_dim not in kernel.rotated:
        raise ValueError(
            f"attention.kernel={name} takes kv_lora_rank {_in_words(kernel.latents)} and qk_rope_head_dim "
            f"{_in_words(kernel.rotated)}, not {kv_lora_rank} and {qk_rope_head_dim}; take attention.kernel=torch"
        )


def _in_words(widths: Sequence[int]) -> str:
    if isinstance(widths, range):
        return f"up to {widths[-1]}"
    return " or ".join(map(str, widths))


def select_kernel(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    n_heads: int,
    latent_width: int,
    qk_rope_head_dim: int,
    window: int | None = None,
    in_words: bool = False,
) -> str:
    """auto is a kernel of the table where one can compute a call of one new token, and torch elsewhere; another name stays.

    Of several it is the last that `auto_heads` allows: on Hopper gluon from 17 heads on, else triton. dtype: of the cached
    latents as they are read; in_words: they are read as they are stored in 8 bits. n_heads: that share a latent. A
    gradient is possible in torch alone.
    """
    if name != "auto":
        return name
    chosen = "torch"
    if not runs_triton(device, dtype) or window is not None or torch.is_grad_enabled():
        return chosen
    for other, kernel in OTHERS.items():
        fits = (
            kernel.auto_heads is not None
            and n_heads >= kernel.auto_heads
            and dtype in kernel.dtypes
            and latent_width in kernel.latents
            and qk_rope_head_dim in kernel.rotated
            and (kernel.auto_8_bits or not in_words)
        )
        if fits and (kernel.capability is None or runs_gluon(device, kernel.capability)):
            chosen = other
    return chosen
