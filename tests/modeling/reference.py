"""Attention in float64 as docs/ATTENTION.md writes it, from a variant's options and weights: nothing of modeling/ is used.

Plain on purpose, a loop over heads. Every weight that is given must be one that the
equations name. Letters as in docs/ATTENTION.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Weights:
    """A state dict whose values are taken one by one: what is left over at the end is in no equation."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state, self._left = state, set(state)

    def take(self, name: str) -> Tensor:
        self._left.discard(name)
        return self._state[name].double()

    def linear(self, name: str, x: Tensor, *, bias: bool) -> Tensor:
        out = x @ self.take(f"{name}.weight").T
        return out + self.take(f"{name}.bias") if bias else out

    def norm(self, kind: str, name: str, x: Tensor, eps: float) -> Tensor:
        if kind == "none":
            return x
        if kind == "layer":
            x = x - x.mean(dim=-1, keepdim=True)
        x = x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * self.take(f"{name}.weight")
        return x + self.take(f"{name}.bias") if kind == "layer" else x

    def all_taken(self) -> None:
        assert not self._left, f"{sorted(self._left)} are in no equation"


def frequencies(width: int, theta: float, scaling: Mapping[str, Any] | None) -> list[float]:
    """phi_i / t of every pair i, stretched as RoPE's scalings say."""
    found = []
    for i in range(width // 2):
        plain = theta ** (-2 * i / width)
        kind = None if scaling is None else scaling["rope_type"]
        if scaling is None or kind is None:
            found.append(plain)
            continue
        slow = plain / scaling["factor"]
        if kind == "linear":
            found.append(slow)
            continue
        trained = scaling["original_max_position_embeddings"]
        if kind == "llama3":
            wavelength = 2 * math.pi / plain
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            if wavelength < trained / high:
                found.append(plain)
            elif wavelength > trained / low:
                found.append(slow)
            else:
                smooth = (trained / wavelength - low) / (high - low)
                found.append((1 - smooth) * slow + smooth * plain)
            continue
        # YaRN, arXiv 2309.00071: the pair that turns `beta` times within the context trained on, as a real number.
        first, last = (
            width * math.log(trained / (beta * 2 * math.pi)) / (2 * math.log(theta))
            for beta in (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1)
        )
        if scaling.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        if first == last:
            last += 0.001
        ramp = min(1.0, max(0.0, (i - first) / (last - first)))
        found.append(ramp * slow + (1 - ramp) * plain)
    return found


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def amplitude(scaling: Mapping[str, Any] | None) -> float:
    """What cosine and sine are multiplied by."""
    if scaling is None or scaling["rope_type"] != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor, one, every = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")
    return _mscale(factor, one) / _mscale(factor, every) if one and every else _mscale(factor, 1.0)


def deepseek_factor(scaling: Mapping[str, Any] | None) -> float:
    """What the scale is multiplied by under DeepSeek's YaRN."""
    every = None if scaling is None else scaling.get("mscale_all_dim")
    return 1.0 if scaling is None or not every else _mscale(scaling["factor"], every) ** 2


def rotate(x_BTHW: Tensor, phis: list[float], factor: float) -> Tensor:
    """Dimension i with i + W/2 by the angle t phi_i, t counted from 0."""
    angles_TF = torch.arange(x_BTHW.shape[1], dtype=torch.float64)[:, None] * torch.tensor(phis, dtype=torch.float64)
    cos_T1F, sin_T1F = factor * angles_TF.cos()[:, None], factor * angles_TF.sin()[:, None]
    a, b = x_BTHW[..., : len(phis)], x_BTHW[..., len(phis) :]
    return torch.cat([a * cos_T1F - b * sin_T1F, b * cos_T1F + a * sin_T1F], dim=-1)


def visible(T: int, *, causal: bool, window: int | None, sinks: int) -> Tensor:
    """(t, s): may the token at t see the one at s?"""
    rows = [[(s <= t or not causal) and (window is None or t - s < window or s < sinks) for s in range(T)] for t in range(T)]
    return torch.tensor(rows)


def within(seen_TS: Tensor, window: int | None) -> Tensor:
    """What a layer's own window leaves of that."""
    T = len(seen_TS)
    return seen_TS if window is None else seen_TS & torch.tensor([[t - s < window for s in range(T)] for t in range(T)])


def softmax_attention(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float, seen_TS: Tensor, sinks_H: Tensor | None = None
) -> Tensor:
    """[o_1 ... o_H], (B, T, H V): query head h reads key/value head h // (H / G). sinks_H: logits beside those of the keys."""
    H, G = q_BTHK.shape[2], k_BSGK.shape[2]
    heads = []
    for h in range(H):
        g = h // (H // G)
        logits_BTS = scale * q_BTHK[:, :, h] @ k_BSGK[:, :, g].transpose(1, 2)
        exps_BTS = (logits_BTS.masked_fill(~seen_TS, -math.inf) - logits_BTS.max()).exp()
        sink = 0.0 if sinks_H is None else (sinks_H[h] - logits_BTS.max()).exp()
        heads.append(exps_BTS / (exps_BTS.sum(dim=-1, keepdim=True) + sink) @ v_BSGV[:, :, g])
    return torch.cat(heads, dim=-1)


def gated(weights: Weights, options: Mapping[str, Any], heads: Tensor, x_BTD: Tensor, H: int, *, bias: bool) -> Tensor:
    """[o_1 ... o_H] times sigmoid(x W_G): a factor for each number, or for each head."""
    if options["gate"] == "none":
        return heads
    factors = 1 / (1 + (-weights.linear("gate_proj", x_BTD, bias=bias)).exp())
    return heads * (factors if options["gate"] == "element" else factors.repeat_interleave(heads.shape[-1] // H, dim=-1))


def grouped(
    options: Mapping[str, Any], sizes: Mapping[str, Any], state: Mapping[str, Tensor], x_BTD: Tensor, seen_TS: Tensor
) -> Tensor:
    """MHA, GQA, MQA and their controls. `options` as in the variant's YAML, `sizes` what the model owns."""
    weights, o, eps = Weights(state), options, sizes["norm_eps"]
    H, G, K, V, P = sizes["n_heads"], o["n_kv_heads"], o["head_dim"], o["v_head_dim"], o["qk_rope_head_dim"]
    on_inputs = sizes["bias"] or o["projection_bias"] in ("qkv", "all")
    if o["q_lora_rank"] is None:
        q_in = weights.linear("q_proj", x_BTD, bias=on_inputs)
    else:
        q_in = weights.norm("rms", "q_latent_norm", weights.linear("q_down_proj", x_BTD, bias=on_inputs), eps)
        q_in = weights.linear("q_up_proj", q_in, bias=False)
    q_BTHK = q_in.unflatten(-1, (H, K + P))
    k_BTGK = weights.linear("k_proj", x_BTD, bias=on_inputs).unflatten(-1, (G, K))
    v_BTGV = weights.linear("v_proj", x_BTD, bias=on_inputs).unflatten(-1, (G, V))
    q_own, q_rope = q_BTHK[..., :K], q_BTHK[..., K:]
    if o["qk_norm"]:
        q_own = weights.norm("rms", "q_norm", q_own, eps)
        k_BTGK = weights.norm("rms", "k_norm", k_BTGK, eps)
    scaling, theta = o["rope_scaling"], o["rope_theta"]
    if o["positions"] == "rope":
        p = round(K * o["rotary_fraction"])
        turned = frequencies(p, theta, scaling), amplitude(scaling)
        q_own, k_BTGK = (torch.cat([rotate(x[..., :p], *turned), x[..., p:]], dim=-1) for x in (q_own, k_BTGK))
    if o["positions"] == "decoupled":
        turned = frequencies(P, theta, scaling), amplitude(scaling)
        k_rope_BT1P = rotate(weights.linear("k_rope_proj", x_BTD, bias=on_inputs).unsqueeze(2), *turned)
        q_own = torch.cat([q_own, rotate(q_rope, *turned)], dim=-1)
        k_BTGK = torch.cat([k_BTGK, k_rope_BT1P.repeat(1, 1, G, 1)], dim=-1)
    sinks_H = weights.take("sink_logits") if o["sink_logits"] else None
    heads = softmax_attention(q_own, k_BTGK, v_BTGV, 1 / math.sqrt(K + P), within(seen_TS, o["window"]), sinks_H)
    on_output = sizes["bias"] or o["projection_bias"] == "all"
    out_BTD = weights.linear("o_proj", gated(weights, o, heads, x_BTD, H, bias=on_output), bias=on_output)
    weights.all_taken()
    return out_BTD


def tied(
    options: Mapping[str, Any], sizes: Mapping[str, Any], state: Mapping[str, Tensor], x_BTD: Tensor, seen_TS: Tensor
) -> Tensor:
    """Keys made of what is also the value."""
    weights, o, eps = Weights(state), options, sizes["norm_eps"]
    H, G, K, P = sizes["n_heads"], o["n_kv_heads"], o["head_dim"], o["qk_rope_head_dim"]
    phis = frequencies(P, o["rope_theta"], None)

    def turned(x: Tensor, sign: float = 1.0) -> Tensor:
        return torch.cat([x[..., : K - P], rotate(x[..., K - P :], [sign * phi for phi in phis], 1.0)], dim=-1)

    def unit(x: Tensor) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()

    q_BTHK = weights.linear("q_proj", x_BTD, bias=sizes["bias"]).unflatten(-1, (H, K))
    t_BSGK = weights.linear("kv_proj", x_BTD, bias=sizes["bias"]).unflatten(-1, (G, K))
    if o["keys"] == "joined":
        k_rope_BS1P = rotate(weights.linear("k_rope_proj", x_BTD, bias=sizes["bias"]).unsqueeze(2), phis, 1.0)
        k_own, q_own = t_BSGK[..., : K - P], q_BTHK[..., : K - P]
        if o["qk_norm"]:
            q_own, k_own = weights.norm("rms", "q_norm", q_own, eps), weights.norm("rms", "k_norm", k_own, eps)
        q_BTHK = torch.cat([q_own, q_BTHK[..., K - P :]], dim=-1)
        k_BSGK = torch.cat([k_own, k_rope_BS1P.repeat(1, 1, G, 1)], dim=-1)
        heads = softmax_attention(turned(q_BTHK), k_BSGK, t_BSGK, 1 / math.sqrt(K), seen_TS)
    elif o["keys"] == "turned":
        q_BTHK, v_BSGK = unit(q_BTHK) * weights.take("q_norm.weight"), unit(t_BSGK)
        k_BSGK = turned(v_BSGK * weights.take("k_gain"))
        heads = softmax_attention(turned(q_BTHK), k_BSGK, v_BSGK, 1.0, seen_TS)
    else:
        kv_BSGK = turned(unit(t_BSGK) * weights.take("kv_norm.weight"))
        heads = softmax_attention(turned(unit(q_BTHK)), kv_BSGK, kv_BSGK, 1 / math.sqrt(K), seen_TS)
        heads = turned(heads.unflatten(-1, (H, K)), -1.0).flatten(2)
    heads = gated(weights, o, heads, x_BTD, H, bias=sizes["bias"])
    out_BTD = weights.linear("o_proj", heads, bias=sizes["bias"])
    weights.all_taken()
    return out_BTD


def tensor_product(
    options: Mapping[str, Any], sizes: Mapping[str, Any], state: Mapping[str, Tensor], x_BTD: Tensor, seen_TS: Tensor
) -> Tensor:
    """Queries, keys and values of a token as means of outer products."""
    weights, o, H, K = Weights(state), options, sizes["n_heads"], options["head_dim"]
    phis = frequencies(K, o["rope_theta"], None)
    made = {}
    for name in ("q", "k", "v"):
        R = o[f"{name}_rank"]
        a_BTRH = weights.linear(f"{name}_a_proj", x_BTD, bias=sizes["bias"]).unflatten(-1, (R, H))
        b_BTRK = weights.linear(f"{name}_b_proj", x_BTD, bias=sizes["bias"]).unflatten(-1, (R, K))
        made[name] = sum(a_BTRH[..., r, :, None] * b_BTRK[..., r, None, :] for r in range(R)) / R
    if o["qk_norm"]:  # of the products, where the class norms a and b
        made |= {name: weights.norm("rms", f"{name}_norm", made[name], sizes["norm_eps"]) for name in ("q", "k")}
    q_BTHK, k_BSHK = (rotate(made[name], phis, 1.0) for name in ("q", "k"))  # the products, where the class turns b
    heads = softmax_attention(q_BTHK, k_BSHK, made["v"], 1 / math.sqrt(K), seen_TS)
    out_BTD = weights.linear("o_proj", gated(weights, o, heads, x_BTD, H, bias=sizes["bias"]), bias=sizes["bias"])
    weights.all_taken()
    return out_BTD


def latent(
    options: Mapping[str, Any],
    sizes: Mapping[str, Any],
    state: Mapping[str, Tensor],
    x_BTD: Tensor,
    seen_TS: Tensor,
    leader: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """MLA: (output, (latent, rotated key)). leader: those of the group's first layer, where this layer reads them."""
    weights, o, eps = Weights(state), options, sizes["norm_eps"]
    H, G, D = sizes["n_heads"], o["n_kv_heads"], sizes["d_model"]
    N, P, V, L, R = (o[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank"))
    bias = sizes["bias"] or o["projection_bias"] == "all"
    on_latent = o["latent_norm"] if o["latent_norm_place"] == "latent" else "none"
    on_heads = o["latent_norm"] if o["latent_norm_place"] == "up_projected" else "none"
    on_keys = "rms" if o["qk_norm"] else on_heads
    rotated = {"decoupled": P, "rope_after_up": N}.get(o["positions"], 0)
    turned: tuple[list[float], float] = ([], 1.0)
    if rotated and o["rope_frequencies"] == "stored":
        turned = weights.take("rope._extra_state").tolist(), 1.0
    elif rotated:
        turned = frequencies(rotated, o["rope_theta"], o["rope_scaling"]), amplitude(o["rope_scaling"])

    if o["fused_down_projections"]:
        first = H * (N + P) if R is None else R
        q_in, c_BTL, k_rope_BTP = weights.linear("in_proj", x_BTD, bias=bias).split([first, L, P], dim=-1)
    else:
        q_in = weights.linear("q_proj" if R is None else "q_down_proj", x_BTD, bias=bias)
        c_BTL, k_rope_BTP = x_BTD[..., :L], x_BTD[..., :0]
        if leader is None and o["latent"] != "slice":
            c_BTL = weights.linear("kv_down_proj", x_BTD, bias=bias and o["latent"] == "learned")
        if leader is None and P:
            k_rope_BTP = weights.linear("k_rope_proj", x_BTD, bias=bias)

    groups = o["latent_groups"]
    widths = [L // 2, L // 2] if o["kv_latent"] == "split" else [L // groups] * groups
    if leader is None:
        parts = [
            weights.norm(on_latent, f"latent_norms.{number}", part, eps)
            for number, part in enumerate(c_BTL.split(widths, dim=-1))
        ]
        c_BTL = torch.cat(parts, dim=-1) * (math.sqrt(D / widths[0]) if o["latent_scale"] else 1.0)
        cached = c_BTL, rotate(k_rope_BTP.unsqueeze(2), *turned) if P else None
    else:
        cached = leader
    c_BTL, k_rope_BT1P = cached
    c_keys, c_values = (c_BTL[..., : L // 2], c_BTL[..., L // 2 :]) if o["kv_latent"] == "split" else (c_BTL, c_BTL)

    if R is not None:
        q_in = weights.norm(on_latent, "q_latent_norm", q_in, eps) * (math.sqrt(D / R) if o["latent_scale"] else 1.0)
        q_in = weights.linear("q_up_proj", q_in, bias=False)
    q_BTHK = q_in.unflatten(-1, (H, N + P))
    q_own, q_rope = q_BTHK[..., :N], q_BTHK[..., N:]
    if R is not None or o["qk_norm"]:
        q_own = weights.norm(on_keys, "q_up_norm", q_own, eps)

    def raised(name: str, c_BSL: Tensor) -> Tensor:
        """Latent j through the j-th block of rows, for the j-th share of the heads."""
        blocks = weights.take(f"{name}.weight").chunk(groups)
        return torch.cat([c @ block.T for c, block in zip(c_BSL.chunk(groups, dim=-1), blocks, strict=True)], dim=-1)

    k_BSGK = raised("k_up_proj", c_keys).unflatten(-1, (G, N))
    v_BSGV = raised("v_up_proj", c_values).unflatten(-1, (G, V))
    k_BSGK = weights.norm(on_keys, "k_up_norm", k_BSGK, eps)
    v_BSGV = weights.norm(on_heads, "v_up_norm", v_BSGV, eps)
    if o["positions"] == "rope_after_up":
        q_own, k_BSGK = rotate(q_own, *turned), rotate(k_BSGK, *turned)
    if k_rope_BT1P is not None:
        q_own = torch.cat([q_own, rotate(q_rope, *turned)], dim=-1)
        k_BSGK = torch.cat([k_BSGK, k_rope_BT1P.repeat(1, 1, G, 1)], dim=-1)
    scale = deepseek_factor(o["rope_scaling"]) / math.sqrt(N + P)
    sinks_H = weights.take("sink_logits") if o["sink_logits"] else None
    heads = softmax_attention(q_own, k_BSGK, v_BSGV, scale, within(seen_TS, o["window"]), sinks_H)
    out_BTD = weights.linear("o_proj", gated(weights, o, heads, x_BTD, H, bias=bias), bias=bias)
    weights.all_taken()
    return out_BTD, cached
