"""Attention modules and small GPTs built from the shipped YAMLs, and every knob that a variant offers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import yaml

from harness.config.build import build_layer, build_layers, build_model, layers_that_differ
from harness.config.compose import load_train_config, options_of
from harness.config.places import CONFIGS
from harness.config.schema import TrainConfig
from modeling.attention.contract import Variant
from modeling.gpt import GPT

SHIPPED = options_of("attention")

# They take another one's lines of code, with other sizes or weights that are not trained.
_ALIKE = {"mqa", "mha_wide", "mqa_wide", "gqa_partial", "swa_1_1", "mla_wide", "mla_frozen", "mla_slice"}
# For a test that is long for each: the README's command takes one of those that are alike, .ci/run all.
SHIPPED_BY_CODE = [pytest.param(name, marks=pytest.mark.slow) if name in _ALIKE else name for name in SHIPPED]

# Sizes at which every width is a different number, so that a mixed-up dimension cannot go unnoticed.
SIZES = [
    "model.d_model=48",
    "model.n_heads=4",
    "model.head_dim=12",
    "model.n_layers=2",
    "model.max_seq_len=64",
    "model.mlp_hidden=96",
]

# Contexts stretched from 16 positions, so that SIZES' are beyond them.
LLAMA3 = (
    "attention.rope_scaling={rope_type:llama3,factor:8.0,low_freq_factor:1.0,high_freq_factor:4.0,"
    "original_max_position_embeddings:16}"
)
YARN = "attention.rope_scaling={rope_type:yarn,factor:4.0,original_max_position_embeddings:16}"
DEEPSEEK_YARN = f"{YARN[:-1]},mscale:0.7,mscale_all_dim:0.9}}"

# name -> overrides; cached elements per token as written down here by hand for SIZES.
_KNOBS = {
    "mha, no positions": ("attention=mha attention.positions=none", 2 * 4 * 12),
    "gqa, learned positions": ("attention=gqa attention.positions=learned", 2 * 2 * 12),
    "gqa, QK-norm": ("attention=gqa attention.qk_norm=true", 2 * 2 * 12),
    "mha decoupled, QK-norm": ("attention=mha_decoupled attention.qk_norm=true", 2 * 4 * 12 + 6),
    "mha decoupled, grouped": ("attention=mha_decoupled attention.n_kv_heads=2", 2 * 2 * 12 + 6),
    "mha, narrow values": ("attention=mha attention.v_head_dim=7", 4 * (12 + 7)),
    "mha, wide values": ("attention=mha attention.v_head_dim=16", 4 * (12 + 16)),
    "mha, biases": ("attention=mha model.bias=true", 2 * 4 * 12),
    "gta, one group, a narrow rotated part, biases": (
        "attention=gta attention.n_kv_heads=1 attention.qk_rope_head_dim=4 model.bias=true",
        12 + 4,
    ),
    "gta, QK-norm": ("attention=gta attention.qk_norm=true", 2 * 12 + 6),
    "tied_kv, partly rotated, biases": ("attention=tied_kv attention.qk_rope_head_dim=4 model.bias=true", 2 * 12),
    "shared_kv, two vectors, all rotated": (
        "attention=shared_kv attention.n_kv_heads=2 attention.head_dim=12 attention.qk_rope_head_dim=12",
        2 * 12,
    ),
    "gqa, a gate for each head, biases": ("attention=gqa attention.gate=head model.bias=true", 2 * 2 * 12),
    "mfa, two groups, decoupled, QK-norm, biases": (
        "attention=mfa attention.n_kv_heads=2 attention.q_lora_rank=20 attention.positions=decoupled "
        "attention.qk_rope_head_dim=6 attention.qk_norm=true model.bias=true",
        2 * 2 * 24 + 6,
    ),
    "tpa, other ranks, gated, biases": (
        "attention=tpa attention.q_rank=3 attention.k_rank=1 attention.v_rank=3 attention.gate=head model.bias=true",
        (1 + 3) * (4 + 12),
    ),
    "tpa, QK-norm": ("attention=tpa attention.qk_norm=true", (2 + 2) * (4 + 12)),
    "mla, gated, unlike widths": ("attention=mla attention.gate=element attention.v_head_dim=14", 24 + 6),
    "tied_kv, a gate for each head": ("attention=tied_kv attention.gate=head", 2 * 12),
    "mla, query rank": ("attention=mla attention.q_lora_rank=20", 24 + 6),
    "mla, rank 10": ("attention=mla attention.kv_lora_rank=10", 10 + 6),
    "mla, head widths": (
        "attention=mla attention.qk_nope_head_dim=10 attention.qk_rope_head_dim=4 attention.v_head_dim=14",
        24 + 4,
    ),
    "mla, grouped up-projection": ("attention=mla attention.n_kv_heads=2", 24 + 6),
    "mla, split latent": ("attention=mla attention.kv_latent=split", 24 + 6),
    "gla, four latents, a query rank, fused": (
        "attention=gla attention.latent_groups=4 attention.kv_lora_rank=20 attention.q_lora_rank=20 "
        "attention.fused_down_projections=true",
        20 + 6,
    ),
    "gla, two heads out of two latents, rotation after up-projection": (
        "attention=gla attention.n_kv_heads=2 attention.positions=rope_after_up attention.qk_rope_head_dim=0",
        24,
    ),
    "mla, frozen latent, split, no norm": ("attention=mla_frozen attention.kv_latent=split attention.latent_norm=none", 24 + 6),
    "mla, slice with biases and a query rank": ("attention=mla_slice model.bias=true attention.q_lora_rank=20", 24 + 6),
    "mla, layer norm": ("attention=mla attention.latent_norm=layer", 24 + 6),
    "mla, no norm": ("attention=mla attention.latent_norm=none", 24 + 6),
    "mla, norm after up-projection": (
        "attention=mla attention.latent_norm_place=up_projected attention.q_lora_rank=20",
        24 + 6,
    ),
    "mla, sinks, grouped up-projection": ("attention=mla attention.sink_logits=true attention.n_kv_heads=2", 24 + 6),
    "mla, sinks, split latent": ("attention=mla attention.sink_logits=true attention.kv_latent=split", 24 + 6),
    "gla, sinks, four latents": ("attention=gla attention.sink_logits=true attention.latent_groups=4", 24 + 6),
    "mla, QK-norm": ("attention=mla attention.qk_norm=true", 24 + 6),
    "mla, QK-norm, a query rank, grouped up-projection, rotation after it": (
        "attention=mla_plain attention.qk_norm=true attention.q_lora_rank=20 attention.n_kv_heads=2 "
        "attention.positions=rope_after_up",
        24,
    ),
    "mla, latent scale": ("attention=mla attention.latent_scale=true attention.q_lora_rank=20", 24 + 6),
    "mla, no positions": ("attention=mla_plain attention.positions=none", 24),
    "mla, rotation after up-projection": ("attention=mla_plain attention.positions=rope_after_up", 24),
    "mla, fused down-projections": ("attention=mla attention.fused_down_projections=true", 24 + 6),
    "mla, fused with query rank": (
        "attention=mla attention.fused_down_projections=true attention.q_lora_rank=20 attention.kv_latent=split",
        24 + 6,
    ),
    "mla, biases": ("attention=mla model.bias=true", 24 + 6),
    "gqa, biases on queries, keys and values": ("attention=gqa attention.projection_bias=qkv", 2 * 2 * 12),
    "gqa, QK-norm and biases on all projections": (
        "attention=gqa attention.qk_norm=true attention.projection_bias=all",
        2 * 2 * 12,
    ),
    "gqa, linear scaling": ("attention=gqa attention.rope_scaling={rope_type:linear,factor:4.0}", 2 * 2 * 12),
    "gqa, Llama 3's scaling": (f"attention=gqa {LLAMA3}", 2 * 2 * 12),
    "mha decoupled, YaRN": (f"attention=mha_decoupled {YARN}", 2 * 4 * 12 + 6),
    "mla, biases on all projections": ("attention=mla attention.projection_bias=all", 24 + 6),
    "mla, YaRN with mscale_all_dim": (f"attention=mla {DEEPSEEK_YARN}", 24 + 6),
    "gqa, a window in blocks": ("attention=gqa attention.window=6", 2 * 2 * 12),
    "gqa, a window in uneven blocks": ("attention=gqa attention.window=7", 2 * 2 * 12),
    "gqa, a window by a mask": ("attention=gqa attention.window=16", 2 * 2 * 12),
    "mha decoupled, a window of 3": ("attention=mha_decoupled attention.window=3", 2 * 4 * 12 + 6),
    "mla, a window in blocks": ("attention=mla attention.window=6", 24 + 6),
    "mla, rotated after up, a window by a mask": (
        "attention=mla_plain attention.positions=rope_after_up attention.window=16",
        24,
    ),
    "gla, sinks, a window of 3": ("attention=gla attention.sink_logits=true attention.window=3", 24 + 6),
    "gqa, sinks": ("attention=gqa attention.sink_logits=true", 2 * 2 * 12),
    "mha, sinks, a window, narrow values, QK-norm": (
        "attention=mha attention.sink_logits=true attention.window=7 attention.v_head_dim=7 attention.qk_norm=true",
        4 * (12 + 7),
    ),
    "gdn alone, values shared out unevenly wide, biases": (
        "attention=gdn_3_1 attention.layers=[delta] attention.kinds.delta.n_k_heads=3 "
        "attention.kinds.delta.n_v_heads=9 attention.kinds.delta.v_head_dim=7 attention.kinds.delta.conv_width=2 "
        "model.bias=true",
        0,
    ),
    "mla, stored frequencies": ("attention=mla attention.rope_frequencies=stored", 24 + 6),
}
KNOBS = {name: (line.split(), elements) for name, (line, elements) in _KNOBS.items()}


@functools.cache
def config_at(*overrides: str) -> TrainConfig:
    """SIZES and these overrides, composed once (it takes half a second); not to be changed."""
    return load_train_config([*SIZES, *deep_enough(overrides), *overrides, "name=tested"])


def deep_enough(overrides: Sequence[str]) -> list[str]:
    """As many layers as a shipped pattern has, where that is more than SIZES'."""
    names = [override.partition("=")[2] for override in overrides if override.startswith("attention=")]
    layers = [yaml.safe_load((CONFIGS / "attention" / f"{name}.yaml").read_text()).get("layers", []) for name in names]
    return [f"model.n_layers={len(pattern)}" for pattern in layers if len(pattern) > 2]


def attention_from(overrides: list[str]) -> Variant:
    """The attention module alone, at SIZES unless the overrides say otherwise."""
    return build_layer(config_at(*overrides))


def attentions_from(overrides: list[str]) -> Variant:
    """The attention module alone, or where layers differ so many as hold all kinds."""
    config = config_at(*overrides)
    count = layers_that_differ(config)
    return build_layers(config, count) if count > 1 else build_layer(config)


def gpt_from(overrides: list[str], vocab_size: int = 100, **changes: Any) -> GPT:
    """A whole model at SIZES; `changes` replace constructor arguments."""
    return build_model(config_at(*overrides), vocab_size, **changes)
