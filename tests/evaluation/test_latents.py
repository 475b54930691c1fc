"""Latents: ranks that are known beforehand come out, and the parts of a score are those that attention adds up."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from harness.evaluation.probes.latents import (
    attention_inputs,
    effective_rank,
    latents_rows,
    measure_latents,
    product_singular_values,
    score_parts,
    score_variances,
    spectrum,
)
from modeling.attention.contract import randomise
from modeling.gpt import GPT
from tests.support.subjects import documents, subject_of
from tests.support.variants import gpt_from

END = 99
MLA = {
    "mla": ["attention=mla"],
    "shared latent": ["attention=mla_shared_latent"],
    "shared weights": ["attention=mla_shared_weights"],
    "plain": ["attention=mla_plain"],
    "rope after up": ["attention=mla_plain", "attention.positions=rope_after_up"],
    "split": ["attention=mla", "attention.kv_latent=split"],
    "grouped latents": ["attention=gla"],
    "split, fused, query rank": [
        "attention=mla",
        "attention.kv_latent=split",
        "attention.fused_down_projections=true",
        "attention.q_lora_rank=20",
    ],
    "fused": ["attention=mla", "attention.fused_down_projections=true"],
    "layer norm, scaled, grouped": [
        "attention=mla",
        "attention.latent_norm=layer",
        "attention.latent_scale=true",
        "attention.n_kv_heads=2",
    ],
    "norm after up": ["attention=mla", "attention.latent_norm_place=up_projected", "attention.q_lora_rank=20"],
    "biases": ["attention=mla", "model.bias=true"],
    "frozen": ["attention=mla_frozen"],
    "slice": ["attention=mla_slice"],
}
ROTATED = [name for name in MLA if name not in ("plain", "rope after up")]


def model_of(name: str) -> GPT:
    model: GPT = randomise(gpt_from(MLA[name], 100)).eval()
    return model


def measured(model: GPT, tokens: int = 700, **changes: Any) -> dict[str, Any]:
    split = documents(np.random.default_rng(0).integers(0, END, tokens), end_of_text=END)
    figures = measure_latents(subject_of(model, split, end_of_text=END, **changes))
    assert figures is not None
    return figures


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_effective_rank_is_the_number_of_equal_directions_and_the_entropys_exponential_between() -> None:
    assert effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0, 0.0])) == pytest.approx(3, rel=1e-12)
    assert effective_rank(torch.tensor([2.0])) == 1.0
    assert effective_rank(torch.zeros(4)) == 0.0
    # Squares 9 and 1: shares 0.9 and 0.1.
    expected = math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(30, 8, 20), (5, 8, 20), (30, 8, 6)])
def test_the_singular_values_of_a_product_are_those_of_the_product(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    M, L, D = shape
    up, down = torch.randn(M, L, dtype=torch.float64), torch.randn(L, D, dtype=torch.float64)
    found = product_singular_values(up, down)
    expected = torch.linalg.svdvals(up @ down)[: min(shape)]
    assert torch.allclose(found, expected, rtol=1e-10)
    assert spectrum(found)["singular_values"][0] == 1.0


@pytest.mark.parametrize("rank", [1, 3, 11])
@pytest.mark.parametrize("name", ["mla", "split", "fused", "layer norm, scaled, grouped"])
@torch.no_grad()
def test_weights_of_a_known_rank_have_that_effective_rank(name: str, rank: int) -> None:
    """Orthonormal rows: `rank` equal singular values, and the gains of the norms do not hide it where they are 1."""
    model = model_of(name)
    attention = model.attentions[1]
    share = attention.latent_widths[0]
    for up in (attention.k_up_proj.weight, attention.v_up_proj.weight):
        torch.nn.init.orthogonal_(up)  # (G N, share) with orthonormal columns
    down = torch.zeros(attention.kv_lora_rank, 48)
    for begin in range(0, attention.kv_lora_rank, share):
        columns = torch.linalg.qr(torch.randn(share, rank) - torch.randn(1, 1)).Q
        if name.startswith("layer norm"):
            columns = torch.linalg.qr(columns - columns.mean(dim=0)).Q  # LayerNorm takes the mean away
        down[begin : begin + share] = columns @ torch.linalg.qr(torch.randn(48, rank)).Q.T
    if attention.in_proj is not None:
        begin = attention.down_widths[0]
        attention.in_proj.weight[begin : begin + attention.kv_lora_rank] = down
    else:
        attention.kv_down_proj.weight.copy_(down)
    for norm in attention.latent_norms:
        norm.weight.fill_(1.0)
    layer = measured(model)["layers"][1]
    assert layer["keys"]["effective_rank"] == pytest.approx(rank, rel=1e-5)
    assert layer["values"]["effective_rank"] == pytest.approx(rank, rel=1e-5)
    assert sum(value > 1e-4 for value in layer["keys"]["singular_values"]) == rank


@torch.no_grad()
def test_with_a_latent_for_each_group_the_weights_are_those_of_all_heads_from_x() -> None:
    model = model_of("grouped latents")
    attention, found = model.attentions[1], measured(model)["layers"][1]
    gains_L = torch.cat([norm.weight for norm in attention.latent_norms])
    down_LD = (gains_L[:, None] * attention.kv_down_proj.weight).double()
    for part, up in (("keys", attention.k_up_proj), ("values", attention.v_up_proj)):
        halves = [w.double() @ down for w, down in zip(up.weight.chunk(2), down_LD.chunk(2), strict=True)]
        values = torch.linalg.svdvals(torch.cat(halves))[:24]
        assert found[part]["effective_rank"] == pytest.approx(effective_rank(values), rel=1e-6)
        assert found[part]["width"] == 24 and list(found["latents"]) == ["group 0", "group 1"]


@torch.no_grad()
def test_latents_confined_to_a_few_directions_have_no_higher_rank_and_a_constant_is_centred_away() -> None:
    model = model_of("biases")
    attention = model.attentions[0]
    attention.latent_norms[0] = torch.nn.Identity()
    attention.kv_down_proj.weight[5:] = 0
    attention.kv_down_proj.bias.fill_(100.0)
    part = measured(model)["layers"][0]["latents"]["joint"]
    assert 1 < part["effective_rank"] <= 5
    assert part["singular_values"][5:] == [pytest.approx(0, abs=1e-4)] * 11
    assert part["width"] == 24 and part["mean_share"] > 0.9


@pytest.mark.parametrize("name", MLA)
@torch.no_grad()
def test_the_spectrum_is_that_of_the_centred_latents_of_the_sample(name: str) -> None:
    """By the definition: the latents of each window alone, stacked and centred."""
    model = model_of(name)
    tokens = np.random.default_rng(0).integers(0, END, 2 * 64)
    split = documents(tokens[: 2 * 64 - 1], end_of_text=END)
    figures = measure_latents(subject_of(model, split, end_of_text=END))
    assert figures is not None and figures["sampled_tokens"] == 128
    stream = torch.tensor([END, *split.tokens.tolist()])[:128]
    rows: list[list[torch.Tensor]] = [[] for _ in model.attentions]
    for window in stream.view(2, 64):
        caches = model.new_cache(1, 64, dtype=torch.float32, device="cpu")
        model(window[None], caches)
        for layer, cache in enumerate(caches):
            rows[layer].append(cache.buffers["latent"][0] if "latent" in cache.buffers else rows[layer - 1][-1])
    for layer, entry in enumerate(figures["layers"]):
        latents_NL = torch.cat(rows[layer]).double()
        for part, found in zip(
            latents_NL.split(model.attentions[layer].latent_widths, dim=1), entry["latents"].values(), strict=True
        ):
            values = torch.linalg.svdvals(part - part.mean(dim=0))
            assert found["effective_rank"] == pytest.approx(effective_rank(values), rel=1e-4)
            assert found["singular_values"] == pytest.approx((values / values[0])[:16].tolist(), abs=1e-3)
            mean_share = part.mean(dim=0).square().sum() / part.square().sum(dim=1).mean()
            assert found["mean_share"] == pytest.approx(mean_share.item(), rel=1e-4)


def test_a_layer_that_reads_anothers_latents_is_described_by_those_and_by_its_own_up_projections() -> None:
    first, second = measured(model_of("shared latent"))["layers"]
    assert (first["latents_of"], second["latents_of"]) == (0, 0)
    assert first["latents"] == second["latents"]
    assert first["keys"] != second["keys"] and first["rotated_share"] != second["rotated_share"]
    first, second = measured(model_of("shared weights"))["layers"]
    assert (first["latents_of"], second["latents_of"]) == (0, 1)
    assert first["latents"] != second["latents"]


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROTATED)
@torch.no_grad()
def test_the_parts_of_a_score_sum_to_what_attention_takes_the_softmax_of(name: str) -> None:
    model = model_of(name)
    tokens_BT = torch.from_numpy(np.random.default_rng(0).integers(0, END, (2, 40)))
    weights: list[list[torch.Tensor]] = [[] for _ in model.attentions]
    model.set_execution(backend="reference")
    handles = [
        attention.register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: (args, kwargs | {"weights_out": weights[layer]}), with_kwargs=True
        )
        for layer, attention in enumerate(model.attentions)
    ]
    model(tokens_BT)
    for handle in handles:
        handle.remove()
    for layer, (q_BTX, latent_BSL, k_rope_BSP) in enumerate(attention_inputs(model, tokens_BT)):
        assert k_rope_BSP is not None
        for places in (torch.arange(40), torch.tensor([0, 7, 31])):
            parts = score_parts(model.attentions[layer], q_BTX, latent_BSL, k_rope_BSP, places)
            hidden = torch.arange(40) > places[:, None]
            found = (parts[0] + parts[1]).masked_fill(hidden, -math.inf).softmax(dim=-1)
            assert torch.allclose(found, weights[layer][0][:, :, places], atol=2e-5)
            assert min(part.std() for part in parts) > 0.05


@torch.no_grad()
def test_variances_are_taken_over_visible_keys_and_summed_over_queries_heads_and_windows() -> None:
    model = model_of("mla")
    attention = model.attentions[0]
    tokens_BT = torch.from_numpy(np.random.default_rng(0).integers(0, END, (2, 30)))
    q_BTX, latent_BSL, k_rope_BSP = next(iter(attention_inputs(model, tokens_BT)))
    assert k_rope_BSP is not None
    unrotated, rotated = score_parts(attention, q_BTX, latent_BSL, k_rope_BSP, torch.arange(30))
    expected = np.zeros(3)
    for b in range(2):
        for head in range(attention.n_heads):
            for query in range(30):
                pair = np.stack([part[b, head, query, : query + 1].double() for part in (unrotated, rotated)])
                matrix = np.cov(pair, bias=True)
                expected += [matrix[0, 0], matrix[1, 1], matrix[0, 1]]
    assert score_variances(attention, q_BTX, latent_BSL, k_rope_BSP).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ROTATED)
def test_the_shares_of_the_score_sum_to_one(name: str) -> None:
    for layer in measured(model_of(name))["layers"]:
        shares = [layer[f"{part}_share"] for part in ("rotated", "unrotated", "covariance")]
        assert sum(shares) == pytest.approx(1, rel=1e-9)
        assert min(shares[:2]) > 0


@torch.no_grad()
def test_without_a_rotated_key_the_rotated_share_is_zero_and_without_the_other_part_one() -> None:
    model = model_of("mla")
    model.attentions[0].k_rope_proj.weight.zero_()
    model.attentions[1].k_up_proj.weight.zero_()
    first, second = measured(model)["layers"]
    assert (first["rotated_share"], first["unrotated_share"]) == (0.0, 1.0)
    assert (second["rotated_share"], second["unrotated_share"]) == (1.0, 0.0)
    assert second["keys"]["effective_rank"] == 0.0


@pytest.mark.parametrize("name", ["plain", "rope after up"])
def test_a_variant_without_a_rotated_part_has_no_share(name: str) -> None:
    figures = measured(model_of(name))
    assert figures["rotated_share"] is None
    assert all(layer["rotated_share"] is None for layer in figures["layers"])
    ((_, value),) = latents_rows(figures)
    assert "rotated" not in value


# --- the rest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["mha", "mqa", "mha_decoupled"])
def test_a_model_without_latents_is_not_measured(variant: str) -> None:
    split = documents(range(90), end_of_text=END)
    model = gpt_from([f"attention={variant}"], 100).eval()
    assert measure_latents(subject_of(model, split, end_of_text=END)) is None


def test_measuring_leaves_nothing_in_the_model_and_keeps_to_the_budget() -> None:
    model = model_of("mla")
    figures = measured(model, tokens=5000, max_tokens=640)
    assert figures["sampled_tokens"] == 640
    assert figures == measured(model, tokens=5000, max_tokens=640)
    assert not any(module._forward_hooks for module in model.modules())
    assert measured(model, tokens=20_000)["sampled_tokens"] == 8192
    assert measured(model, tokens=10)["sampled_tokens"] == 11


def test_a_kernel_that_only_takes_16_bits_is_set_aside_for_the_measurement_and_put_back() -> None:
    model = model_of("mla")
    model.set_execution(backend="sdpa_cudnn")  # on a CPU it takes nothing at all
    assert measured(model)["effective_rank"] > 1
    assert {attention.backend for attention in model.attentions} == {"sdpa_cudnn"}
