"""One attention layer's weights in the two forms that a conversion goes between, and their way in and out of modules.

Letters: D d_model, H query heads, G key/value heads, K query/key width, V value width, P rotated width, C = P/2 rotated
pairs (dimension p is paired with p + C), L latent width, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modeling.attention.gqa import GroupedQueryAttention
from modeling.attention.rope import rope_frequencies
from modeling.refusal import Refusal


@dataclass(frozen=True)
class GroupedLayer:
    """GQA whose keys are rotated over all K dimensions with frequencies_F: theta^(-2i/K), or scaled ones.

    factor: of cosine and sine (YaRN's), so that logits have its square. The weights are the module's own, without it.
    Queries, keys and values all have biases or none has.
    """

    q_HKD: Tensor
    k_GKD: Tensor
    v_GVD: Tensor
    o_DHV: Tensor
    theta: float
    frequencies_F: Tensor
    factor: float = 1.0
    q_bias_HK: Tensor | None = None
    k_bias_GK: Tensor | None = None
    v_bias_GV: Tensor | None = None
    o_bias_D: Tensor | None = None

    def with_plain_rotation(self) -> GroupedLayer:
        """The same function with the factor's square in the queries: stored frequencies bring none."""
        both = self.factor**2
        bias = None if self.q_bias_HK is None else both * self.q_bias_HK
        return replace(self, q_HKD=both * self.q_HKD, q_bias_HK=bias, factor=1.0)


@dataclass(frozen=True)
class LatentLayer:
    """Latent attention with one rotated key of P dimensions for all heads, of whatever frequencies.

    Head h of group g, with q = W_q x + b_q: logit(i, j) = (q_i . k_up_g latent_j + rotate(rope_up_g q_i) . k_rope_j) / sqrt(K).
    keys is the number of leading latent dimensions that hold keys alone, None where keys and values are mixed.
    fold: how many neighbouring frequencies each turned block of pairs spans; 0 while no pair has been turned.
    """

    q_HKD: Tensor
    rope_up_GPK: Tensor
    k_rope_PD: Tensor
    kv_down_LD: Tensor
    k_up_GKL: Tensor
    v_up_GVL: Tensor
    o_DHV: Tensor
    frequencies_C: Tensor
    theta: float
    keys: int | None
    fold: int = 0
    q_bias_HK: Tensor | None = None
    k_rope_bias_P: Tensor | None = None
    o_bias_D: Tensor | None = None

    @property
    def parts(self) -> tuple[int, ...]:
        """Widths of the latents that the class norms apart: the halves where keys and values have one each, else L."""
        L = self.kv_down_LD.shape[0]
        return (L // 2, L // 2) if self.keys is not None and 2 * self.keys == L else (L,)


def grouped_layer(attention: GroupedQueryAttention) -> GroupedLayer:
    """The weights of a module.

    Raises Refusal where no stage is exact: QK-norm, a gate, a query rank, keys that are not rotated throughout.
    """
    if attention.q_norm is not None:
        raise Refusal(
            "qk_norm=true normalises keys after their projection, so that projections cannot be joined, pooled or compressed "
            "in their place: convert a model with qk_norm=false"
        )
    if attention.q_lora_rank is not None:
        raise Refusal(
            f"q_lora_rank={attention.q_lora_rank} puts a norm between the two factors of the queries, so that heads "
            f"cannot be turned in their projection: convert a model with q_lora_rank=null"
        )
    if attention.gate_proj is not None:
        raise Refusal("a gate between heads and o_proj has no place in a converted layer: convert a model with gate=none")
    if attention.positions != "rope" or attention.rope is None:
        raise Refusal(f"positions={attention.positions} leaves no rotation to convert; positions=rope is what converts")
    H, G, K, V = attention.n_heads, attention.n_kv_heads, attention.head_dim, attention.v_head_dim
    q, k, v, o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    biased, rope = q.bias is not None, attention.rope
    return GroupedLayer(
        q_HKD=q.weight.detach().unflatten(0, (H, K)),
        k_GKD=k.weight.detach().unflatten(0, (G, K)),
        v_GVD=v.weight.detach().unflatten(0, (G, V)),
        o_DHV=o.weight.detach().unflatten(1, (H, V)),
        theta=rope.theta,
        frequencies_F=rope.frequencies_F.to(q.weight.device),
        factor=rope.factor,
        q_bias_HK=q.bias.detach().view(H, K) if biased else None,
        k_bias_GK=k.bias.detach().view(G, K) if biased else None,
        v_bias_GV=v.bias.detach().view(G, V) if biased else None,
        o_bias_D=None if o.bias is None else o.bias.detach(),
    )


def grouped_state(layer: GroupedLayer) -> dict[str, Tensor]:
    """The state dict of a GroupedQueryAttention with the rotation that the layer was taken from."""
    state = {
        "q_proj.weight": layer.q_HKD.flatten(0, 1),
        "k_proj.weight": layer.k_GKD.flatten(0, 1),
        "v_proj.weight": layer.v_GVD.flatten(0, 1),
        "o_proj.weight": layer.o_DHV.flatten(1),
    }
    biases = {"q": layer.q_bias_HK, "k": layer.k_bias_GK, "v": layer.v_bias_GV, "o": layer.o_bias_D}
    return state | {f"{name}_proj.bias": bias.flatten() for name, bias in biases.items() if bias is not None}


def latent_state(
    layer: LatentLayer, *, norm_gains: Sequence[float] | None = None, stored: bool = False
) -> tuple[dict[str, int | str], dict[str, Tensor]]:
    """(options, state dict) of a MultiheadLatentAttention with positions=decoupled.

    Queries are multiplied by sqrt((K + P)/K), for that class divides logits by sqrt(K + P). norm_gains: of an RMSNorm on the
    latent, or on each of its two halves, the same for each dimension of it; None: no norm, as exactness wants. A latent whose
    keys and values are apart and equally wide becomes kv_latent=split (LatentLayer.parts). stored: the frequencies are stored
    even where they could be computed. The class refuses latents wider than x: low_rank to D loses nothing.
    Raises ValueError for a latent of no width.
    """
    H, K, _ = layer.q_HKD.shape
    G, V, L = layer.v_up_GVL.shape
    P = layer.k_rope_PD.shape[0]
    if L < 1:
        raise ValueError("the latent is 0 wide")
    split, share = len(layer.parts) == 2, layer.parts[0]
    scale = ((K + P) / K) ** 0.5
    rope_up_HPK = layer.rope_up_GPK.repeat_interleave(H // G, dim=0)
    state = {
        "q_proj.weight": scale * torch.cat((layer.q_HKD, rope_up_HPK @ layer.q_HKD), dim=1).flatten(0, 1),
        "kv_down_proj.weight": layer.kv_down_LD,
        "k_rope_proj.weight": layer.k_rope_PD,
        "k_up_proj.weight": layer.k_up_GKL[:, :, :share].flatten(0, 1),
        "v_up_proj.weight": layer.v_up_GVL[:, :, L - share :].flatten(0, 1),
        "o_proj.weight": layer.o_DHV.flatten(1),
    }
    biased = layer.q_bias_HK is not None or layer.o_bias_D is not None
    if biased:
        q_bias_HK = layer.q_HKD.new_zeros(H, K) if layer.q_bias_HK is None else layer.q_bias_HK
        rope_HP = torch.einsum("hpk,hk->hp", rope_up_HPK, q_bias_HK)
        state["q_proj.bias"] = scale * torch.cat((q_bias_HK, rope_HP), dim=1).flatten()
        state["kv_down_proj.bias"] = layer.kv_down_LD.new_zeros(L)
        state["k_rope_proj.bias"] = _or_zeros(layer.k_rope_bias_P, layer.k_rope_PD)
        state["o_proj.bias"] = _or_zeros(layer.o_bias_D, layer.o_DHV)
    if norm_gains is not None:
        for part, (width, gain) in enumerate(zip(layer.parts, norm_gains, strict=True)):
            state[f"latent_norms.{part}.weight"] = layer.kv_down_LD.new_full((width,), gain)
    options: dict[str, int | str] = {
        "n_kv_heads": G,
        "kv_lora_rank": L,
        "qk_nope_head_dim": K,
        "qk_rope_head_dim": P,
        "v_head_dim": V,
        "positions": "decoupled",
        "latent": "learned",
        "kv_latent": "split" if split else "joint",
        "latent_norm": "none" if norm_gains is None else "rms",
        "projection_bias": "all" if biased else "model",
        **_rotation(layer.frequencies_C, P, layer.theta, state, stored=stored),
    }
    return options, state


def _rotation(
    frequencies: Tensor, width: int, theta: float, state: dict[str, Tensor], *, stored: bool = False
) -> dict[str, str]:
    """The option that says where a module's frequencies come from; unusual ones go into its state."""
    computed = rope_frequencies(width, theta)
    if not stored and torch.allclose(frequencies.double().cpu(), computed, rtol=1e-12, atol=0.0):
        return {"rope_frequencies": "computed"}
    state["rope._extra_state"] = frequencies.double().cpu()
    return {"rope_frequencies": "stored"}


def _or_zeros(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(len(weight)) if bias is None else bias


def exact_state(layer: GroupedLayer) -> tuple[dict[str, int | str], dict[str, Tensor]]:
    """(options, state dict) of a MultiheadLatentAttention with positions=rope_after_up that equals the layer.

    The latent is keys and values one after the other, the up-projections select (TransMLA, arXiv 2502.07864):
    the same cache, a larger family to train on. Where keys and values are together wider than x, the latent is x itself,
    and narrower. Raises Refusal for biases in that case: no latent bias gives all of them.
    """
    layer = layer.with_plain_rotation()
    _, K, D = layer.q_HKD.shape
    G, V, _ = layer.v_GVD.shape
    kv_ED = torch.cat((layer.k_GKD.flatten(0, 1), layer.v_GVD.flatten(0, 1)))
    joined = kv_ED.shape[0] <= D
    if not joined and layer.k_bias_GK is not None:
        raise Refusal(
            f"{kv_ED.shape[0]} biased key and value dimensions do not fit a latent of d_model={D}, whose up-projections have "
            f"no bias: convert a model without biases, or with fewer key/value heads"
        )
    up_EL = torch.eye(kv_ED.shape[0], dtype=kv_ED.dtype, device=kv_ED.device) if joined else kv_ED
    down_LD = kv_ED if joined else torch.eye(D, dtype=kv_ED.dtype, device=kv_ED.device)
    state = {
        "q_proj.weight": layer.q_HKD.flatten(0, 1),
        "kv_down_proj.weight": down_LD,
        "k_up_proj.weight": up_EL[: G * K],
        "v_up_proj.weight": up_EL[G * K :],
        "o_proj.weight": layer.o_DHV.flatten(1),
    }
    if layer.q_bias_HK is not None and layer.k_bias_GK is not None and layer.v_bias_GV is not None:
        state["q_proj.bias"] = layer.q_bias_HK.flatten()
        state["kv_down_proj.bias"] = torch.cat((layer.k_bias_GK.flatten(), layer.v_bias_GV.flatten()))
        state["o_proj.bias"] = _or_zeros(layer.o_bias_D, layer.o_DHV)
    options: dict[str, int | str] = {
        "n_kv_heads": G,
        "kv_lora_rank": down_LD.shape[0],
        "qk_nope_head_dim": K,
        "qk_rope_head_dim": 0,
        "v_head_dim": V,
        "positions": "rope_after_up",
        "latent": "learned",
        "kv_latent": "joint",
        "latent_norm": "none",
        "projection_bias": "model" if layer.q_bias_HK is None else "all",
        **_rotation(layer.frequencies_F, K, layer.theta, state),
    }
    return options, state
