"""Parameters and FLOPs counted from the modules: equal to torch's counter, to hand-written formulas, to DeepSeek's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling.attention.gdn import GatedDeltaNet
from modeling.attention.gqa import GroupedQueryAttention
from modeling.attention.layer_cache import new_cache
from modeling.attention.mla import MultiheadLatentAttention
from modeling.flops import parameters_by_block, training_flops_per_token
from modeling.gpt import GPT
from tests.support.variants import KNOBS, SHIPPED, gpt_from

ROWS, TOKENS = 2, 24
D, H, d, F, LAYERS, PADDED, POSITIONS = 48, 4, 12, 96, 2, 128, 64  # SIZES
G, L, R, P = 2, 24, 20, 6  # gqa's groups, mla's rank, a query rank, the rotated part


def counted(model: GPT) -> int:
    """FLOPs of one forward and backward pass by torch's counter, on the backend it can see through."""
    model.set_execution(backend="reference")
    tokens = torch.randint(model.vocab_size, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    total: int = counter.get_total_flops()
    return total


@pytest.mark.parametrize(
    "overrides", [*([f"attention={name}"] for name in SHIPPED), *(k[0] for k in KNOBS.values())], ids=[*SHIPPED, *KNOBS]
)
def test_training_flops_are_torchs_count(overrides: list[str]) -> None:
    model = gpt_from(overrides)
    # The counter sees products over the whole square, of which a mask hides what is beyond a window.
    hidden = [max(0, TOKENS - (getattr(layer, "window", None) or TOKENS)) for layer in model.attentions]
    beyond = sum(
        3 * 2 * layer.n_heads * (layer.qk_width + layer.v_head_dim) * keys
        for layer, keys in zip(model.attentions, hidden, strict=True)
    )
    # It knows no triangular solve: one forward and one backward, each C (K + V) products a token and head. And in a sequence
    # of one chunk no gradient flows to the state before it (2 K V products) or from the one behind it (twice K V + K K +
    # K K V / C).
    unseen = 0
    for layer in model.attentions:
        if isinstance(layer, GatedDeltaNet):
            K, V = layer.qk_width, layer.v_head_dim
            unseen += 2 * layer.n_heads * (2 * TOKENS * (K + V) + 2 * K * V + 2 * (K * V + K * K + K * K * V // TOKENS))
    assert (training_flops_per_token(model, TOKENS) + beyond - unseen) * ROWS * TOKENS == counted(model)


def test_a_window_takes_the_flops_of_its_keys_alone() -> None:
    full, windowed = gpt_from(["attention=gqa"]), gpt_from(["attention=gqa", "attention.window=6"])
    saved = training_flops_per_token(full, TOKENS) - training_flops_per_token(windowed, TOKENS)
    assert saved == 12 * LAYERS * H * d * (TOKENS - 6)
    assert training_flops_per_token(windowed, 5) == training_flops_per_token(full, 5)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": False},
        {"mlp": "relu2"},
        {"bias": True},
        {"n_layers": 1},
        {"dropout": 0.1},
        {"zero_init_outputs": True},
    ],
    ids=str,
)
def test_training_flops_are_torchs_count_for_other_models(changes: dict[str, Any]) -> None:
    model = gpt_from(["attention=mla"], **changes)
    assert training_flops_per_token(model, TOKENS) * ROWS * TOKENS == counted(model)


def test_the_chunked_loss_takes_the_flops_of_the_whole_one() -> None:
    model = gpt_from(["attention=mla"])
    model.loss_chunk_tokens = 10
    assert training_flops_per_token(model, TOKENS) * ROWS * TOKENS == counted(model)


def test_recomputed_activations_are_not_counted_as_work() -> None:
    plain, checkpointed = gpt_from(["attention=mha"]), gpt_from(["attention=mha"], activation_checkpointing=True)
    assert training_flops_per_token(checkpointed, TOKENS) == training_flops_per_token(plain, TOKENS)
    assert counted(checkpointed) > counted(plain)


def test_flops_of_mha_are_the_formula_of_the_papers() -> None:
    """6 N + 12 L H Q T (PaLM, appendix B) with N the matrices' parameters and Q the head width."""
    matrices = LAYERS * (4 * D * H * d + 3 * D * F) + PADDED * D
    wanted = 6 * matrices + 12 * LAYERS * H * d * TOKENS
    assert training_flops_per_token(gpt_from(["attention=mha"]), TOKENS) == wanted


# Parameters of one attention layer by hand: queries, keys and values, output, then norms.
ATTENTION = {
    "mha": D * H * d + 2 * D * H * d + H * d * D,
    "gqa": D * H * d + 2 * D * G * d + H * d * D,
    "mqa": D * H * d + 2 * D * d + H * d * D,
    "gqa_gated": D * H * d + 2 * D * G * d + 2 * H * d * D,
    "mfa": D * 2 * d + 2 * d * H * 2 * d + 2 * D * 2 * d + H * 2 * d * D + 2 * d,
    "tpa": (4 + 2 + 2) * D * (H + d) + H * d * D,
    "gta": D * H * d + D * G * d + D * P + H * d * D,
    "tied_kv": D * H * d + D * G * d + H * d * D + 2 * d,
    "shared_kv": 2 * D * H * 2 * d + D * 2 * d + 2 * d,
    "mha_learned": 4 * D * H * d,
    "mha_wide": 2 * D * H * (d + P) + D * H * d + H * d * D,
    "mha_decoupled": D * H * (d + P) + 2 * D * H * d + D * P + H * d * D,
    "mla_plain": D * H * d + D * L + L * H * (d + d) + H * d * D + L,
    "mla": D * H * (d + P) + D * (L + P) + L * H * (d + d) + H * d * D + L,
    "mla_deepseek": D * L + L * H * (d + P) + D * (L + P) + L * H * (d + d) + H * d * D + 2 * L,  # R = L = D / 2
    "mla_wide": D * H * (2 * d + d) + D * (L + d) + L * H * (2 * d + 2 * d) + H * 2 * d * D + L,
    "gla": D * H * (d + P) + D * (L + P) + L // 2 * H * (d + d) + H * d * D + L,
    "mla_frozen": D * H * (d + P) + D * (L + P) + L * H * (d + d) + H * d * D + L,
    "mla_slice": D * H * (d + P) + D * P + L * H * (d + d) + H * d * D + L,
    "mla, query rank": D * R + R * H * (d + P) + D * (L + P) + L * H * (d + d) + H * d * D + L + R,
    "mla, grouped up-projection": D * H * (d + P) + D * (L + P) + L * G * (d + d) + H * d * D + L,
    "mla, split latent": D * H * (d + P) + D * (L + P) + L // 2 * H * (d + d) + H * d * D + L,
    "mla, layer norm": D * H * (d + P) + D * (L + P) + L * H * (d + d) + H * d * D + 2 * L,
    "mla, no norm": D * H * (d + P) + D * (L + P) + L * H * (d + d) + H * d * D,
    "mla, head widths": D * H * (10 + 4) + D * (L + 4) + L * H * (10 + 14) + H * 14 * D + L,
    "mla, biases": D * H * (d + P) + D * (L + P) + L * H * (d + d) + H * d * D + L + H * (d + P) + L + P + D,
    "gqa, a gate for each head, biases": D * H * d + 2 * D * G * d + H * d * D + D * H + H * d + 2 * G * d + D + H,
    "gqa, QK-norm": D * H * d + 2 * D * G * d + H * d * D + 2 * d,
}


@pytest.mark.parametrize("variant", ATTENTION)
def test_parameters_by_block_are_the_formulas(variant: str) -> None:
    overrides = KNOBS[variant][0] if variant in KNOBS else [f"attention={variant}"]
    bias = "model.bias=true" in overrides
    wanted = {
        "embedding": PADDED * D,
        "positions": POSITIONS * D if variant in ("mha_learned", "mla_plain") else 0,
        "attention": LAYERS * ATTENTION[variant],
        "mlp": LAYERS * (3 * D * F + (2 * F + D if bias else 0)),
        "norms": (2 * LAYERS + 1) * D,
        "head": 0,
    }
    model = gpt_from(overrides)
    assert parameters_by_block(model) == wanted | {"total": sum(wanted.values())}
    assert sum(p.numel() for p in model.parameters()) == sum(wanted.values())


def test_an_untied_head_and_a_plainer_mlp_are_counted_as_they_are() -> None:
    tied, other = gpt_from(["attention=mla"]), gpt_from(["attention=mla"], tie_embeddings=False, mlp="relu2")
    before, after = parameters_by_block(tied), parameters_by_block(other)
    assert (before["head"], after["head"]) == (0, PADDED * D)
    assert (before["mlp"], after["mlp"]) == (LAYERS * 3 * D * F, LAYERS * 2 * D * F)
    assert after["total"] - before["total"] == PADDED * D - LAYERS * D * F


# --- DeepSeek's shapes, on the meta device ---------------------------------------------------------------------------


def deepseek_mla(*, d_model: int, n_heads: int = 128) -> MultiheadLatentAttention:
    """DeepSeek-V2's and V3's attention layer; both have these widths."""
    with torch.device("meta"):
        return MultiheadLatentAttention(
            d_model=d_model,
            n_heads=n_heads,
            max_seq_len=8,
            causal=True,
            bias=False,
            norm_eps=1e-6,
            n_kv_heads=n_heads,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            latent="learned",
            kv_latent="joint",
            latent_norm="rms",
            latent_norm_place="latent",
            latent_scale=False,
            positions="decoupled",
            rope_theta=10000.0,
            fused_down_projections=False,
            sharing="none",
            sharing_layers=1,
            dropout=0.0,
        )


def test_a_layer_of_deepseek_v3_has_187_million_parameters() -> None:
    layer = deepseek_mla(d_model=7168)
    parameters = sum(p.numel() for p in layer.parameters())
    D, H, L, R, n, r, v = 7168, 128, 512, 1536, 128, 64, 128
    assert parameters == D * R + R * H * (n + r) + D * (L + r) + L * H * (n + v) + H * v * D + L + R
    assert round(parameters / 1e6, 1) == 187.1
    assert {p.device.type for p in layer.parameters()} == {"meta"}


def test_deepseek_v2_caches_576_elements_where_mha_caches_32768() -> None:
    mla = deepseek_mla(d_model=5120)
    with torch.device("meta"):
        mha = GroupedQueryAttention(
            d_model=5120,
            n_heads=128,
            max_seq_len=8,
            causal=True,
            bias=False,
            norm_eps=1e-6,
            n_kv_heads=128,
            head_dim=128,
            v_head_dim=128,
            qk_rope_head_dim=0,
            positions="rope",
            rope_theta=10000.0,
            qk_norm=False,
            dropout=0.0,
        )
    for layer, elements in ((mla, 576), (mha, 32768)):
        cache = new_cache(layer, 1, 4, dtype=torch.bfloat16, device="meta")
        assert cache.elements_per_token == layer.cache_formula == elements
        assert cache.bytes_per_token == 2 * elements
