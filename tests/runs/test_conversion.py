"""The stages of modeling/conversion: what is exact is exact at large logits, the rest loses what it must and no more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.attention.gqa import GroupedQueryAttention
from modeling.attention.layer_cache import new_cache
from modeling.attention.mla import MultiheadLatentAttention
from modeling.attention.rope import rope_frequencies, rotate, widened
from modeling.conversion import stages
from modeling.conversion.layers import GroupedLayer, LatentLayer, exact_state, grouped_layer, grouped_state, latent_state

OWNED: dict[str, Any] = {"max_seq_len": 64, "causal": True, "norm_eps": 1e-6, "rope_theta": 10000.0, "dropout": 0.0}
D, H, K, V = 48, 4, 8, 6


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch.set_default_dtype(torch.float32)


def gqa(n_kv_heads: int = 2, *, bias: bool = False, d_model: int = D, **changes: Any) -> GroupedQueryAttention:
    options: dict[str, Any] = {
        "head_dim": K,
        "v_head_dim": V,
        "qk_rope_head_dim": 0,
        "positions": "rope",
        "qk_norm": False,
        "n_kv_heads": n_kv_heads,
        "n_heads": H,
    } | changes
    module = GroupedQueryAttention(d_model=d_model, bias=bias, **options, **OWNED).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    return module


def attention_output(layer: LatentLayer, x_BTD: Tensor) -> Tensor:
    """What a layer computes, causally, from x_BTD to x_BTD: the formula, with no module between. S keys, C rotated pairs."""
    H, K, _ = layer.q_HKD.shape
    shared = H // layer.v_up_GVL.shape[0]
    q_BTHK = torch.einsum("btd,hkd->bthk", x_BTD, layer.q_HKD)
    if layer.q_bias_HK is not None:
        q_BTHK = q_BTHK + layer.q_bias_HK
    k_rope_BTP = x_BTD @ layer.k_rope_PD.T
    if layer.k_rope_bias_P is not None:
        k_rope_BTP = k_rope_BTP + layer.k_rope_bias_P
    T = x_BTD.shape[1]
    angle_TC = torch.arange(T, dtype=torch.float64, device=x_BTD.device)[:, None] * layer.frequencies_C
    tables = widened(angle_TC.cos()[None, :, None], angle_TC.sin()[None, :, None])
    q_rope_BTHP = torch.einsum("bthk,hpk->bthp", q_BTHK, layer.rope_up_GPK.repeat_interleave(shared, dim=0))
    q_rope_BTHP, k_rope_BTP = rotate(q_rope_BTHP, tables), rotate(k_rope_BTP.unsqueeze(2), tables).squeeze(2)
    latent_BTL = x_BTD @ layer.kv_down_LD.T
    k_BSHK = torch.einsum("bsl,hkl->bshk", latent_BTL, layer.k_up_GKL.repeat_interleave(shared, dim=0))
    v_BSHV = torch.einsum("bsl,hvl->bshv", latent_BTL, layer.v_up_GVL.repeat_interleave(shared, dim=0))
    logits_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK)
    logits_BHTS = (logits_BHTS + torch.einsum("bthp,bsp->bhts", q_rope_BTHP, k_rope_BTP)) / K**0.5
    future_TS = torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).triu(1)
    weights_BHTS = logits_BHTS.masked_fill(future_TS, float("-inf")).softmax(dim=-1)
    out_BTD = torch.einsum("bhts,bshv,dhv->btd", weights_BHTS, v_BSHV, layer.o_DHV)
    return out_BTD if layer.o_bias_D is None else out_BTD + layer.o_bias_D


def cache_elements(layer: LatentLayer) -> int:
    """Per token: L + P."""
    return layer.kv_down_LD.shape[0] + layer.k_rope_PD.shape[0]


def mla(options: dict[str, Any], state: dict[str, Tensor], *, bias: bool = False, d_model: int = D) -> Any:
    module = MultiheadLatentAttention(
        d_model=d_model,
        n_heads=H,
        bias=bias,
        q_lora_rank=None,
        latent_norm_place="latent",
        latent_scale=False,
        fused_down_projections=False,
        sharing="none",
        sharing_layers=1,
        **options,
        **OWNED,
    ).double()
    module.load_state_dict(state)
    return module


def inputs(tokens: int = 20, d_model: int = D) -> Tensor:
    return torch.randn(2, tokens, d_model)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def key_logits(module: GroupedQueryAttention, x_BTD: Tensor) -> float:
    q, k = module.q_proj(x_BTD).view(2, -1, H, K), module.k_proj(x_BTD).view(2, -1, module.n_kv_heads, K)
    return float((q[:, :, 0] @ k[:, :, 0].mT).abs().max() * module.scale)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_kv_heads", [1, 2])
def test_an_exact_conversion_computes_what_the_module_did(n_kv_heads: int, bias: bool) -> None:
    source, x_BTD = gqa(n_kv_heads, bias=bias), inputs()
    assert key_logits(source, x_BTD) > 100.0
    options, state = exact_state(grouped_layer(source))
    target = mla(options, state, bias=bias)
    assert apart(target(x_BTD), source(x_BTD)) < 1e-10
    assert target.cache_formula == source.cache_formula


def test_keys_and_values_wider_than_the_input_share_it_as_their_latent() -> None:
    source, x_BTD = gqa(4), inputs()
    target = mla(*exact_state(grouped_layer(source)))
    assert apart(target(x_BTD), source(x_BTD)) < 1e-10
    assert target.cache_formula == D < source.cache_formula


SCALINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("projection_bias", ["model", "qkv"])
def test_merged_heads_with_their_own_frequencies_run_in_the_mla_class_in_both_paths(projection_bias: str, scaling: str) -> None:
    source = gqa(2, projection_bias=projection_bias, rope_scaling=SCALINGS[scaling])
    x_BTD, merged = inputs(40), stages.merge(grouped_layer(source))
    options, state = latent_state(merged)
    target = mla(options, state)
    assert options["rope_frequencies"] == "stored" and target.cache_formula == source.cache_formula == 2 * (K + V)
    assert apart(target(x_BTD), source(x_BTD)) < 1e-10
    after_up = mla(*exact_state(grouped_layer(source)))
    assert apart(after_up(x_BTD), source(x_BTD)) < 1e-10
    for decode in ("expand", "absorbed"):
        target.decode = decode
        cache = new_cache(target, 2, 40, dtype=torch.float64, device="cpu")
        steps = [target(x_BTD[:, start : start + 8], cache) for start in range(0, 40, 8)]
        assert apart(torch.cat(steps, dim=1), source(x_BTD)) < 1e-10


def test_stored_frequencies_survive_a_cast_to_another_dtype() -> None:
    target = mla(*latent_state(stages.merge(grouped_layer(gqa(2)))))
    before = target.rope.frequencies_F.clone()
    assert torch.equal(target.to(torch.bfloat16).rope.frequencies_F, before)
    assert target.rope.cos_SF.dtype == torch.float32
    with pytest.raises(ValueError, match="were stored for a rotated width of 16"):
        target.rope.set_extra_state(before[:3])


def test_one_table_over_all_rotated_dimensions_changes_what_is_computed() -> None:
    source, x_BTD = gqa(2), inputs()
    extended = stages.extend_rope(stages.merge(grouped_layer(source)))
    options, state = latent_state(extended)
    assert options["rope_frequencies"] == "computed"
    assert apart(mla(options, state)(x_BTD), attention_output(extended, x_BTD)) < 1e-10
    assert apart(attention_output(extended, x_BTD), source(x_BTD)) > 0.05
    single = gqa(1)
    assert apart(attention_output(stages.extend_rope(stages.merge(grouped_layer(single))), x_BTD), single(x_BTD)) < 1e-10


@pytest.mark.parametrize("scaling", SCALINGS)
def test_merging_and_turning_keep_a_scaled_rotation(scaling: str) -> None:
    source, x_BTD = gqa(2, rope_scaling=SCALINGS[scaling]), inputs(40)
    turned = stages.rotate_heads(stages.merge(grouped_layer(source)), stages.weight_moments(D))
    assert apart(attention_output(turned, x_BTD), source(x_BTD)) < 1e-10


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_merging_and_turning_heads_change_no_output(n_kv_heads: int, bias: bool) -> None:
    source, x_BTD = gqa(n_kv_heads, bias=bias), inputs()
    merged = stages.merge(grouped_layer(source))
    turned = stages.rotate_heads(merged, stages.input_moments(inputs(200).flatten(0, 1)))
    assert apart(attention_output(merged, x_BTD), source(x_BTD)) < 1e-10
    assert apart(attention_output(turned, x_BTD), source(x_BTD)) < 1e-10
    assert n_kv_heads == 1 or apart(turned.k_rope_PD, merged.k_rope_PD) > 0.1


def test_turning_real_and_imaginary_parts_apart_would_change_outputs() -> None:
    source, x_BTD = gqa(2), inputs()
    turned = stages.rotate_heads(stages.merge(grouped_layer(source)), stages.weight_moments(D))
    half = K
    swapped = turned.k_rope_PD.clone()
    swapped[:half] = turned.k_rope_PD[:half].view(K // 2, 2, D).flip(1).reshape(half, D)
    assert apart(attention_output(replace(turned, k_rope_PD=swapped), x_BTD), source(x_BTD)) > 0.05


def test_the_first_turned_head_holds_the_most_energy_any_head_could() -> None:
    calibration = inputs(400).flatten(0, 1) * torch.linspace(0.1, 2.0, D)
    moments = stages.input_moments(calibration)
    merged = stages.merge(grouped_layer(gqa(4)))

    def first_head(layer: LatentLayer) -> Tensor:
        keys_TP = calibration @ layer.k_rope_PD.T
        return keys_TP.view(-1, 2, K // 2, 4).square().sum(dim=(0, 1))[:, 0]

    turned = stages.rotate_heads(merged, moments)
    whole = (calibration @ merged.k_rope_PD.T).view(-1, 2, K // 2, 4).square().sum(dim=(0, 1))
    assert bool((first_head(turned) >= whole.max(dim=1).values * (1 - 1e-12)).all())
    assert float((calibration @ turned.k_rope_PD.T).square().sum()) == pytest.approx(float(whole.sum()))


@pytest.mark.parametrize("bias", [False, True])
def test_one_key_head_keeps_all_its_rope_and_becomes_the_papers_mla_exactly(bias: bool) -> None:
    source, x_BTD = gqa(1, bias=bias), inputs()
    moments = stages.input_moments(inputs(200).flatten(0, 1))
    layer = stages.drop_rope(stages.rotate_heads(stages.merge(grouped_layer(source)), moments), K)
    target = mla(*latent_state(layer), bias=bias)
    assert apart(target(x_BTD), source(x_BTD)) < 1e-10
    assert target.cache_formula == cache_elements(layer) == K + V


@pytest.mark.parametrize(("fold", "width"), [(1, K), (2, K), (2, K // 2), (4, K // 4)])
def test_a_dropped_and_compressed_layer_runs_in_the_mla_class(fold: int, width: int) -> None:
    source, x_BTD = gqa(2, bias=True), inputs()
    moments = stages.input_moments(inputs(200).flatten(0, 1))
    dropped = stages.drop_rope(stages.rotate_heads(stages.merge(grouped_layer(source)), moments, fold=fold), width)
    compressed, _, _ = stages.low_rank(dropped, moments, 10)
    for layer in (dropped, compressed):
        target = mla(*latent_state(layer), bias=True)
        assert apart(target(x_BTD), attention_output(layer, x_BTD)) < 1e-10
        assert target.cache_formula == cache_elements(layer)
    assert "absorbed" in target.decode_paths


def test_keys_that_lie_in_one_head_lose_nothing_with_the_others_rope() -> None:
    source, x_BTD = gqa(2), inputs()
    with torch.no_grad():
        source.k_proj.weight[K:] = 0.7 * source.k_proj.weight[:K]
    merged, moments = stages.merge(grouped_layer(source)), stages.input_moments(inputs(200).flatten(0, 1))
    turned = stages.drop_rope(stages.rotate_heads(merged, moments), K)
    assert apart(mla(*latent_state(turned))(x_BTD), source(x_BTD)) < 1e-10
    assert apart(attention_output(stages.drop_rope(merged, K), x_BTD), source(x_BTD)) > 0.05


@pytest.mark.parametrize("balance", [False, True])
def test_full_rank_is_exact_and_keeps_all_energy(balance: bool) -> None:
    x_BTD, moments = inputs(), stages.input_moments(inputs(200).flatten(0, 1))
    dropped = stages.drop_rope(stages.rotate_heads(stages.merge(grouped_layer(gqa(4))), moments), K)
    rank = D  # keys and values are 48 wide after 8 stay rotated
    assert dropped.kv_down_LD.shape[0] == 4 * (K + V) - K == rank
    compressed, kept, _ = stages.low_rank(dropped, moments, rank, balance=balance)
    assert kept == pytest.approx(1.0)
    assert apart(attention_output(compressed, x_BTD), attention_output(dropped, x_BTD)) < 1e-10


def test_a_split_latent_runs_in_the_mla_class_and_is_exact_at_full_rank() -> None:
    x_BTD, moments = inputs(), stages.input_moments(inputs(400).flatten(0, 1))
    dropped = stages.drop_rope(stages.rotate_heads(stages.merge(grouped_layer(gqa(2, v_head_dim=K // 2))), moments), K)
    assert dropped.keys == K and dropped.kv_down_LD.shape[0] == 2 * K
    full, kept, _ = stages.low_rank(dropped, moments, 2 * K, split=True)
    assert kept == pytest.approx(1.0) and apart(attention_output(full, x_BTD), attention_output(dropped, x_BTD)) < 1e-10
    narrow, _, _ = stages.low_rank(dropped, moments, K, split=True)
    options, state = latent_state(narrow)
    assert options["kv_latent"] == "split" and state["k_up_proj.weight"].shape == (2 * K, K // 2)
    target = mla(options, state)
    assert apart(target(x_BTD), attention_output(narrow, x_BTD)) < 1e-10
    assert target.cache_formula == cache_elements(narrow) == K + K


def test_a_norm_with_the_latents_mean_size_as_its_gain_changes_little() -> None:
    x_BTD, moments = inputs(), stages.input_moments(inputs(400).flatten(0, 1))
    layer = stages.low_rank(
        stages.drop_rope(stages.rotate_heads(stages.merge(grouped_layer(gqa(2))), moments), K), moments, 16
    )[0]
    latents = inputs(400).flatten(0, 1) @ layer.kv_down_LD.T
    (gain,) = stages.latent_sizes(layer, moments)
    assert gain == pytest.approx(float(latents.square().mean().sqrt()), rel=0.1)
    options, _ = latent_state(layer, norm_gains=(gain,))
    assert options["latent_norm"] == "rms"
    near, far = (mla(*latent_state(layer, norm_gains=(size,)))(x_BTD) for size in (gain, 2 * gain))
    plain = attention_output(layer, x_BTD)
    assert float((near - plain).norm()) < 0.7 * float((far - plain).norm())


def test_each_half_of_a_split_latent_gets_its_own_size_back_from_its_norm() -> None:
    source, x_BTD = gqa(2, v_head_dim=K), inputs()
    with torch.no_grad():
        source.v_proj.weight *= 0.05
    moments = stages.input_moments(inputs(400).flatten(0, 1))
    dropped = stages.drop_rope(stages.rotate_heads(stages.merge(grouped_layer(source)), moments), K)
    layer, _, _ = stages.low_rank(dropped, moments, 16, split=True, balance=False)
    latents = inputs(400).flatten(0, 1) @ layer.kv_down_LD.T
    gains = stages.latent_sizes(layer, moments)
    for gain, half in zip(gains, latents.split(8, dim=1), strict=True):
        assert gain == pytest.approx(float(half.square().mean().sqrt()), rel=0.1)
    assert gains[0] > 10 * gains[1]
    one = float(latents.square().mean().sqrt())
    own, shared = (mla(*latent_state(layer, norm_gains=pair))(x_BTD) for pair in (gains, (one, one)))
    plain = attention_output(layer, x_BTD)
    assert apart(own, plain) < 1.0 < apart(shared, plain)


def test_principal_components_of_activations_keep_more_than_singular_vectors_of_weights() -> None:
    spread = torch.linspace(0.05, 3.0, D)
    moments, unseen = (stages.input_moments(inputs(2000).flatten(0, 1) * spread) for _ in range(2))
    dropped = stages.drop_rope(stages.rotate_heads(stages.merge(grouped_layer(gqa(2))), moments), K)
    _, kept, on_unseen = stages.low_rank(dropped, moments, 6, balance=False, held_out=unseen)
    _, _, of_weights = stages.low_rank(dropped, stages.weight_moments(D), 6, balance=False, held_out=unseen)
    assert on_unseen is not None and of_weights is not None
    assert of_weights < on_unseen < kept + 0.02
    ranks = [stages.low_rank(dropped, moments, rank)[1] for rank in (4, 8, 16)]
    assert ranks == sorted(ranks) and ranks[-1] < 1.0


def test_few_calibration_tokens_flatter_themselves_and_held_out_ones_tell() -> None:
    dropped = stages.drop_rope(stages.rotate_heads(stages.merge(grouped_layer(gqa(2))), stages.weight_moments(D)), K)
    unseen = stages.input_moments(inputs(2000).flatten(0, 1))
    gaps = []
    for tokens in (24, 2000):
        _, kept, on_unseen = stages.low_rank(dropped, stages.input_moments(torch.randn(tokens, D)), 6, held_out=unseen)
        assert on_unseen is not None
        gaps.append(kept - on_unseen)
    assert gaps[0] > 0.1 > 0.02 > abs(gaps[1])


def test_balance_keeps_small_values_that_large_keys_would_crowd_out() -> None:
    source = grouped_layer(gqa(2))
    moments = stages.input_moments(inputs(400).flatten(0, 1))
    merged = stages.merge(replace(source, v_GVD=0.01 * source.v_GVD))
    dropped = stages.drop_rope(stages.rotate_heads(merged, moments), K)

    def lost_values(balance: bool) -> float:
        layer = stages.low_rank(dropped, moments, 8, balance=balance)[0]
        values, whole = layer.v_up_GVL @ layer.kv_down_LD, dropped.v_up_GVL @ dropped.kv_down_LD
        return float((values - whole).norm() / whole.norm())

    assert lost_values(True) < 0.8 * lost_values(False)


def test_partial_rope_of_every_pair_changes_nothing_and_of_some_keeps_the_strongest() -> None:
    source, x_BTD = gqa(2, bias=True), inputs()
    moments, merged = stages.input_moments(inputs(200).flatten(0, 1)), stages.merge(grouped_layer(source))
    assert apart(attention_output(stages.keep_strongest_pairs(merged, moments, K), x_BTD), source(x_BTD)) < 1e-10

    layer = grouped_layer(gqa(2))
    k_GKD = layer.k_GKD.clone()
    k_GKD[0, [1, 5]] *= 100.0
    k_GKD[1, [3, 7]] *= 100.0
    some = stages.keep_strongest_pairs(stages.merge(replace(layer, k_GKD=k_GKD)), moments, 2)
    assert torch.equal(some.k_rope_PD, torch.stack((k_GKD[0, 1], k_GKD[1, 3], k_GKD[0, 5], k_GKD[1, 7])))
    assert cache_elements(stages.low_rank(some, stages.weight_moments(D), 10, balance=False)[0]) == 2 * 2 + 10
    target = mla(*latent_state(some))
    assert apart(target(x_BTD), attention_output(some, x_BTD)) < 1e-10


@pytest.mark.parametrize("side", ["queries", "keys", "both"])
def test_pairs_are_strong_by_the_product_of_both_norms(side: str) -> None:
    """Of four pairs a head one is chosen: weak keys of strong queries, strong keys of weak queries, or their product."""
    layer = grouped_layer(gqa(2))
    q_HFD, k_GFD = torch.randn(H, K // 2, D), torch.randn(2, K // 2, D)
    q_HFD, k_GFD = (x / x.norm(dim=-1, keepdim=True) for x in (q_HFD, k_GFD))
    queries = torch.tensor({"queries": [9.0, 1, 1, 1], "keys": [2.0, 1, 1, 1], "both": [8.0, 5, 1, 1]}[side])
    keys = torch.tensor({"queries": [1.0, 3, 1, 1], "keys": [1.0, 3, 1, 1], "both": [1.0, 4, 8, 1]}[side])
    chosen = {"queries": 0, "keys": 1, "both": 1}[side]  # 9 > 3, 2 < 3, 20 > 8
    q_HKD, k_GKD = ((strength[:, None] * x).repeat(1, 2, 1) for strength, x in ((queries, q_HFD), (keys, k_GFD)))
    some = stages.keep_strongest_pairs(stages.merge(replace(layer, q_HKD=q_HKD, k_GKD=k_GKD)), stages.weight_moments(D), 2)
    wanted = torch.stack([k_GKD[g, pair] for pair in (chosen, chosen + K // 2) for g in range(2)])
    assert torch.equal(some.k_rope_PD, wanted)
    assert torch.equal(some.frequencies_C, layer.frequencies_F[chosen].expand(2))


@pytest.mark.parametrize(("fold", "width"), [(1, K), (2, K), (2, K // 2), (4, K // 4)])
def test_the_pairs_that_stay_rotate_as_the_narrower_width_would(fold: int, width: int) -> None:
    layer = grouped_layer(gqa(2))
    kept = stages.drop_rope(stages.rotate_heads(stages.merge(layer), stages.weight_moments(D), fold=fold), width)
    assert torch.allclose(kept.frequencies_C, rope_frequencies(width, layer.theta), rtol=1e-12)
    assert latent_state(kept)[0]["rope_frequencies"] == "computed"
    scaled = grouped_layer(gqa(2, rope_scaling=SCALINGS["llama3"]))
    kept = stages.drop_rope(stages.rotate_heads(stages.merge(scaled), stages.weight_moments(D), fold=fold), width)
    assert torch.equal(kept.frequencies_C, scaled.frequencies_F[:: K // width])


@pytest.mark.parametrize("scaling", SCALINGS)
def test_mean_pooled_heads_are_exact_where_heads_were_equal(scaling: str) -> None:
    source, x_BTD = gqa(2, bias=True, rope_scaling=SCALINGS[scaling]), inputs()
    layer = grouped_layer(source)

    def doubled(heads: Tensor | None) -> Tensor | None:
        return None if heads is None else heads.repeat_interleave(2, dim=0)

    k_GKD, v_GVD = doubled(layer.k_GKD), doubled(layer.v_GVD)
    assert k_GKD is not None and v_GVD is not None
    wide: GroupedLayer = replace(
        layer, k_GKD=k_GKD, v_GVD=v_GVD, k_bias_GK=doubled(layer.k_bias_GK), v_bias_GV=doubled(layer.v_bias_GV)
    )
    target = gqa(2, bias=True, rope_scaling=SCALINGS[scaling])
    target.load_state_dict(grouped_state(stages.gqa_mean(wide, 2)))
    assert apart(target(x_BTD), source(x_BTD)) < 1e-10
    assert stages.pools_equal_heads(wide, stages.gqa_mean(wide, 2)) and stages.pools_equal_heads(layer, layer)
    assert not stages.pools_equal_heads(wide, stages.gqa_mean(wide, 1))
    mean = stages.gqa_mean(layer, 1)
    assert torch.allclose(mean.k_GKD[0], (layer.k_GKD[0] + layer.k_GKD[1]) / 2)


def test_a_latent_layer_exists_that_no_gqa_of_the_same_cache_can_express() -> None:
    # Un-rotated: the logits of head h are x B_h x with B_h = W_q,h^T W_k,h. All heads of a GQA stacked have rows in the
    # span of its G keys, G K dimensions; a latent of the same cache, 2 G K, lends each head other keys out of 2 G K.
    # Here heads 0 and 1 read one half of the latent, heads 2 and 3 the other.
    L = 2 * K
    q_HKD = torch.linalg.qr(torch.randn(D, H * K)).Q.T.view(H, K, D)
    down_LD = torch.linalg.qr(torch.randn(D, L)).Q.T
    up_HKL = torch.eye(L).view(2, K, L).repeat_interleave(H // 2, dim=0)
    latent = torch.einsum("hkd,hkl,le->hde", q_HKD, up_HKL, down_LD).reshape(H * D, D)
    source = gqa(1, v_head_dim=K, positions="none")
    assert source.cache_formula == L
    k_HKD = source.k_proj.weight.view(1, K, D).expand(H, K, D)
    grouped = torch.einsum("hkd,hke->hde", source.q_proj.weight.view(H, K, D), k_HKD).reshape(H * D, D)
    assert int(torch.linalg.matrix_rank(latent)) == L
    assert int(torch.linalg.matrix_rank(grouped)) == K
    # The nearest GQA is at best the nearest matrix of rank K, which misses half.
    energy = torch.linalg.svdvals(latent).square()
    assert float(energy[K:].sum() / energy.sum()) == pytest.approx(0.5)


def test_what_cannot_be_converted_is_refused_with_its_reason() -> None:
    with pytest.raises(ValueError, match="qk_norm=true normalises"):
        grouped_layer(gqa(2, qk_norm=True))
    with pytest.raises(ValueError, match="q_lora_rank=8 puts a norm between the two factors of the queries"):
        grouped_layer(gqa(2, q_lora_rank=8))
    with pytest.raises(ValueError, match="a gate between heads and o_proj has no place in a converted layer"):
        grouped_layer(gqa(2, gate="head"))
    with pytest.raises(ValueError, match="positions=learned leaves no rotation"):
        grouped_layer(gqa(2, positions="learned"))
    with pytest.raises(ValueError, match="56 biased key and value dimensions do not fit a latent of d_model=48"):
        exact_state(grouped_layer(gqa(4, bias=True)))
    layer = grouped_layer(gqa(2))
    moments, merged = stages.input_moments(inputs(200).flatten(0, 1)), stages.merge(layer)
    turned = stages.rotate_heads(merged, moments)
    with pytest.raises(ValueError, match="fold=3 does not divide the 4"):
        stages.rotate_heads(merged, moments, fold=3)
    with pytest.raises(ValueError, match="has not been turned"):
        stages.keep_strongest_pairs(turned, moments, 4)
    with pytest.raises(ValueError, match="a rotated width of 4 does not go with head_dim=8 and fold=1"):
        stages.drop_rope(turned, 4)
    dropped = stages.drop_rope(turned, K)
    with pytest.raises(ValueError, match="rank=21 does not fit a latent of 20"):
        stages.low_rank(dropped, moments, 21)
    with pytest.raises(ValueError, match="39 calibration tokens are too few for kv_lora_rank=10: take at least 40"):
        stages.low_rank(dropped, stages.input_moments(torch.randn(39, D)), 10)
    with pytest.raises(ValueError, match="rank=20 does not fit a latent of 20 made from d_model=48: choose 1 to 18, even"):
        stages.low_rank(replace(dropped, keys=9), moments, 20, split=True)
    with pytest.raises(ValueError, match="not one it has mixed"):
        stages.low_rank(stages.low_rank(dropped, moments, 10)[0], moments, 5)
    with pytest.raises(ValueError, match="2 key/value heads do not pool into n_kv_heads=3"):
        stages.gqa_mean(layer, 3)
