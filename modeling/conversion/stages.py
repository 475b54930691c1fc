"""The steps from grouped-query to latent attention; what each keeps exactly is in its docstring.

TransMLA (arXiv 2502.07864): merge, rotate, drop_rope, low_rank. MHA2MLA (arXiv 2502.14837): merge, keep_strongest_pairs,
low_rank on `weight_moments`. Mean-pooled heads (arXiv 2305.13245, section 2.1): gqa_mean. Letters as in layers.py;
E = D + 1 counts x's dimensions and a constant 1, which stands for biases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modeling.attention.rope import rope_frequencies
from modeling.conversion.layers import GroupedLayer, LatentLayer
from modeling.refusal import Refusal


@dataclass(frozen=True)
class Moments:
    """Mean of [x; 1] [x; 1]^T over calibration tokens, x being what the layer's projections read; float64.

    The second moments of keys and values, before and after any stage, are products with it. tokens: how many it averages;
    None where it describes no data.
    """

    second_EE: Tensor
    tokens: int | None


def input_moments(x_TD: Tensor) -> Moments:
    """Moments of the tokens given. Batches of equal size may be averaged."""
    x_TE = torch.cat((x_TD.double(), x_TD.new_ones(len(x_TD), 1).double()), dim=1)
    return Moments(x_TE.T @ x_TE / len(x_TE), len(x_TE))


def weight_moments(d_model: int) -> Moments:
    """Moments of white inputs: principal components of activations become singular vectors of weights."""
    return Moments(torch.eye(d_model + 1, dtype=torch.float64), None)


def gqa_mean(layer: GroupedLayer, n_kv_heads: int) -> GroupedLayer:
    """Fewer key/value heads, each the mean of its neighbours. Exact only where these were equal."""
    G = layer.k_GKD.shape[0]
    if n_kv_heads < 1 or G % n_kv_heads:
        raise Refusal(f"{G} key/value heads do not pool into n_kv_heads={n_kv_heads}; choose a divisor of {G}")

    def pooled(heads: Tensor | None) -> Tensor | None:
        return None if heads is None else heads.unflatten(0, (n_kv_heads, G // n_kv_heads)).mean(dim=1)

    k_GKD, v_GVD = pooled(layer.k_GKD), pooled(layer.v_GVD)
    assert k_GKD is not None and v_GVD is not None
    k_bias_GK, v_bias_GV = pooled(layer.k_bias_GK), pooled(layer.v_bias_GV)
    return replace(layer, k_GKD=k_GKD, v_GVD=v_GVD, k_bias_GK=k_bias_GK, v_bias_GV=v_bias_GV)


def pools_equal_heads(layer: GroupedLayer, pooled: GroupedLayer) -> bool:
    """Whether each head of `layer` is, up to rounding, the mean that gqa_mean made of it and its neighbours."""
    pairs = (
        (layer.k_GKD, pooled.k_GKD),
        (layer.v_GVD, pooled.v_GVD),
        (layer.k_bias_GK, pooled.k_bias_GK),
        (layer.v_bias_GV, pooled.v_bias_GV),
    )
    return all(
        torch.allclose(mean.repeat_interleave(len(heads) // len(mean), dim=0), heads, rtol=1e-12, atol=0.0)
        for heads, mean in pairs
        if heads is not None and mean is not None
    )


def merge(layer: GroupedLayer) -> LatentLayer:
    """All heads' keys as one rotated key, frequency by frequency, and all values as one latent. Exact.

    Pair l * G + g is frequency l of head g. Values' biases go to the output's, for weights sum to 1.
    """
    layer = layer.with_plain_rotation()
    G, K, D = layer.k_GKD.shape
    V, F = layer.v_GVD.shape[1], K // 2
    place_GK = torch.arange(G * K).view(2, F, G).permute(2, 0, 1).reshape(G, K)
    rope_up_GPK = layer.q_HKD.new_zeros(G, G * K, K)
    for g in range(G):
        rope_up_GPK[g, place_GK[g], torch.arange(K)] = 1.0
    o_bias_D = layer.o_bias_D
    if layer.v_bias_GV is not None:
        shared = layer.q_HKD.shape[0] // G
        o_bias_D = (0.0 if o_bias_D is None else o_bias_D) + torch.einsum(
            "dhv,hv->d", layer.o_DHV, layer.v_bias_GV.repeat_interleave(shared, dim=0)
        )
    bias = layer.k_bias_GK
    return LatentLayer(
        q_HKD=layer.q_HKD,
        rope_up_GPK=rope_up_GPK,
        k_rope_PD=layer.k_GKD.unflatten(1, (2, F)).permute(1, 2, 0, 3).reshape(G * K, D),
        kv_down_LD=layer.v_GVD.flatten(0, 1),
        k_up_GKL=layer.q_HKD.new_zeros(G, K, G * V),
        v_up_GVL=torch.eye(G * V, dtype=layer.v_GVD.dtype, device=layer.v_GVD.device).view(G, V, G * V),
        o_DHV=layer.o_DHV,
        frequencies_C=layer.frequencies_F.repeat_interleave(G),
        theta=layer.theta,
        keys=0,
        q_bias_HK=layer.q_bias_HK,
        k_rope_bias_P=None if bias is None else bias.unflatten(1, (2, F)).permute(1, 2, 0).reshape(-1),
        o_bias_D=o_bias_D,
    )


def extend_rope(layer: LatentLayer) -> LatentLayer:
    """One table of frequencies over all rotated dimensions, theta^(-2i/P), in place of each head's own. Approximate.

    Neighbouring pairs of a merged layer are one frequency of its heads, and get neighbouring ones. Computed like any other
    MLA's, and what a stock DeepSeek model can hold.
    """
    P = layer.k_rope_PD.shape[0]
    return replace(layer, frequencies_C=rope_frequencies(P, layer.theta).to(layer.frequencies_C.device))


def rotate_heads(layer: LatentLayer, moments: Moments, *, fold: int = 1) -> LatentLayer:
    """RoRoPE: each frequency's pairs turned among heads so that the first hold most energy (TransMLA).

    One orthogonal matrix for real and imaginary parts commutes with the rotation: exact for fold=1. fold > 1 (FreqFold)
    mixes that many neighbouring frequencies too, as if they were equal: approximate. Takes what merge gives.
    Raises Refusal for a fold that does not divide the number of frequencies.
    """
    K, G = layer.q_HKD.shape[1], layer.v_up_GVL.shape[0]
    if layer.keys != 0 or layer.k_rope_PD.shape[0] != G * K or layer.fold:
        raise ValueError("rotate_heads takes a merged layer that has not been turned: all keys rotated, head by head")
    if fold < 1 or K // 2 % fold:
        raise Refusal(f"fold={fold} does not divide the {K // 2} frequencies of a head: choose a divisor")
    k_PE = _with_bias(layer)
    width = G * fold
    k_2MWE = k_PE.view(2, -1, width, k_PE.shape[1])
    energy_MWW = torch.einsum("zmwe,ef,zmuf->mwu", k_2MWE, moments.second_EE.to(k_PE.device), k_2MWE)
    # Ascending eigenvalues: the last columns are the principal ones.
    turn_MWW = torch.linalg.eigh(energy_MWW).eigenvectors.flip(-1).mT.to(layer.q_HKD.dtype)

    def turned(rows_PX: Tensor) -> Tensor:
        return torch.einsum("mwu,zmux->zmwx", turn_MWW, rows_PX.reshape(2, -1, width, rows_PX.shape[1])).reshape(rows_PX.shape)

    bias = layer.k_rope_bias_P
    return replace(
        layer,
        k_rope_PD=turned(layer.k_rope_PD),
        rope_up_GPK=torch.stack([turned(up_PK) for up_PK in layer.rope_up_GPK]),
        k_rope_bias_P=None if bias is None else turned(bias[:, None])[:, 0],
        fold=fold,
    )


def drop_rope(layer: LatentLayer, width: int) -> LatentLayer:
    """Rotation kept on `width` dimensions, the principal pairs of each block; the other keys join the latent un-rotated.

    The pairs that stay get every c-th frequency of the head's, c = K / width: theta^(-2i/width) where that had theta^(-2i/K).
    Exact for one head, fold=1 and width = K. Takes what rotate_heads gives, or merge (the first head stays).
    Raises Refusal where c or the fold do not divide.
    """
    K, G = layer.q_HKD.shape[1], layer.v_up_GVL.shape[0]
    fold = max(layer.fold, 1)
    if width < 2 or width % 2 or K % width or fold % (K // width):
        raise Refusal(
            f"a rotated width of {width} does not go with head_dim={K} and fold={fold}: it must be head_dim / c, even, "
            f"with c a divisor of fold"
        )
    if layer.keys != 0 or layer.k_rope_PD.shape[0] != G * K:
        raise ValueError("drop_rope takes a merged layer, all of whose keys are still rotated")
    kept = fold * width // K
    pairs_MW = torch.arange(G * K // 2, device=layer.q_HKD.device).view(-1, G * fold)
    return _keep_pairs(layer, pairs_MW[:, :kept].flatten(), layer.frequencies_C[:: G * K // width])


def keep_strongest_pairs(layer: LatentLayer, moments: Moments, width: int) -> LatentLayer:
    """MHA2MLA's partial RoPE: each key/value head keeps its width/2 pairs of largest query norm times key norm.

    Norms are root mean squares over the moments, summed over the queries of a group (the paper: means of products over
    tokens). Every head's key stays its own: the rotated part of the cache is G * width. Takes what merge gives; exact for
    width = K. Raises Refusal for a width that is not even or above K.
    """
    H, K, _ = layer.q_HKD.shape
    G = layer.v_up_GVL.shape[0]
    if width < 2 or width % 2 or width > K:
        raise Refusal(f"a rotated width of {width} a head must be even and at most head_dim={K}")
    if layer.keys != 0 or layer.k_rope_PD.shape[0] != G * K or layer.fold:
        raise ValueError("keep_strongest_pairs takes a merged layer that has not been turned: all keys rotated, head by head")
    bias_HK = layer.q_HKD.new_zeros(H, K) if layer.q_bias_HK is None else layer.q_bias_HK
    q_HKE = torch.cat((layer.q_HKD, bias_HK.unsqueeze(2)), dim=2).double()
    second_EE, k_PE = moments.second_EE.to(q_HKE.device), _with_bias(layer)
    q_HF = torch.einsum("hke,ef,hkf->hk", q_HKE, second_EE, q_HKE).view(H, 2, K // 2).sum(1).sqrt()
    k_FG = torch.einsum("pe,ef,pf->p", k_PE, second_EE, k_PE).view(2, K // 2, G).sum(0).sqrt()
    strength_FG = q_HF.unflatten(0, (G, H // G)).sum(1).T * k_FG
    rows_RG = strength_FG.topk(width // 2, dim=0).indices.sort(dim=0).values
    pairs = (rows_RG * G + torch.arange(G, device=rows_RG.device)).flatten()
    return _keep_pairs(layer, pairs, layer.frequencies_C[pairs])


def low_rank(
    layer: LatentLayer,
    moments: Moments,
    rank: int,
    *,
    balance: bool = True,
    split: bool = False,
    held_out: Moments | None = None,
) -> tuple[LatentLayer, float, float | None]:
    """(layer with a latent of `rank`, share of energy kept on the moments given, the same on held-out ones).

    Joint principal components of keys and values, uncentred; balance scales keys first so that both have the same energy
    (TransMLA does so by another ratio, MHA2MLA does not). split: those of keys and of values apart, half the rank for each.
    On `weight_moments` it is the singular value decomposition of the weights. Exact at full rank, which is at most D (split:
    of each half). Raises Refusal for ranks that compress nothing, and for fewer calibration tokens than four times the
    rank, which would be reconstructed however little was learned from them.
    """
    L, D = layer.kv_down_LD.shape
    if layer.keys is None:
        raise ValueError("low_rank takes a latent whose keys and values are still apart, not one it has mixed")
    widest = 2 * min(layer.keys, L - layer.keys, D) if split else min(L, D)
    if not 1 <= rank <= widest or (split and rank % 2):
        even = ", even" if split else ""
        raise Refusal(f"kv_lora_rank={rank} does not fit a latent of {L} made from d_model={D}: choose 1 to {widest}{even}")
    if moments.tokens is not None and moments.tokens < 4 * rank:
        raise Refusal(f"{moments.tokens} calibration tokens are too few for kv_lora_rank={rank}: take at least {4 * rank}")
    down_LD = layer.kv_down_LD.double()

    def energy(of: Moments) -> Tensor:
        return down_LD @ of.second_EE.to(down_LD.device)[:D, :D] @ down_LD.T

    energy_LL = energy(moments)
    power_L = energy_LL.diagonal()
    keys, values = float(power_L[: layer.keys].sum()), float(power_L[layer.keys :].sum())
    balance_L = torch.ones_like(power_L)
    if balance and keys > 0.0 and values > 0.0:
        balance_L[: layer.keys] = (values / keys) ** 0.5
    balanced_LL = balance_L[:, None] * energy_LL * balance_L
    if split:
        halves = [balanced_LL[: layer.keys, : layer.keys], balanced_LL[layer.keys :, layer.keys :]]
        basis_LR = torch.block_diag(*(_principal(half_LL, rank // 2) for half_LL in halves))
    else:
        basis_LR = _principal(balanced_LL, rank)

    def kept(energy_LL: Tensor) -> float:
        balanced_LL = balance_L[:, None] * energy_LL * balance_L
        return float((basis_LR.T @ balanced_LL @ basis_LR).trace() / balanced_LL.trace())

    dtype = layer.q_HKD.dtype
    up_LR = basis_LR / balance_L[:, None]
    compressed = replace(
        layer,
        kv_down_LD=(basis_LR.T @ (balance_L[:, None] * down_LD)).to(dtype),
        k_up_GKL=(layer.k_up_GKL.double() @ up_LR).to(dtype),
        v_up_GVL=(layer.v_up_GVL.double() @ up_LR).to(dtype),
        keys=rank // 2 if split else None,
    )
    return compressed, kept(energy_LL), None if held_out is None else kept(energy(held_out))


def latent_sizes(layer: LatentLayer, moments: Moments) -> tuple[float, ...]:
    """Root mean square over the moments of the elements of each part of a latent: the gains that an RMSNorm changes least by.

    A norm divides each half of a split latent by its own size, so each needs its own back.
    """
    down_LD = layer.kv_down_LD.double()
    second_DD = moments.second_EE.to(down_LD.device)[: down_LD.shape[1], : down_LD.shape[1]]
    power_L = torch.einsum("ld,de,le->l", down_LD, second_DD, down_LD)
    return tuple(float(part.mean()) ** 0.5 for part in power_L.split(layer.parts))


def _principal(energy_LL: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, as columns."""
    return torch.linalg.eigh(energy_LL).eigenvectors.flip(-1)[:, :rank]


def _keep_pairs(layer: LatentLayer, pairs: Tensor, frequencies_C: Tensor) -> LatentLayer:
    """Rotation kept on the pairs given; the others' keys go in front of the latent.

    Their biases vanish: a constant added to an un-rotated key adds the same to all logits of a query.
    """
    C = layer.k_rope_PD.shape[0] // 2
    dropped = torch.ones(C, dtype=torch.bool, device=pairs.device)
    dropped[pairs] = False
    rest = dropped.nonzero().flatten()
    stay, leave = torch.cat((pairs, pairs + C)), torch.cat((rest, rest + C))
    bias = layer.k_rope_bias_P
    v_up_GVL = layer.v_up_GVL
    return replace(
        layer,
        k_rope_PD=layer.k_rope_PD[stay],
        rope_up_GPK=layer.rope_up_GPK[:, stay],
        k_rope_bias_P=None if bias is None else bias[stay],
        kv_down_LD=torch.cat((layer.k_rope_PD[leave], layer.kv_down_LD)),
        k_up_GKL=torch.cat((layer.rope_up_GPK[:, leave].mT, layer.k_up_GKL), dim=2),
        v_up_GVL=torch.cat((v_up_GVL.new_zeros(*v_up_GVL.shape[:2], len(leave)), v_up_GVL), dim=2),
        frequencies_C=frequencies_C.to(layer.frequencies_C.device),
        keys=len(leave),
    )


def _with_bias(layer: LatentLayer) -> Tensor:
    """The rotated key's weights and bias side by side, float64."""
    bias = layer.k_rope_bias_P
    column = layer.k_rope_PD.new_zeros(len(layer.k_rope_PD)) if bias is None else bias
    return torch.cat((layer.k_rope_PD, column[:, None]), dim=1).double()
