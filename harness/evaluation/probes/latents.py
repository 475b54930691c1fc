"""How much of MLA's latents is used, and how much of its scores rotation makes.

Effective rank is exp(H(p)) with p the normalised *squared* singular values, the shares of the variance: Roy & Vetterli
2007 ("The effective rank", EUSIPCO), who normalise the singular values themselves and so come to larger numbers. It is
r for r equal singular values, and never above the rank. Letters: B windows, T queries, S keys, H query heads, G
key/value heads, K = N + P query/key width, N un-rotated and P rotated part, L latent width, D d_model, C columns.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.evaluation.perplexity import cut_windows, evenly, gather
from harness.evaluation.probes import Probe, Subject
from modeling.attention import reads_back
from modeling.attention.rope import rotate
from modeling.gpt import GPT

SAMPLE_TOKENS = 8192  # at most: sixteen times the widest latent in use
KEPT = 16  # singular values in the record
_TOGETHER = 4096  # tokens a forward pass
_QUERIES = 64  # of a window, evenly spaced


@torch.no_grad()
def measure_latents(subject: Subject) -> dict[str, Any] | None:
    """Spectra of latents and weights and the shares of the scores, layer by layer; None for a model without latents.

    Where layers differ, those that have a latent are measured.

    The sample: windows of max_seq_len spread evenly over the split, SAMPLE_TOKENS in all, in float32 whatever the
    precision of the evaluation. For each of `layers`:

    latents      one `joint`, `keys` and `values` where they read a half each, or one for each group of heads: what the cache
                 holds (after norm and scale, before any rotation), centred, over the sample's tokens; latents_of names the
                 layer that cached it. mean_share: what centring took away, as a share of the latents' mean square
    keys         W_UK W_DKV, (G N, D), with the gain of the norm between them (and LayerNorm's centring, which is as
                 linear); the norm's division by each token's own size and biases are left out
    values       W_UV W_DKV, likewise
    each of them effective_rank, out of width, and singular_values: the first KEPT, relative to the largest
    *_share      of the scores' variance over the visible keys of a query (those up to its own place, all of them with
                 the same weight), summed over queries, heads and windows before dividing: Var(q_R k_R) / Var(q k) is
                 rotated_share, Var(q_C k_C) / Var(q k) unrotated_share, the rest 2 Cov / Var(q k) covariance_share.
                 What shifts all keys of a query alike changes no attention weight, and no variance. None without a
                 rotated part of its own (learned positions, none, rope_after_up)

    Above them the means over the layers; effective_rank is that of the distinct latents.
    """
    model, split = subject.model, subject.split
    attentions = latent_layers(model)
    if not attentions:
        return None
    windows = cut_windows(np.array([0, len(split.tokens)]), max_seq_len=model.max_seq_len, stride=model.max_seq_len)
    length = int(windows.length.max())
    chosen = evenly(len(windows.start), max(1, min(subject.max_tokens, SAMPLE_TOKENS) // length))
    moments = {layer: [_Moments(width) for width in attention.latent_widths] for layer, attention in attentions.items()}
    variances = torch.zeros(len(model.attentions), 3, dtype=torch.float64)
    per_pass = max(1, _TOGETHER // length)
    for begin in range(0, len(chosen), per_pass):
        batch = chosen[begin : begin + per_pass]
        inputs_BT, _ = gather(split.tokens, windows, batch, end_of_text=subject.end_of_text)
        inputs = attention_inputs(model, torch.from_numpy(inputs_BT).to(subject.device))
        for (layer, attention), (q_BTX, latent_BSL, k_rope_BSP) in zip(attentions.items(), inputs, strict=True):
            for moment, part in zip(moments[layer], latent_BSL.split(attention.latent_widths, dim=-1), strict=True):
                moment.add(part)
            if k_rope_BSP is not None:
                variances[layer] += score_variances(attention, q_BTX, latent_BSL, k_rope_BSP)

    layers = [layer_figures(model, index, moments[index], *variances[index].tolist()) for index in attentions]
    own = [part for entry in layers if entry["latents_of"] == entry["layer"] for part in entry["latents"].values()]
    rotated_shares = [entry["rotated_share"] for entry in layers if entry["rotated_share"] is not None]
    return {
        "sampled_tokens": len(chosen) * length,
        "width": next(iter(attentions.values())).latent_widths[0],
        "effective_rank": _mean([part["effective_rank"] for part in own]),
        "key_effective_rank": _mean([entry["keys"]["effective_rank"] for entry in layers]),
        "value_effective_rank": _mean([entry["values"]["effective_rank"] for entry in layers]),
        "rotated_share": _mean(rotated_shares) if rotated_shares else None,
        "layers": layers,
    }


def layer_figures(
    model: GPT, layer: int, moments: list[_Moments], unrotated: float, rotated: float, covariance: float
) -> dict[str, Any]:
    """One of `layers`, see measure_latents: of the layer's latents and weights, and the variances of its scores' parts."""
    attention, leader = model.attentions[layer], _leader(model, layer)
    names: tuple[str, ...] = ("joint",)
    down_parts = _down_weights(model.attentions[leader])
    if attention.kv_latent == "split":
        names = ("keys", "values")
    elif attention.latent_groups > 1:
        names, down_parts = tuple(f"group {n}" for n in range(attention.latent_groups)), [torch.cat(down_parts)]
    whole = unrotated + rotated + 2 * covariance if attention.qk_rope_head_dim else 0.0
    parts = {"rotated_share": rotated, "unrotated_share": unrotated, "covariance_share": 2 * covariance}
    return {
        "layer": layer,
        "latents_of": leader,
        "latents": {name: moment.spectrum() for name, moment in zip(names, moments, strict=True)},
        "keys": spectrum(product_singular_values(_up_weight(attention.k_up_proj, attention), down_parts[0])),
        "values": spectrum(product_singular_values(_up_weight(attention.v_up_proj, attention), down_parts[-1])),
        **{name: part / whole if whole > 0 else None for name, part in parts.items()},
    }


def latents_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """For people: means over the layers."""
    rotated = figures["rotated_share"]
    return [
        (
            "latents",
            f"effective rank {figures['effective_rank']:.1f} of {figures['width']}; key weights "
            f"{figures['key_effective_rank']:.1f}, value weights {figures['value_effective_rank']:.1f}"
            + ("" if rotated is None else f"; {100 * rotated:.0f} % of the scores' variance is the rotated part's"),
        )
    ]


def latent_layers(model: GPT) -> dict[int, Any]:
    """The layers that have latents, by number; an MLA that reads another one's is among them."""
    return {layer: attention for layer, attention in enumerate(model.attentions) if hasattr(attention, "latent_widths")}


def attention_inputs(model: GPT, tokens_BT: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Per layer with latents: what its query heads are cut from, (B, T, H K), and what its cache holds of these tokens.

    latent_BSL and k_rope_BSP (rotated; None without a rotated part) are read off a float32 cache that the model fills,
    its leader's where a layer reads another one's.
    """
    queries: dict[int, Tensor] = {}

    def keep(layer: int, module: nn.Module, inputs: Any, output: Tensor) -> None:
        queries[layer] = output

    hooks = []
    for layer, attention in latent_layers(model).items():
        if attention.q_up_proj is not None:
            module = attention.q_up_proj
        else:
            module = attention.in_proj if attention.in_proj is not None else attention.q_proj
        hooks.append(module.register_forward_hook(functools.partial(keep, layer)))
    caches = model.new_cache(*tokens_BT.shape, dtype=torch.float32, device=tokens_BT.device)
    pinned = [attention.backend for attention in model.attentions]
    model.set_execution(backend="sdpa")  # the evaluation's own may be a kernel for 16 bits alone
    try:
        model.hidden(tokens_BT, caches)
    finally:
        for attention, backend in zip(model.attentions, pinned, strict=True):
            attention.backend = backend
        for hook in hooks:
            hook.remove()
    for layer, attention in latent_layers(model).items():
        buffers = caches[_leader(model, layer)].buffers
        # A fused projection's first columns are the queries.
        yield queries[layer][..., : attention.n_heads * attention.qk_width], buffers["latent"], buffers.get("k_rope")


def score_parts(
    attention: Any, q_BTX: Tensor, latent_BSL: Tensor, k_rope_BSP: Tensor, queries_Q: Tensor
) -> tuple[Tensor, Tensor]:
    """(un-rotated, rotated) part of the scores of the queries at the places queries_Q, (B, H, Q, S) each.

    Their sum is what attention takes the softmax of, scale and all, before keys behind the query are masked.
    """
    N, P = attention.qk_nope_head_dim, attention.qk_rope_head_dim
    q_BQHK = q_BTX[:, queries_Q].unflatten(-1, (attention.n_heads, N + P))
    q_nope_BQHN, q_rope_BQHP = q_BQHK.split((N, P), dim=-1)
    q_rope_BQHP = rotate(q_rope_BQHP, attention.rope.tables(0, len(queries_Q), queries_Q[None]))
    of_keys = attention.latent_widths[0] if attention.kv_latent == "split" else attention.kv_lora_rank
    k_BSGN = attention.k_up_proj(latent_BSL[..., :of_keys]).unflatten(-1, (-1, N))
    q_nope_BQHN, k_BSGN = attention.q_up_norm(q_nope_BQHN), attention.k_up_norm(k_BSGN)
    k_BSHN = k_BSGN.repeat_interleave(attention.n_heads // attention.n_kv_heads, dim=2)
    unrotated_BHQS = torch.einsum("bqhn,bshn->bhqs", q_nope_BQHN, k_BSHN)
    rotated_BHQS = torch.einsum("bqhp,bsp->bhqs", q_rope_BQHP, k_rope_BSP)
    return unrotated_BHQS * attention.scale, rotated_BHQS * attention.scale


def score_variances(attention: Any, q_BTX: Tensor, latent_BSL: Tensor, k_rope_BSP: Tensor) -> Tensor:
    """Variance of the un-rotated part, of the rotated part, and their covariance, over each query's visible keys.

    Summed over some queries of every window and over heads: (3,) float64 on the CPU.
    """
    S = latent_BSL.shape[1]
    queries_Q = torch.from_numpy(evenly(S, _QUERIES)).to(latent_BSL.device)
    visible_QS = torch.arange(S, device=latent_BSL.device) <= queries_Q[:, None]
    count_Q1 = visible_QS.sum(dim=-1, keepdim=True)

    def centred(part_BHQS: Tensor) -> Tensor:
        mean_BHQ1 = (part_BHQS * visible_QS).sum(dim=-1, keepdim=True) / count_Q1
        return (part_BHQS - mean_BHQ1) * visible_QS

    # Centred before squaring: the scores' common offset may be far larger than what varies.
    unrotated, rotated = map(centred, score_parts(attention, q_BTX, latent_BSL, k_rope_BSP, queries_Q))
    pairs = ((unrotated, unrotated), (rotated, rotated), (unrotated, rotated))
    return torch.stack([((a * b) / count_Q1).sum(dim=-1).cpu().double().sum() for a, b in pairs])


class _Moments:
    """First and second moments of rows of one width, in float64 on the CPU."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.sum_L = torch.zeros(width, dtype=torch.float64)
        self.products_LL = torch.zeros(width, width, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """rows: (..., L)."""
        rows_NL = rows.flatten(0, -2).cpu().double()
        self.count += len(rows_NL)
        self.sum_L += rows_NL.sum(dim=0)
        self.products_LL += rows_NL.T @ rows_NL

    def spectrum(self) -> dict[str, Any]:
        """Of the centred rows."""
        centre_LL = torch.outer(self.sum_L, self.sum_L) / self.count
        variances_L = torch.linalg.eigvalsh(self.products_LL - centre_LL).clamp(min=0).flip(0)
        mean_square = float(self.products_LL.trace())
        mean_share = float(centre_LL.trace()) / mean_square if mean_square else 0.0
        return spectrum(variances_L.sqrt()) | {"mean_share": mean_share}


def spectrum(singular_values: Tensor) -> dict[str, Any]:
    """effective_rank, out of width, and the first singular values relative to the largest; the values in falling order."""
    largest = float(singular_values[0])
    relative = singular_values / largest if largest > 0 else singular_values
    return {
        "effective_rank": effective_rank(singular_values),
        "width": len(singular_values),
        "singular_values": [round(value, 6) for value in relative[:KEPT].tolist()],
    }


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of the squared singular values, normalised to sum 1; 0 for nothing at all."""
    squared = singular_values.double().square()
    if not squared.sum() > 0:
        return 0.0
    shares = squared / squared.sum()
    return float(torch.special.entr(shares).sum().exp())


def product_singular_values(up: Tensor, down: Tensor) -> Tensor:
    """Singular values of up @ down, (M, L) @ (L, D), in falling order: L of them at most, without making the product."""
    triangles = (torch.linalg.qr(factor.detach().cpu().double(), mode="r").R for factor in (up, down.T))
    left, right = triangles
    return torch.linalg.svdvals(left @ right.T)


def _up_weight(up_proj: nn.Linear, attention: Any) -> Tensor:
    """W_UK or W_UV as (M, L): with groups, each one's rows have zeros at the latents of the others."""
    return torch.block_diag(*up_proj.weight.unflatten(0, (attention.latent_groups, -1)))


def _down_weights(attention: Any) -> list[Tensor]:
    """W_DKV as (L, D) for each latent that the cache holds, times what is linear in the latent's norm."""
    if attention.in_proj is not None:
        skip, width, _ = attention.down_widths
        weight_LD = attention.in_proj.weight[skip : skip + width]
    elif attention.kv_down_proj is None:  # a slice of x: the first rows of the identity
        weight_LD = torch.eye(attention.kv_lora_rank, attention.d_model, device=attention.o_proj.weight.device)
    else:
        weight_LD = attention.kv_down_proj.weight
    parts = []
    for part_LD, norm in zip(weight_LD.split(attention.latent_widths), attention.latent_norms, strict=True):
        if isinstance(norm, nn.LayerNorm):
            part_LD = part_LD - part_LD.mean(dim=0)
        parts.append(part_LD if isinstance(norm, nn.Identity) else norm.weight[:, None] * part_LD)
    return parts


def _leader(model: GPT, layer: int) -> int:
    """The layer whose latents a layer reads: its own, or the nearest one before it that caches any."""
    return layer - reads_back(model.attentions[layer])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


PROBE = Probe(
    measure_latents,
    latents_rows,
    "no latents in this variant",
    "Latents: how much of them is used",
    {
        "sampled_tokens": "tokens sampled",
        "width": "latent width",
        "effective_rank": "effective rank of latents",
        "key_effective_rank": "of key weights",
        "value_effective_rank": "of value weights",
        "rotated_share": "score variance of the rotated part",
    },
    through_cache=False,
)
