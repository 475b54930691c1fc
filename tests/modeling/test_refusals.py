"""Sizes and choices that do not fit together are refused at construction, with the numbers and a remedy."""

from __future__ import annotations

import pytest

from harness.errors import UserError
from tests.support.variants import attention_from


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attention=gqa", "attention.n_kv_heads=3"], r"n_kv_heads=3 does not divide n_heads=4; choose one of \[1, 2, 4\]"),
        (["attention=mla", "attention.n_kv_heads=3"], r"n_kv_heads=3 does not divide n_heads=4"),
        (["attention=mha", "attention.positions=rotary"], r"positions=rotary is unknown here; choose rope, learned"),
        (["attention=mha", "attention.positions=decoupled"], r"does not go with qk_rope_head_dim=0"),
        (["attention=mha_decoupled", "attention.positions=rope"], r"does not go with qk_rope_head_dim=6"),
        (["attention=mha", "attention.head_dim=7"], r"rotated width of 7 cannot be paired"),
        (["attention=mla", "attention.qk_rope_head_dim=0"], r"positions=decoupled does not go with qk_rope_head_dim=0"),
        (["attention=gta", "attention.n_kv_heads=3"], r"n_kv_heads=3 does not divide n_heads=4; choose one of \[1, 2, 4\]"),
        (["attention=gta", "attention.qk_rope_head_dim=12"], r"qk_rope_head_dim=12 does not fit head_dim=12.*; 6 would fit"),
        (["attention=gta", "attention.qk_rope_head_dim=5"], r"rotated width of 5 cannot be paired"),
        (["attention=tied_kv", "attention.qk_rope_head_dim=14"], r"qk_rope_head_dim=14 does not fit head_dim=12.*at most the"),
        (["attention=shared_kv", "attention.qk_rope_head_dim=0"], r"qk_rope_head_dim=0 does not fit head_dim=24.*wider than 0"),
        (["attention=mfa", "attention.q_lora_rank=49"], r"q_lora_rank=49 compresses nothing.* from 48 to 96 .*at most 48"),
        (
            ["attention=tpa", "attention.k_rank=5"],
            r"k_rank=5 is no low rank: 4 heads of 12 are a matrix of rank 4 .*; choose 1 to 4",
        ),
        (
            ["attention=tpa", "attention.kernel=triton"],
            r"kernel=triton reads one latent .*; for tensor products use attention.ker",
        ),
        (["attention=tied_kv", "attention.qk_norm=true"], r"qk_norm=true does not go with keys=turned, which norms .*leave it"),
        (
            ["attention=mla", "attention.qk_norm=true", "attention.latent_norm_place=up_projected"],
            r"qk_norm=true norms the up-projected keys, which latent_norm_place=up_projected does already: choose one",
        ),
        (
            ["attention=mla", "attention.qk_norm=true", "attention.decode=absorbed"],
            r"decode=absorbed is not a path of this variant \(a norm or a rotation stands between .*; choose auto or expand",
        ),
        (["attention=gqa", "attention.gate=row"], r"gate=row is unknown here; choose none, element or head"),
        (["attention=gta", "attention.keys=own"], r"keys=own is unknown here; choose joined, turned or stored"),
        (["attention=mla_plain", "attention.qk_rope_head_dim=6"], r"positions=learned does not go with"),
        (["attention=mla", "attention.kv_lora_rank=49"], r"kv_lora_rank=49 compresses nothing.* is 48 wide; 24 would"),
        (["attention=mla", "attention.kv_lora_rank=25", "attention.kv_latent=split"], r"halves kv_lora_rank=25; .*24"),
        (
            ["attention=gla", "attention.kv_lora_rank=25"],
            r"latent_groups=2 does not divide n_kv_heads=4 and kv_lora_rank=25; .*\[1\]",
        ),
        (
            ["attention=gla", "attention.latent_groups=3"],
            r"latent_groups=3 does not divide n_kv_heads=4 .*; choose one of \[1, 2, 4\]",
        ),
        (["attention=gla", "attention.kv_latent=split"], r"kv_latent=split does not go with latent_groups=2"),
        (["attention=gla", "attention.kv_lora_rank=98"], r"kv_lora_rank=98 compresses nothing.* 2 heads of 12\+12\) is 48"),
        (["attention=mla", "attention.q_lora_rank=50"], r"q_lora_rank=50 compresses nothing.*at most 48"),
        (["attention=mla", "attention.latent_norm=batch"], r"latent_norm=batch is unknown here; choose rms, layer or none"),
        (["attention=mla", "attention.latent_norm_place=output"], r"latent_norm_place=output is unknown here"),
        (["attention=mla", "attention.latent=random"], r"latent=random is unknown here; choose learned, frozen or slice"),
        (["attention=mla_slice", "attention.fused_down_projections=true"], r"latent=slice has no learned down-projection"),
        (["attention=mla_frozen", "attention.sharing=weights", "attention.sharing_layers=2"], r"latent=frozen has no lear"),
        (
            ["attention=mla_slice", "attention.kv_latent=split", "attention.kv_lora_rank=50"],
            r"latent=slice takes kv_lora_rank=50 dimensions of x, which has d_model=48; choose at most 48",
        ),
        (["attention=mla", "attention.kv_latent=three"], r"kv_latent=three is unknown here; choose joint or split"),
        (["attention=mla", "attention.rope_theta=-1"], r"rope_theta=-1.0 must be positive"),
    ],
)
def test_refused_with_both_numbers_and_the_remedy(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        attention_from(overrides)


def test_a_cache_for_attention_that_is_not_causal_is_refused() -> None:
    import torch

    from modeling.attention.layer_cache import new_cache

    attention = attention_from(["attention=mha"])
    attention.causal = False
    with pytest.raises(ValueError, match="a cache needs causal attention"):
        new_cache(attention, 1, 4, dtype=torch.float32, device="cpu")


def test_attention_that_is_not_causal_sees_both_sides() -> None:
    import torch

    from modeling.attention.contract import randomise

    for variant in ("mha", "mla"):
        attention = randomise(attention_from([f"attention={variant}"])).eval()
        attention.causal = False
        x = torch.randn(1, 6, 48, generator=torch.Generator().manual_seed(0))
        changed = x.clone()
        changed[:, -1] += 1
        assert (attention(x)[:, 0] - attention(changed)[:, 0]).abs().max() > 1e-3
