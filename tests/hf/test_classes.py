"""Our models as transformers' classes: the same logits, the same text, or a refusal."""

from __future__ import annotations

import dataclasses
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.errors import UserError
from harness.hf.classes import (
    MODEL_TYPES,
    SINCE_5,
    as_own,
    as_transformers,
    difference,
    families,
    generate_with_theirs,
    load,
    misfits,
    save_theirs,
    their_cache_bytes,
)
from harness.hf.config_json import FAMILIES
from modeling.attention.contract import randomise, relative_error
from modeling.generation import generate
from tests.support import transformers4
from tests.support.variants import config_at, gpt_from

pytest.importorskip("transformers")

# Stretched from 16 positions: the tests go beyond them.
LINEAR = "attention.rope_scaling={rope_type:linear,factor:3.0}"
LLAMA3 = (
    "attention.rope_scaling={rope_type:llama3,factor:6.0,low_freq_factor:1.0,high_freq_factor:3.0,"
    "original_max_position_embeddings:16}"
)
YARN = "attention.rope_scaling={rope_type:yarn,factor:4.0,original_max_position_embeddings:16,beta_fast:8.0}"
DEEPSEEK_YARN = f"{YARN[:-1]},mscale:0.7,mscale_all_dim:1.5}}"
UNTRUNCATED_YARN = f"{YARN[:-1]},truncate:false,attention_factor:1.3}}"

_SAME = {
    "mha": "attention=mha",
    "gqa": "attention=gqa",
    "mqa": "attention=mqa",
    "mha, biases and another base": "attention=mha model.bias=true attention.rope_theta=500.0",
    "gqa, its own head": "attention=gqa model.tie_embeddings=false",
    "mla": "attention=mla",
    "mla, its own head": "attention=mla model.tie_embeddings=false",
    "mla_deepseek": "attention=mla_deepseek",
    "mla_wide": "attention=mla_wide",
    "mla, query rank": "attention=mla attention.q_lora_rank=20",
    "mla, unlike widths": "attention=mla attention.qk_nope_head_dim=10 attention.v_head_dim=14",
    "gqa, QK-norm, heads unlike d_model": "attention=gqa attention.qk_norm=true model.head_dim=16",
    "mha, heads of their own width": "attention=mha attention.head_dim=16 attention.v_head_dim=16",
    "gqa, large eps": "attention=gqa model.norm_eps=0.3",
    "mla, large eps": "attention=mla model.norm_eps=0.3 attention.q_lora_rank=20",
    "mla, another base": "attention=mla attention.rope_theta=500.0",
    "mla, latent scale": "attention=mla attention.latent_scale=true attention.q_lora_rank=20",
    "mla, grouped up-projection": "attention=mla attention.n_kv_heads=2",
    "mla, fused": "attention=mla attention.fused_down_projections=true",
    "mla, fused with query rank": "attention=mla attention.fused_down_projections=true attention.q_lora_rank=20",
    "mla, shared weights": "attention=mla_shared_weights",
    "mla, frozen": "attention=mla_frozen",
    "mla, slice": "attention=mla_slice model.norm_eps=0.3",
    "gqa, biases on queries, keys and values": "attention=gqa attention.projection_bias=qkv",
    "gqa, such biases, heads unlike d_model": "attention=gqa attention.projection_bias=qkv model.head_dim=16 "
    "model.tie_embeddings=false",
    "gqa, biases everywhere, qkv asked for": "attention=gqa attention.projection_bias=qkv model.bias=true",
    "mha, biases on all projections": "attention=mha attention.projection_bias=all",
    "gqa, QK-norm, biases on all projections": "attention=gqa attention.qk_norm=true attention.projection_bias=all",
    "gqa, QK-norm, no bias on the output": "attention=gqa attention.qk_norm=true attention.projection_bias=qkv",
    "mla, biases on all projections": "attention=mla attention.q_lora_rank=20 attention.projection_bias=all",
    "mla, biases and large eps": "attention=mla attention.q_lora_rank=20 attention.projection_bias=all model.norm_eps=0.3 "
    "attention.latent_scale=true",
    "mla, biases, fused": "attention=mla attention.q_lora_rank=20 attention.projection_bias=all "
    "attention.fused_down_projections=true",
    "mla, biases, slice": "attention=mla_slice attention.q_lora_rank=20 attention.projection_bias=all",
    "mla, biases, frozen": "attention=mla_frozen attention.q_lora_rank=20 attention.projection_bias=all",
    "gqa, linear scaling": f"attention=gqa {LINEAR}",
    "gqa, llama3 scaling": f"attention=gqa {LLAMA3}",
    "gqa, biases and llama3 scaling": f"attention=gqa attention.projection_bias=qkv {LLAMA3}",
    "gqa, YaRN": f"attention=gqa {YARN}",
    "gqa, QK-norm, YaRN with mscale": f"attention=gqa attention.qk_norm=true {DEEPSEEK_YARN}",
    "gqa, YaRN untruncated": f"attention=gqa {UNTRUNCATED_YARN} attention.rope_theta=500.0",
    "mla, linear scaling": f"attention=mla {LINEAR}",
    "mla, llama3 scaling": f"attention=mla {LLAMA3}",
    "mla, YaRN": f"attention=mla {YARN}",
    "mla, YaRN with mscale": f"attention=mla {DEEPSEEK_YARN} attention.q_lora_rank=20",
    "mla, YaRN untruncated": f"attention=mla {UNTRUNCATED_YARN}",
    "windows in every second layer": "attention=swa_1_1",
    "windows in three layers of four, QK-norm, biases": "attention=swa_3_1 attention.qk_norm=true "
    "attention.projection_bias=all",
    "windows in all layers": "attention=gqa attention.window=7 model.head_dim=16",
    "windows in all layers, QK-norm": "attention=gqa attention.window=7 attention.qk_norm=true",
    "windows in the last layer, biases": "attention=swa_1_1 attention.layers=[full,local] attention.kinds.local.window=5 "
    "attention.projection_bias=qkv",
    "partial": "attention=gqa_partial",
    "partial, its own head, wide heads": "attention=gqa_partial attention.rotary_fraction=0.25 model.head_dim=16 "
    "model.tie_embeddings=false attention.rope_theta=500.0 model.norm_eps=0.3",
    "partial, mha, windows in all layers, a wider vocabulary": "attention=gqa_partial attention.n_kv_heads=4 "
    "attention.window=7 model.vocab_size=130",
    "gated, QK-norm": "attention=gqa_gated attention.qk_norm=true model.norm_eps=0.3",
    "gated, QK-norm, partial, biases on all projections, its own head": "attention=gqa_gated attention.qk_norm=true "
    "attention.rotary_fraction=0.5 attention.projection_bias=all model.head_dim=16 model.tie_embeddings=false",
    "gated, QK-norm, no bias on gate and output, partial, YaRN": "attention=gqa_gated attention.qk_norm=true "
    f"attention.projection_bias=qkv attention.rotary_fraction=0.5 {YARN}",
    "gated DeltaNet in three layers of four": "attention=gdn_3_1 attention.gate=element attention.qk_norm=true",
    "gated DeltaNet behind a full layer, unlike widths, biases in the full one, partial, large eps, its own head": (
        "attention=gdn_3_1 attention.gate=element attention.qk_norm=true attention.layers=[full,delta] "
        "attention.kinds.delta.n_v_heads=12 attention.kinds.delta.head_dim=10 attention.kinds.delta.v_head_dim=7 "
        "attention.kinds.delta.conv_width=2 attention.rotary_fraction=0.5 attention.projection_bias=all model.head_dim=16 "
        "model.norm_eps=0.3 model.tie_embeddings=false"
    ),
    "gqa, a wider vocabulary": "attention=gqa model.vocab_size=130",
    "mla, a wider vocabulary, its own head": "attention=mla model.vocab_size=130 model.tie_embeddings=false",
}
DELTA = ["attention=gdn_3_1", "attention.gate=element", "attention.qk_norm=true"]
SAME = {name: line.split() for name, line in _SAME.items()}


def architecture(family: str) -> str | None:
    return FAMILIES[MODEL_TYPES[family]].architecture


def test_biases_on_queries_keys_and_values_fit_llama_too() -> None:
    models = [overrides for overrides in SAME.values() if families(config_at(*overrides)) == ["Qwen2", "Llama"]]
    assert len(models) == 3
    for overrides in models:
        model = randomise(gpt_from(overrides)).eval()
        theirs = as_transformers(model, config_at(*overrides), "Llama")
        assert type(theirs).__name__ == "LlamaForCausalLM"
        assert theirs.model.layers[0].self_attn.q_proj.bias.abs().max() > 0
        assert theirs.model.layers[0].self_attn.o_proj.bias.abs().max() == 0
        assert difference(model, theirs) < 1e-4


@pytest.mark.parametrize("overrides", SAME.values(), ids=SAME)
def test_logits_agree_where_they_are_large(overrides: list[str]) -> None:
    model = randomise(gpt_from(overrides)).eval()
    theirs = as_transformers(model, config_at(*overrides))
    tokens_BT = torch.randint(model.vocab_size, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours_BTC, theirs_BTC = model(tokens_BT), theirs(input_ids=tokens_BT).logits
    assert model.vocab_size == (130 if "model.vocab_size=130" in overrides else 100)
    assert theirs_BTC.shape[-1] == model.vocab_size < ours_BTC.shape[-1] and theirs_BTC.std() > 1
    assert relative_error(ours_BTC[..., : model.vocab_size], theirs_BTC) < 1e-4
    assert difference(model, theirs) < 1e-4


def test_a_wrong_weight_is_a_difference() -> None:
    model = randomise(gpt_from(["attention=mla"])).eval()
    theirs = as_transformers(model, config_at("attention=mla"))
    with torch.no_grad():
        theirs.model.layers[1].self_attn.kv_b_proj.weight.mul_(1.01)
    assert difference(model, theirs) > 1e-4


def test_a_state_that_is_lost_between_chunks_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3_5 import modeling_qwen3_5

    overrides = [*DELTA, "model.max_seq_len=150"]
    model = randomise(gpt_from(overrides)).eval()
    theirs, rule = as_transformers(model, config_at(*overrides)), modeling_qwen3_5.torch_chunk_gated_delta_rule
    assert difference(model, theirs) < 1e-4

    def forgetful(*args: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """All but those in kwargs are (B, T, ...)."""
        chunks = zip(*(x_BT.split(64, dim=1) for x_BT in (*args, g, beta)), strict=True)
        outs, states = zip(*(rule(*qkv, g=g, beta=beta, **kwargs) for *qkv, g, beta in chunks), strict=True)
        return torch.cat(outs, dim=1), states[-1]

    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", forgetful)
    assert difference(model, theirs) > 1e-2


def test_the_last_position_is_compared() -> None:
    overrides = ["attention=mha_learned", "model.max_seq_len=150"]
    model = randomise(gpt_from(overrides)).eval()
    theirs = as_own(deepcopy(model), config_at(*overrides))
    assert difference(model, theirs) < 1e-6
    with torch.no_grad():
        theirs.model.position_embedding.weight[-1] += 1
    assert difference(model, theirs) > 1e-3


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_another_pairing_of_rotated_dimensions_is_a_difference(attention: str) -> None:
    model = randomise(gpt_from([f"attention={attention}"])).eval()
    theirs = as_transformers(model, config_at(f"attention={attention}"))
    with torch.no_grad():
        for layer in theirs.model.layers:  # the same order in queries and keys
            if attention == "gqa":
                for weight in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
                    heads = weight.unflatten(0, (-1, 12))
                    weight.copy_(torch.cat([heads[:, ::2], heads[:, 1::2]], dim=1).flatten(0, 1))
            else:
                heads, key = (layer.self_attn.q_proj.weight.unflatten(0, (4, 18)), layer.self_attn.kv_a_proj_with_mqa.weight)
                for rotated in (heads[:, 12:], key[None, 24:]):
                    rotated.copy_(torch.cat([rotated[:, ::2], rotated[:, 1::2]], dim=1))
    assert difference(model, theirs) > 1e-2


@pytest.mark.parametrize(
    ("overrides", "classes"),
    [
        (["attention=swa_3_1"], ("Ministral", "Qwen2")),
        (["attention=swa_3_1", "attention.kinds.local.window=40"], ("Ministral", "Qwen2")),
        (["attention=gqa", "attention.window=16"], ("Mistral", "Qwen2")),
        (["attention=swa_3_1", "attention.projection_bias=qkv"], ("Qwen2",)),
        (["attention=swa_3_1", "attention.qk_norm=true", "attention.projection_bias=qkv"], ("Qwen3",)),
    ],
)
def test_windows_are_those_of_each_class_that_has_them(overrides: list[str], classes: tuple[str, ...]) -> None:
    config, model = config_at(*overrides), randomise(gpt_from(overrides)).eval()
    assert families(config) == [*classes]
    for family in classes:
        theirs = as_transformers(model, config, family)
        assert type(theirs).__name__ == architecture(family) and difference(model, theirs) < 1e-4
        wider = as_transformers(model, config, family)
        wider.config.sliding_window += 1
        for layer in wider.model.layers:
            if getattr(layer.self_attn, "sliding_window", None):
                layer.self_attn.sliding_window += 1
        assert difference(model, wider) > 1e-3


@pytest.mark.parametrize(
    "overrides",
    [
        ["attention=gqa"],
        ["attention=mla", "attention.projection_bias=all", "attention.q_lora_rank=20"],
        ["attention=swa_1_1", "attention.kinds.local.window=5"],
        ["attention=gqa", "attention.window=5"],
        ["attention=swa_1_1", "attention.kinds.local.window=5", "attention.qk_norm=true"],
        ["attention=gqa_partial"],
        ["attention=gqa_partial", "attention.window=5"],
        ["attention=gqa_gated", "attention.qk_norm=true", "model.tie_embeddings=false"],
    ],
)
def test_both_write_the_same_text(overrides: list[str]) -> None:
    model = randomise(gpt_from(overrides)).eval()
    theirs = as_transformers(model, config_at(*overrides))
    prompts_BT = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(2))
    ours = torch.stack(list(generate(model, prompts_BT.tolist(), max_new_tokens=6, temperature=0)), dim=1)
    assert torch.equal(theirs.generate(prompts_BT, max_new_tokens=6, do_sample=False)[:, 9:], ours)


@pytest.mark.parametrize("overrides", [overrides for name, overrides in SAME.items() if "DeltaNet" in name])
def test_states_are_handed_on_as_theirs_are(overrides: list[str]) -> None:
    """Over several chunks of 64 tokens, and from a prompt of more than one into the tokens that are written behind it."""
    overrides = [*overrides, "model.max_seq_len=150"]
    model = randomise(gpt_from(overrides)).eval()
    theirs = as_transformers(model, config_at(*overrides))
    tokens_BT = torch.randint(100, (2, 150), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours_BTC, theirs_BTC = model(tokens_BT)[..., :100], theirs(input_ids=tokens_BT).logits
    assert theirs_BTC.std() > 1 and relative_error(ours_BTC, theirs_BTC) < 1e-4
    prompts_BT = tokens_BT[:, :90]
    ours = torch.stack(list(generate(model, prompts_BT.tolist(), max_new_tokens=20, temperature=0)), dim=1)
    assert torch.equal(theirs.generate(prompts_BT, max_new_tokens=20, do_sample=False)[:, 90:], ours)


def test_each_written_token_is_stamped_once() -> None:
    theirs = as_transformers(gpt_from(["attention=mha"]).eval(), config_at("attention=mha"))
    stamps: list[int] = []
    generate_with_theirs(theirs, torch.zeros(2, 5, dtype=torch.long), 4, lambda: stamps.append(len(stamps)))
    assert stamps == [0, 1, 2, 3]


@pytest.mark.parametrize(("attention", "elements"), [("mha", 2 * 4 * 12), ("gqa", 2 * 2 * 12), ("mla", 24 + 6)])
def test_their_cache_is_measured(attention: str, elements: int) -> None:
    theirs = as_transformers(gpt_from([f"attention={attention}"]).eval(), config_at(f"attention={attention}"))
    assert their_cache_bytes(theirs, 10) == 10 * 2 * 4 * elements  # layers, float32


def test_their_cache_keeps_a_window_less_the_newest_token() -> None:
    config = config_at("attention=swa_1_1")
    theirs = as_transformers(gpt_from(["attention=swa_1_1"]).eval(), config)
    with torch.no_grad():
        held = theirs(input_ids=torch.zeros(1, 40, dtype=torch.long), use_cache=True).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in held.layers)
    assert their_cache_bytes(theirs, 40) == held == 4 * 2 * 2 * 12 * (40 + 15)


def test_a_state_of_theirs_is_measured_once_whatever_the_tokens() -> None:
    overrides = SAME["gated DeltaNet in three layers of four"]
    theirs = as_transformers(gpt_from(overrides).eval(), config_at(*overrides))
    states = 3 * 4 * (8 * 12 * 12 + 4 * (2 * 4 * 12 + 8 * 12))  # float32, and the newest input of the convolution too
    assert their_cache_bytes(theirs, 10) == states + 10 * 2 * 4 * 2 * 12


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["attention=mha_learned"], r"attention.positions=learned"),
        (["attention=gqa", "attention.positions=none"], r"its Llama has no attention.positions=none"),
        (["attention=gqa_gated"], r"its Qwen3.5 has no attention.qk_norm=False$"),
        (["attention=gqa_gated", "attention.gate=head", "attention.qk_norm=true"], r"its Qwen3.5 has no attention.gate=head$"),
        (["attention=gqa_gated", "attention.qk_norm=true", "attention.window=7"], r"its Qwen3.5 has no attention.window=7$"),
        (["attention=gqa_gated", "attention.qk_norm=true", "model.bias=true"], r"its Qwen3.5 has no model.bias=true$"),
        (["attention=gdn_3_1"], r"its Qwen3.5 has no attention.gate=none and no attention.qk_norm=False beside layers of gdn$"),
        ([*DELTA, "attention.layers=[delta]"], r"it has no attention.layers=\[delta\]$"),
        ([*DELTA, "attention.window=7"], r"its Qwen3.5 has no attention.window=7$"),
        ([*DELTA, "model.bias=true"], r"its Qwen3.5 has no model.bias=true$"),
        (
            [
                "attention=mla",
                "attention.layers=[s,f]",
                "attention.kinds={s:{mechanism:gdn,n_k_heads:4,n_v_heads:4,head_dim:12,conv_width:4},f:{}}",
            ],
            r"its DeepSeek-V3 has no attention.layers=\[s,f\]$",
        ),
        (
            [
                *DELTA,
                "attention.layers=[delta,wide,full]",
                "attention.kinds={delta:{mechanism:gdn,n_k_heads:4,n_v_heads:4,conv_width:4},wide:{mechanism:gdn,n_k_heads:4,n_v_heads:4,conv_width:5},full:{}}",
            ],
            r"it has no attention.layers=\[delta,wide,full\]$",
        ),
        (["attention=gqa_partial", "attention.qk_norm=true"], r"its Qwen3 has no attention.rotary_fraction=0.5$"),
        (["attention=gqa_partial", "attention.projection_bias=qkv"], r"its Phi-3 has no attention.projection_bias=qkv$"),
        (["attention=gqa_partial", "model.bias=true"], r"its Phi-3 has no model.bias=true$"),
        (["attention=gqa_partial", LINEAR], r"its Phi-3 has no attention.rope_scaling={'rope_type': 'linear', 'factor': 3.0}$"),
        (["attention=swa_1_1", "attention.rotary_fraction=0.5"], r"its Phi-3 has no attention.layers=\[local,full\]$"),
        (
            ["attention=gqa_partial", "model.head_dim=44", f"attention.rotary_fraction={30 / 44}"],
            r"its Phi-3 has no attention.rotary_fraction=0.68181818\d+ of heads of 44$",
        ),
        (["attention=mfa"], r"its Llama has no attention.q_lora_rank=24"),
        (["attention=gla"], r"its DeepSeek-V3 has no attention.latent_groups=2"),
        (["attention=shared_kv"], r"it has no attention.mechanism=tied"),
        (["attention=swa_sinks"], r"its Ministral has no attention.sink_logits=True"),
        (["attention=gqa_cla"], r"it has no attention.layers=\[own,reader\]"),
        (["attention=swa_1_1", "attention.kinds.full.rope_theta=500.0"], r"it has no attention.layers=\[local,full\]"),
        (["attention=swa_1_1", "attention.kinds.full.window=30"], r"it has no attention.layers=\[local,full\]"),
        (["attention=swa_1_1", "attention.projection_bias=all"], r"its Qwen2 has no attention.projection_bias=all"),
        (["attention=swa_1_1", "model.bias=true"], r"its Qwen2 has no model.bias=true"),
        (["attention=gqa", "attention.qk_norm=true", "model.bias=true"], r"its Qwen3 has no model.bias=true"),
        (["attention=mha", "attention.v_head_dim=7"], r"attention.v_head_dim=7"),
        (["attention=mha", "model.mlp=relu2"], r"model.mlp=relu2"),
        (["attention=mla_plain"], r"attention.positions=learned"),
        (["attention=mla", "attention.sink_logits=true"], r"its DeepSeek-V3 has no attention.sink_logits=True"),
        (["attention=mla", "attention.qk_norm=true"], r"its DeepSeek-V3 has no attention.qk_norm=True"),
        (["attention=mla", "attention.latent_norm=layer"], r"attention.latent_norm=layer"),
        (["attention=mla_shared_latent"], r"attention.sharing=latent"),
        (["attention=mla", "attention.latent_norm=none"], r"attention.latent_norm=none"),
        (["attention=mla", "attention.rope_frequencies=stored"], r"attention.rope_frequencies=stored"),
        (
            ["attention=mla", "attention.projection_bias=all"],
            r"no attention.projection_bias=all with attention.q_lora_rank=null",
        ),
        (["attention=mla", "model.norm_eps=0"], r"its DeepSeek-V3 has no model.norm_eps=0"),
        (["attention=gqa", "attention.projection_bias=qkv", "model.mlp=relu2"], r"its Qwen2 has no model.mlp=relu2"),
        (
            ["attention=mla", "attention.kv_latent=split", "model.bias=true"],
            r"attention.kv_latent=split and no model.bias=true",
        ),
    ],
)
def test_what_they_do_not_have_is_refused_in_one_sentence(overrides: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named) as refused:
        as_transformers(gpt_from(overrides), config_at(*overrides))
    assert len(str(refused.value).splitlines()) == 1


def test_an_encoder_is_refused() -> None:
    config = config_at("attention=mha")
    encoder = dataclasses.replace(config, model=dataclasses.replace(config.model, causal=False))
    with pytest.raises(UserError, match=r"its Llama has no model.causal=false"):
        as_transformers(gpt_from(["attention=mha"], causal=False), encoder)


def test_a_mechanism_of_our_own_is_refused_by_its_name() -> None:
    private = dataclasses.replace(config_at("attention=gqa"), attention={"name": "private", "mechanism": "private"})
    assert misfits(private) == ["attention.mechanism=private"]
    with pytest.raises(UserError, match=r"^attention=private is no model of transformers: it has no .*mechanism=private$"):
        as_transformers(gpt_from(["attention=gqa"]), private)


CLASSES = {
    "LlamaForCausalLM": ["attention=gqa", "model.norm_eps=0.3", "attention.rope_theta=500.0", "model.head_dim=16"],
    "Qwen3ForCausalLM": ["attention=gqa", "attention.qk_norm=true", "model.tie_embeddings=false"],
    "Qwen2ForCausalLM": ["attention=gqa", "attention.projection_bias=qkv", "model.head_dim=16", LLAMA3],
    "MistralForCausalLM": ["attention=gqa", "attention.window=7"],
    "MinistralForCausalLM": ["attention=swa_1_1", "attention.kinds.local.window=7"],
    "DeepseekV3ForCausalLM": ["attention=mla", "model.norm_eps=0.3", "attention.rope_theta=500.0", DEEPSEEK_YARN],
    "Phi3ForCausalLM": ["attention=gqa_partial", "attention.window=7", "model.head_dim=16"],
    "Qwen3_5ForCausalLM": ["attention=gqa_gated", "attention.qk_norm=true", "attention.rotary_fraction=0.5", YARN],
}
DEFAULT = {"rope_type": "default", "rope_theta": 500.0}


def saved(name: str, folder: Path, **changes: Any) -> float:
    """The difference of a randomised model and of what its folder gives, once its config.json has been changed."""
    model = randomise(gpt_from(CLASSES[name])).eval()
    save_theirs(as_transformers(model, config_at(*CLASSES[name])), folder, stops=[99])
    (folder / "tokenizer.json").write_text(json.dumps(WORDS))
    file = folder / "config.json"
    written = json.loads(file.read_text())
    assert written["architectures"] == [name]
    assert written["vocab_size"] == 100  # of 128 with padding
    assert set(changes) <= set(written)
    if "rope_parameters" in changes:  # their newer name for rope_scaling, which wins where both stand
        del written["rope_scaling"]
    file.write_text(json.dumps(written | changes))
    theirs, _ = load(folder)
    assert type(theirs).__name__ == name and theirs.generation_config.eos_token_id == 99
    assert theirs.get_input_embeddings().weight.shape[0] == theirs.lm_head.weight.shape[0] == 100
    return difference(model, theirs)


WORDS = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"},
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_saved_folder_computes_the_same(name: str, tmp_path: Path) -> None:
    assert saved(name, tmp_path) < 1e-5


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("LlamaForCausalLM", {"rms_norm_eps": 1e-6}),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("DeepseekV3ForCausalLM", {"rms_norm_eps": 1e-6}),
        ("DeepseekV3ForCausalLM", {"rope_interleave": False}),
        ("DeepseekV3ForCausalLM", {"rope_parameters": DEFAULT}),
        ("Qwen2ForCausalLM", {"rope_parameters": DEFAULT | {"rope_theta": 10000.0}}),
        ("Qwen2ForCausalLM", {"head_dim": 8, "num_attention_heads": 8, "num_key_value_heads": 4}),
        ("LlamaForCausalLM", {"tie_word_embeddings": False}),
        ("MistralForCausalLM", {"sliding_window": 8}),
        ("MinistralForCausalLM", {"sliding_window": 8}),
        ("MinistralForCausalLM", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("Phi3ForCausalLM", {"sliding_window": 8}),
        ("Phi3ForCausalLM", {"head_dim": 8, "num_attention_heads": 8, "num_key_value_heads": 4}),
        ("Phi3ForCausalLM", {"rope_parameters": DEFAULT | {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}}),
    ],
)
def test_each_convention_is_seen_in_the_logits(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    assert saved(name, tmp_path, **changes) > 1e-3


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("Qwen2ForCausalLM", "factor", 5.0),
        ("Qwen2ForCausalLM", "low_freq_factor", 0.5),
        ("Qwen2ForCausalLM", "high_freq_factor", 6.0),
        ("Qwen2ForCausalLM", "original_max_position_embeddings", 64),
        ("DeepseekV3ForCausalLM", "rope_theta", 400.0),
        ("DeepseekV3ForCausalLM", "factor", 3.0),
        ("DeepseekV3ForCausalLM", "mscale", 0.5),
        ("DeepseekV3ForCausalLM", "mscale_all_dim", 1.0),
        ("DeepseekV3ForCausalLM", "original_max_position_embeddings", 64),
        ("Qwen3_5ForCausalLM", "factor", 3.0),
        ("Qwen3_5ForCausalLM", "partial_rotary_factor", 0.25),
    ],
)
def test_each_field_of_a_stretched_rotation_is_seen_in_the_logits(name: str, field: str, value: float, tmp_path: Path) -> None:
    written = as_transformers(gpt_from(CLASSES[name]), config_at(*CLASSES[name])).config.rope_parameters
    assert field in written
    assert saved(name, tmp_path, rope_parameters=dict(written) | {field: value}) > 1e-3


@pytest.mark.parametrize(("name", "tied"), [("LlamaForCausalLM", True), ("Qwen3ForCausalLM", False)])
def test_a_tied_head_is_written_once_and_an_own_one_beside_the_embedding(name: str, tied: bool, tmp_path: Path) -> None:
    saved(name, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is tied
    size = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    names = json.loads((tmp_path / "model.safetensors").read_bytes()[8 : 8 + size])
    assert ("lm_head.weight" in names) is not tied and "model.embed_tokens.weight" in names


@transformers4.needed
def test_transformers_4_computes_the_same_from_a_saved_folder(tmp_path: Path) -> None:
    prompt_BT = torch.randint(100, (2, 60), generator=torch.Generator().manual_seed(1))
    folders, expected = [], []
    known = {
        name: (overrides, family)
        for name, overrides in SAME.items()
        if (family := next((each for each in families(config_at(*overrides)) if architecture(each) not in SINCE_5), None))
    }
    assert {name for name in SAME if name not in known} == {name for name in SAME if "gated" in name}
    for number, (overrides, family) in enumerate(known.values()):
        model = randomise(gpt_from(overrides)).eval()
        folders.append(tmp_path / str(number))
        config = config_at(*overrides)
        save_theirs(as_transformers(model, config, family), folders[-1], stops=[99])
        with torch.inference_mode():
            expected.append(model(prompt_BT)[..., : model.vocab_size])
    errors = {
        name: relative_error(answer.logits_BTC, logits_BTC)
        for name, answer, logits_BTC in zip(known, transformers4.answers(folders, prompt_BT, tmp_path), expected, strict=True)
    }
    assert {name: error for name, error in errors.items() if not error < 1e-4} == {}
