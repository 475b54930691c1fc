"""The KV-cache calculator: published models, Hugging Face's own classes and caches, our models, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from harness.config.build import build_layer
from harness.config.compose import load_train_config
from harness.config.run_config import save_run_config
from harness.decode.kv_calculator import FORMATS, CacheDescription, cache_figures, cache_table
from harness.errors import UserError
from harness.hf import cache, cache_measured, meta_model
from harness.hf.cache import describe_apart, describe_config
from harness.hf.config_json import BY_FORMULA, OWN_TYPE
from modeling import shapes
from modeling.attention.layer_cache import new_cache
from modeling.attention.quantisation import cache_format
from modeling.refusal import Mistake
from scripts import kv_calculator
from tests.support.forks import Forks
from tests.support.variants import SHIPPED


def sized(model_type: str, hidden: int, layers: int, heads: int, groups: int | None = None, **more: Any) -> dict[str, Any]:
    """A config.json, as published; groups: key/value heads."""
    sizes = {"model_type": model_type, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | ({} if groups is None else {"num_key_value_heads": groups}) | more


def wrapped(model_type: str, inner: dict[str, Any]) -> dict[str, Any]:
    """Of a model that holds a language model."""
    return {"model_type": model_type, "text_config": inner}


LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
LLAMA_3_8B = sized("llama", 4096, 32, 32, 8)
MISTRAL_7B = LLAMA_3_8B | {"model_type": "mistral", "sliding_window": 4096}
DEEPSEEK_V2 = sized("deepseek_v2", 5120, 60, 128, 128, q_lora_rank=1536, **LATENT)
DEEPSEEK_V3 = DEEPSEEK_V2 | {"model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61}
QWEN25_7B = sized("qwen2", 3584, 28, 28, 4, use_sliding_window=False, sliding_window=131072, max_window_layers=28)
KIMI_K2 = DEEPSEEK_V3 | {"model_type": "kimi_k2", "num_attention_heads": 64, "num_key_value_heads": 64}
# The language model inside Gemma-3-4B: heads, key/value heads and head_dim are left to the class.
GEMMA_3_4B = {
    "model_type": "gemma3",
    "transformers_version": "4.50.0.dev0",
    "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024},
}

# name -> config, elements per token and layer, layers, elements of MHA of the same shape
PUBLISHED: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "Llama-2-7B": (LLAMA_3_8B | {"num_key_value_heads": 32}, 8192, 32, 8192),
    "Llama-3-8B": (LLAMA_3_8B, 2048, 32, 8192),
    "Llama-3.2-1B": (LLAMA_3_8B | {"hidden_size": 2048, "num_hidden_layers": 16, "head_dim": 64}, 1024, 16, 4096),
    "GPT-2": ({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12}, 1536, 12, 1536),
    "Pythia-6.9B": (sized("gpt_neox", 4096, 32, 32), 8192, 32, 8192),
    "Mistral-7B": (MISTRAL_7B, 2048, 32, 8192),
    "Qwen2.5-7B": (QWEN25_7B, 1024, 28, 7168),
    "Qwen3-8B": (sized("qwen3", 4096, 36, 32, 8, head_dim=128), 2048, 36, 8192),
    "Qwen3-30B-A3B": (sized("qwen3_moe", 2048, 48, 32, 4, head_dim=128), 1024, 48, 8192),
    "Gemma-7B": (sized("gemma", 3072, 28, 16, 16, head_dim=256), 8192, 28, 8192),
    "Gemma-2-9B": (sized("gemma2", 3584, 42, 16, 8, head_dim=256, sliding_window=4096), 4096, 42, 8192),
    "Gemma-3-4B": (GEMMA_3_4B, 2048, 34, 4096),
    "Phi-3-mini": (sized("phi3", 3072, 32, 32, 32, sliding_window=2047), 6144, 32, 6144),
    "gpt-oss-20b": (sized("gpt_oss", 2880, 24, 64, 8, head_dim=64, sliding_window=128), 1024, 24, 8192),
    "DeepSeek-67B": (LLAMA_3_8B | {"hidden_size": 8192, "num_hidden_layers": 95, "num_attention_heads": 64}, 2048, 95, 16384),
    "DeepSeek-V2": (DEEPSEEK_V2, 576, 60, 32768),
    "DeepSeek-V2-Lite": (DEEPSEEK_V2 | sized("deepseek_v2", 2048, 27, 16, 16, q_lora_rank=None), 576, 27, 4096),
    "DeepSeek-V3": (DEEPSEEK_V3, 576, 61, 32768),
    "DeepSeek-V3.2": (DEEPSEEK_V3 | {"model_type": "deepseek_v32", "index_head_dim": 128}, 576 + 128, 61, 32768),
    "Kimi-K2": (KIMI_K2, 576, 61, 16384),
    "Kimi-K2.5": ({"model_type": "kimi_k25", "text_config": KIMI_K2}, 576, 61, 16384),
    "Step-3": (
        wrapped("step3_vl", sized("step3_text", 7168, 61, 64, num_attention_groups=1, head_dim=256, share_q_dim=2048)),
        2 * 256,
        61,
        2 * 64 * 256,
    ),
    "MiniCPM3-4B": (
        sized("minicpm3", 2560, 62, 40, 40, q_lora_rank=768, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32),
        288,
        62,
        5120,
    ),
}


@pytest.fixture(autouse=True)
def measured_in_this_process(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The command measures here, where the libraries are loaded already; what is apart is tried below."""
    if "apart" not in request.node.name:
        monkeypatch.setattr(cache, "describe_apart", describe_config)


FALCON = sized("falcon", 512, 2, 8)


@functools.cache
def _described(config: str, context: int) -> CacheDescription:
    return describe_config(json.loads(config), name="tested", context=context)


def described(config: dict[str, Any], context: int = 4096) -> CacheDescription:
    """Measured once for all tests, which takes up to three seconds."""
    return _described(json.dumps(config), context)


def figures(config: dict[str, Any], **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"dtype": "bfloat16", "context": 4096, "batch": 1, "memory_gb": None} | options
    return cache_figures(described(config, given["context"]), **given)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert kv_calculator.main(list(arguments)) == 0
    return capsys.readouterr().out


def as_file(tmp_path: Path, config: object) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


# --- published models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_caches_what_its_paper_or_arithmetic_says(name: str) -> None:
    config, elements, layers, mha = PUBLISHED[name]
    found = figures(config)
    assert found["elements_per_token_per_layer"] == elements
    assert found["layers"] == layers
    assert found["elements_per_token"] == elements * layers
    assert found["bytes_per_token"] == 2 * elements * layers
    assert found["mha_ratio"] == pytest.approx(mha / elements)


def test_deepseek_v2_has_the_papers_figures() -> None:
    found = figures(DEEPSEEK_V2)
    assert found["elements_per_token"] == 34_560  # the paper's 34.6K
    assert round(found["mha_ratio"], 1) == 56.9
    assert found["naive_elements_per_token_per_layer"] == 40_960 > found["mha_elements_per_token_per_layer"] == 32_768
    assert found["macs_per_cached_token"] == {
        "mha": 32_768,
        "absorbed": 139_264,
        "expand": 16_818_176,
        "expand_up_projection": 16_777_216,
    }
    lite = figures(PUBLISHED["DeepSeek-V2-Lite"][0])
    assert lite["elements_per_token"] == 15_552  # the paper's 15.6K


def test_deepseek_v3_has_the_parameters_of_thin_and_of_merged_factors() -> None:
    found = figures(DEEPSEEK_V3)
    assert f"{found['parameters_per_layer'] / 1e6:.1f}" == "187.1"
    assert f"{found['parameters_per_layer_premerged'] / 1e6:.1f}" == "598.1"


def test_head_dim_and_key_value_heads_of_an_mla_config_change_nothing() -> None:
    trap = DEEPSEEK_V3 | {"head_dim": 64, "num_key_value_heads": 2}
    assert described(trap).layers == described(DEEPSEEK_V3).layers
    assert any("head_dim=64" in note for note in described(trap).notes)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("fp32", 4), ("bf16", 2), ("fp16", 2), ("fp8", 1), ("int8", 1)])
def test_bytes_follow_from_dtype_context_and_batch(dtype: str, width: int) -> None:
    found = figures(LLAMA_3_8B, dtype=dtype, context=1000, batch=3, memory_gb=1)
    assert found["total_bytes"] == 32 * 2048 * 1000 * 3 * width
    assert found["largest_batch"] == 10**9 // (32 * 2048 * 1000 * width)
    assert any("scales" in line for line in cache_table(found)) == (width == 1)


# --- windows and layers that differ ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "windowed", "window"),
    [
        (MISTRAL_7B, range(32), 4096),
        (MISTRAL_7B | {"sliding_window": None}, (), None),
        (QWEN25_7B, (), None),
        (QWEN25_7B | {"use_sliding_window": True, "max_window_layers": 21}, range(21, 28), 131072),
        (PUBLISHED["Gemma-2-9B"][0], range(0, 42, 2), 4096),
        (GEMMA_3_4B, [i for i in range(34) if i % 6 != 5], 1024),
        (PUBLISHED["gpt-oss-20b"][0], range(0, 24, 2), 128),
        (
            LLAMA_3_8B
            | {
                "model_type": "ministral",
                "sliding_window": 8,
                "layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 29,
            },
            range(3),
            8,
        ),
    ],
    ids=["mistral", "mistral without", "qwen2 off", "qwen2 on", "gemma2", "gemma3", "gpt_oss", "listed"],
)
def test_a_layer_with_a_window_holds_no_more_tokens_than_it(config: dict[str, Any], windowed: Any, window: int | None) -> None:
    description = described(config)
    assert [i for i, layer in enumerate(description.layers) if layer.window is not None] == list(windowed)
    context = 200_000
    held = sum(min(context, window) if window and i in windowed else context for i in range(len(description.layers)))
    found = figures(config, context=context)
    assert found["total_bytes"] == held * description.layers[0].elements * 2
    assert figures(config, context=4)["total_bytes"] == 4 * found["bytes_per_token"]


def test_recurrent_layers_are_counted_apart_from_what_grows() -> None:
    config = sized(
        "kimi_linear",
        2304,
        4,
        32,
        32,
        q_lora_rank=None,
        **LATENT,
        linear_attn_config={
            "full_attn_layers": [4],
            "kda_layers": [1, 2, 3],
            "head_dim": 128,
            "num_heads": 32,
            "short_conv_kernel_size": 4,
        },
        transformers_version="4.56.0",
    )
    found = figures(config)
    assert found["elements_per_token_per_layer"] == [0, 0, 0, 576] and found["elements_per_token"] == 576
    assert found["kv_bytes"] == 4096 * 576 * 2
    # 32 heads of a state of 128 x 128 in float32, and four inputs of the convolutions of queries, keys and values.
    conv = 3 * 4096 * 4
    assert found["state_bytes"] == 3 * (4 * 32 * 128 * 128 + 2 * conv)
    assert found["total_bytes"] == found["kv_bytes"] + found["state_bytes"]
    assert [(kind["kind"], kind["layers"]) for kind in found["kinds"]] == [("state", 3), ("latent", 1)]


@pytest.mark.parametrize(
    ("wrapper", "model_type"),
    [
        ("gemma3", "gemma3_text"),
        ("glm5_next", "glm5_next_text"),
        ("kimi_k25", "deepseek_v3"),
        ("mistral3", "mistral"),
        ("mistral_large4", "mistral_large4_text"),
    ],
)
def test_a_wrapped_language_model_is_read_from_text_config(wrapper: str, model_type: str) -> None:
    inner = as_published(tiny_config(model_type))
    wrapped = described({"model_type": wrapper, "num_hidden_layers": 3, "text_config": inner})
    assert wrapped.layers == described(inner).layers


def test_a_field_that_transformers_left_out_is_the_classes_default_and_the_report_says_which() -> None:
    found = figures(GEMMA_3_4B)
    (note,) = (note for note in found["notes"] if "default of its Hugging Face class" in note)
    assert "num_attention_heads=8" in note and "num_key_value_heads=4" in note and "head_dim=256" in note
    assert not any("default" in note for note in figures(DEEPSEEK_V2)["notes"])


def test_a_field_that_nobody_left_out_on_purpose_is_a_refusal() -> None:
    by_hand = {key: value for key, value in GEMMA_3_4B.items() if key != "transformers_version"}
    with pytest.raises(UserError, match=r"leaves out what decides the cache.*num_key_value_heads=4, head_dim=256") as refused:
        described(by_hand)
    assert "vocab_size" not in str(refused.value) and "intermediate" not in str(refused.value)
    with pytest.raises(UserError, match=r"would take new_decoder_architecture=false, multi_query=true$"):
        described(FALCON)
    assert described(FALCON | {"multi_query": False, "new_decoder_architecture": False}).layers[0].heads == 8
    by_hand = sized("qwen2", 64, 4, 4, 2, max_window_layers=2)
    assert described(by_hand).layers[3].window is None
    by_hand |= {"sliding_window": 128}
    with pytest.raises(UserError, match=r"would take use_sliding_window=false$"):
        described(by_hand)


def test_what_has_no_causal_attention_has_no_cache() -> None:
    bert = sized("bert", 64, 2, 4)
    with pytest.raises(UserError, match="model_type=bert with is_decoder=false is an encoder"):
        described(bert)
    assert described(bert | {"is_decoder": True}).layers[0].parts == {"keys": 64, "values": 64}


def test_heads_that_the_class_repeats_before_it_caches_them_are_named() -> None:
    falcon = FALCON | {"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 2}
    assert described(falcon).layers[0].heads == 8
    assert any("repeats its 2 key/value heads 4 times" in note for note in figures(falcon)["notes"])
    assert not any("repeats" in note for note in figures(LLAMA_3_8B)["notes"])


def test_the_choice_of_deepseeks_code_against_a_latent_is_read() -> None:
    latent = as_published(tiny_config("deepseek_v2"))
    groups = described(latent | {"use_mla": False}).layers[0]
    assert described(latent).layers[0].kind == "latent" and set(groups.parts) == {"keys", "values"}


# --- against Hugging Face's own classes and caches -------------------------------------------------------------------

TOKENS, WINDOW = 12, 8
TINY: dict[str, Any] = {"sliding_window": WINDOW} | yaml.safe_load(
    """
{vocab_size: 64, hidden_size: 64, intermediate_size: 32, moe_intermediate_size: 16, num_hidden_layers: 6,
num_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 64, head_dim: 12,
n_embd: 64, n_layer: 2, n_head: 4, n_positions: 64, pad_token_id: null, bos_token_id: 0, eos_token_id: 1,
original_max_position_embeddings: 64, kv_lora_rank: 24, q_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 4,
v_head_dim: 16, n_routed_experts: 4, num_experts: 4, num_local_experts: 4, num_experts_per_tok: 2, n_group: 1,
topk_group: 1, first_k_dense_replace: 6, shared_expert_intermediate_size: 16, ffn_hidden_size: 32,
expert_ffn_hidden_size: 16, zero_expert_num: 2, moe_topk: 2, num_mtp_layers: 0, num_nextn_predict_layers: 0,
index_head_dim: 8, index_n_heads: 2, index_topk: 4, linear_num_value_heads: 4, linear_num_key_heads: 2,
linear_key_head_dim: 8, linear_value_head_dim: 8, linear_head_dim: 8, linear_num_heads: 4, mamba_n_heads: 8,
mamba_d_head: 16, mamba_d_state: 8, mamba_d_ssm: 128, state_size: 8, mamba_num_heads: 8, mamba_head_dim: 16,
ssm_state_size: 8, num_heads: 8}
    """
)
CHANGES: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, "max_window_layers": 4},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 4},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 4},
    "qwen3_moe": {"use_sliding_window": True},
    "smollm3": {"use_sliding_window": True},
    "glm5_next_text": {"qk_rope_head_dim": 0, "index_kpool": 2},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"] * 3},
    "kimi_linear": {"q_lora_rank": None},
    "mistral4": {"head_dim": 12},
    "mistral_large4_text": {
        "kv_source_layers": [0, 1, 0, 1, 0, 1],
        "no_rope_layers": [1, 0] * 3,
        "indexer_types": ["full", "shared"] * 3,
    },
}
PLAIN_LATENTS = ["axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "mistral4", "youtu"]
# With indexers, windows and chunks of their own, shared, compressed and recurrent layers.
FAMILIES = PLAIN_LATENTS + re.findall(
    r"\w+",
    """
    cohere2 gemma gemma2 gemma3_text glm4 glm4_moe gpt2 gpt_neox gpt_oss granite llama ministral ministral3 mistral mixtral
    olmo olmo2 olmo3 phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next seed_oss smollm3 starcoder2 axk2
    bailing_hybrid deepseek_v32 glm5_next_text glm_moe_dsa hy_v4 kimi_linear mistral_large4_text llama4_text gemma3n_text
    gemma4_text qwen3_5_text qwen3_5_moe_text deepseek_v4 minimax minimax_m2 mimo_v2_flash nemotron_h jamba falcon gptj
    gpt_bigcode gpt_neo bloom mpt opt codegen falcon_h1 lfm2 granitemoehybrid bamba olmo_hybrid mamba mamba2 exaone4
    ernie4_5 nemotron stablelm cohere dots1 hunyuan_v1_dense apertus arcee internlm3 qwen2_vl_text qwen2_5_vl_text
    qwen3_vl_text
    """,
)
CHANGES |= {
    "gemma3n_text": {
        "intermediate_size": [32] * 6,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "activation_sparsity_pattern": [0.0] * 6,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "global_head_dim": 24,
    },
    "llama4_text": {"attention_chunk_size": 8, "no_rope_layers": [1, 1, 1, 0, 1, 1], "moe_layers": []},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 16,
        "o_lora_rank": 16,
        "o_groups": 2,
        "num_hash_layers": 0,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"] * 3,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention", "mlp", "full_attention"],
        "n_groups": 2,
        "expand": 2,
    },
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1, 4]},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 3},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 3},
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 3},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "expand": 2},
    "falcon_h1": {"mamba_n_groups": 1},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "bloom": {"n_layer": 2},
    "gpt_neo": {"num_layers": 6, "attention_types": [[["global", "local"], 3]]},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 64},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "qwen2_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "qwen3_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2], "mrope_interleaved": True}
    },
}
WIDTHS = {"recurrent_states": 4}  # bytes an element of what transformers keeps in float32 in a bfloat16 model


def tiny_config(model_type: str) -> Any:
    """The class's config at sizes that run in a moment; what its class does not know is left out."""
    from transformers import AutoConfig

    kind = type(AutoConfig.for_model(model_type))
    known = {*kind.__dataclass_fields__, *kind.attribute_map}
    sizes = {key: value for key, value in TINY.items() if key in known}
    if "kv_lora_rank" in known:  # head_dim is the rotated part's width there
        sizes |= {"num_key_value_heads": 4, "head_dim": 4}
    return AutoConfig.for_model(model_type, **(sizes | CHANGES.get(model_type, {})))


def tiny_model(config: Any) -> Any:
    from transformers import AutoModel

    torch.manual_seed(0)
    return AutoModel.from_config(config).eval()


def as_published(config: Any) -> dict[str, Any]:
    """The config.json that the class would write, every field in it."""
    written: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return written


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_real_cache_of_hugging_face_holds_what_is_measured_without_data(model_type: str) -> None:
    config = tiny_config(model_type)
    layers = described(as_published(config), TOKENS).layers
    with torch.no_grad():
        out = tiny_model(config)(torch.zeros(1, TOKENS, dtype=torch.long), use_cache=True)
    cache = out["cache_params" if "cache_params" in out else "past_key_values"]
    beside = getattr(cache, "linear_cache", [])  # MiniMax's states
    held = []
    for i in range(len(layers)):
        attributes = vars(cache.layers[i]) if i < len(cache.layers) else {}
        attributes = attributes | {"beside": beside[i] if i < len(beside) else None}
        tensors = {
            id(value): value
            for attribute in attributes.values()
            for value in (attribute.values() if isinstance(attribute, dict) else [attribute])
            if isinstance(value, torch.Tensor) and value.dim() > 1 and (value.is_floating_point() or value.dtype == torch.bool)
        }
        held.append(sum(tensor.numel() for tensor in tensors.values()))
    expected = []
    for layer in layers:
        # transformers drops the oldest token before the next one comes, not after
        kept = TOKENS if layer.window is None or layer.window > TOKENS else layer.window - 1
        whole = layer.parts.get("indexer key", 0)
        states = sum(size // WIDTHS.get(name.partition("[")[0], 2) for name, size in layer.states.items())
        expected.append((layer.elements - whole) * kept + whole * TOKENS + states + layer.at_context)
    assert len(cache.layers) <= len(layers) and held == expected and sum(held) > 0


def test_a_window_beside_compressed_tokens_is_not_all_that_is_kept() -> None:
    windows = [described(as_published(tiny_config(name)), TOKENS).notes for name in ("deepseek_v4", "gpt_oss")]
    compressed, plain = ([note for note in notes if "(sliding window)" in note] for notes in windows)
    assert [note.endswith("and older ones compressed") for note in (*compressed, *plain)] == [True, False]


@pytest.mark.parametrize("model_type", PLAIN_LATENTS)
def test_parameters_are_those_of_hugging_faces_attention(model_type: str) -> None:
    config = tiny_config(model_type)
    latent = described(as_published(config)).latent
    assert latent is not None
    modules = [module for name, module in tiny_model(config).named_modules() if hasattr(module, "kv_b_proj")]
    assert {sum(p.numel() for p in module.parameters()) for module in modules} == {latent.parameters}


@pytest.mark.parametrize(
    ("model_type", "naive", "mha"),
    [
        ("minicpm3", 4 * (8 + 4 + 16), 4 * (8 + 16)),
        ("deepseek_v32", 4 * (8 + 4 + 16) + 8, 4 * (8 + 16)),  # the indexer's key is kept beside either
        ("glm5_next_text", 4 * (8 + 0 + 16) + 2 * 8 + 1, 4 * (8 + 16)),
        ("mistral_large4_text", 4 * (8 + 4 + 16), 4 * (8 + 4 + 16)),  # nothing is rotated there, and nothing indexed
    ],
)
def test_what_a_latent_stands_for_is_four_heads_keys_and_values(model_type: str, naive: int, mha: int) -> None:
    *_, last = (layer for layer in described(as_published(tiny_config(model_type))).layers if "latent" in layer.parts)
    assert (last.naive, last.mha) == (naive, mha)


@pytest.mark.parametrize("rank", [16, None])
def test_merging_the_factors_gives_the_parameters_counted_for_it(rank: int | None) -> None:
    from dataclasses import replace

    latent = described(as_published(tiny_config("deepseek_v3"))).latent
    assert latent is not None
    H, N, P, V, L, D = 4, 8, 4, 16, 24, 64
    latent = replace(latent, q_lora_rank=rank)
    w_q, w_uk = torch.zeros(rank or D, H, N), torch.zeros(L, H, N)
    w_uv, w_o = torch.zeros(L, H, V), torch.zeros(H, V, D)
    merged = torch.einsum("rhn,lhn->rhl", w_q, w_uk).numel() + torch.einsum("lhv,hvd->hld", w_uv, w_o).numel()
    factors = w_q.numel() + w_uk.numel() + w_uv.numel() + w_o.numel()
    assert latent.parameters_premerged - latent.parameters == merged - factors
    assert latent.parameters_mha == 2 * D * H * (N + V)
    assert latent.elements_expanded == H * (N + P + V)


# --- models that cache in other ways than keys and values of all tokens ----------------------------------------------

FIVE_TO_ONE = (["sliding_attention"] * 5 + ["full_attention"]) * 10
# name -> config, {kind: (layers, elements of a token in one of them)}, bytes of keys and values of 32,768 tokens in bfloat16.
# Values from the models' published config.json files, as public repositories quote them.
FLAGSHIPS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, int]], int]] = {
    # 64 layers, every fourth full: 16 x 2 x 4 heads x 256.
    "Qwen3.5-27B": (
        wrapped(
            "qwen3_5",
            sized(
                "qwen3_5_text",
                5120,
                64,
                24,
                4,
                head_dim=256,
                full_attention_interval=4,
                linear_num_value_heads=48,
                linear_num_key_heads=16,
                linear_key_head_dim=128,
                linear_value_head_dim=128,
                linear_conv_kernel_dim=4,
            ),
        ),
        {"state": (48, 0), "full attention": (16, 2048)},
        16 * 2048 * 32768 * 2,
    ),
    # Keys are values in the full layers, 2 heads of 512: transformers caches both.
    "Gemma-4-26B-A4B": (
        wrapped(
            "gemma4",
            sized(
                "gemma4_text",
                2816,
                30,
                16,
                8,
                head_dim=256,
                global_head_dim=512,
                num_global_key_value_heads=2,
                attention_k_eq_v=True,
                hidden_size_per_layer_input=0,
                num_kv_shared_layers=0,
                sliding_window=1024,
                use_bidirectional_attention="vision",
                layer_types=FIVE_TO_ONE[:30],
            ),
        ),
        {"window of 1,024": (25, 4096), "full attention": (5, 2048)},
        (25 * 4096 * 1024 + 5 * 2048 * 32768) * 2,
    ),
    # 20 of 35 layers read another layer's keys and values.
    "Gemma-4-E2B": (
        wrapped(
            "gemma4",
            sized(
                "gemma4_text",
                1536,
                35,
                8,
                1,
                head_dim=256,
                global_head_dim=512,
                hidden_size_per_layer_input=256,
                num_kv_shared_layers=20,
                sliding_window=512,
                layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 7,
            ),
        ),
        {"window of 512": (12, 512), "full attention": (3, 1024), "no cache of its own": (20, 0)},
        (12 * 512 * 512 + 3 * 1024 * 32768) * 2,
    ),
    "Llama-4-Scout": (
        wrapped(
            "llama4", sized("llama4_text", 5120, 48, 40, 8, head_dim=128, attention_chunk_size=8192, no_rope_layer_interval=4)
        ),
        {"chunks of 8,192": (36, 2048), "full attention": (12, 2048)},
        (36 * 8192 + 12 * 32768) * 2048 * 2,
    ),
    # Every token in a window of 128, one vector of 512 that is key and value; besides it 1 in 128, or 1 in 4 with an
    # indexer's key of 128 for each and the last, overlapping window's gates and values.
    "DeepSeek-V4-Flash": (
        sized(
            "deepseek_v4",
            4096,
            43,
            64,
            1,
            head_dim=512,
            q_lora_rank=1024,
            o_lora_rank=1024,
            o_groups=8,
            qk_rope_head_dim=64,
            index_head_dim=128,
            index_n_heads=64,
            index_topk=512,
            sliding_window=128,
            compress_rates={"heavily_compressed_attention": 128, "compressed_sparse_attention": 4},
            layer_types=["heavily_compressed_attention"] * 2
            + ["compressed_sparse_attention", "heavily_compressed_attention"] * 20
            + ["compressed_sparse_attention"],
        ),
        {"heavily compressed attention, window of 128": (22, 512), "compressed sparse attention, window of 128": (21, 512)},
        (43 * 512 * 128 + 22 * 512 * 32768 // 128 + 21 * (640 * 32768 // 4 + 2 * (4 * 512 + 4 * 128))) * 2,
    ),
    "Kimi-K3": (
        wrapped(
            "kimi_k3",
            sized(
                "kimi_linear",
                7168,
                93,
                96,
                96,
                q_lora_rank=1536,
                **LATENT,
                hidden_act="situ",
                num_experts=896,
                linear_attn_config={
                    "full_attn_layers": [*range(4, 93, 4), 93],
                    "kda_layers": [i for i in range(1, 93) if i % 4],
                    "head_dim": 128,
                    "num_heads": 96,
                    "short_conv_kernel_size": 4,
                },
            ),
        ),
        {"state": (69, 0), "latent": (24, 576)},
        24 * 576 * 32768 * 2,
    ),
    "MiniMax-Text-01": (
        sized(
            "minimax",
            6144,
            80,
            64,
            8,
            head_dim=128,
            num_local_experts=32,
            layer_types=(["linear_attention"] * 7 + ["full_attention"]) * 10,
        ),
        {"state": (70, 0), "full attention": (10, 2048)},
        10 * 2048 * 32768 * 2,
    ),
    "Nemotron-H-8B": (
        sized(
            "nemotron_h",
            4096,
            52,
            32,
            8,
            head_dim=128,
            ssm_state_size=128,
            mamba_num_heads=128,
            mamba_head_dim=64,
            n_groups=8,
            conv_kernel=4,
            expand=2,
            intermediate_size=21504,
            hybrid_override_pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        ),
        {"state": (24, 0), "no cache of its own": (24, 0), "full attention": (4, 2048)},
        4 * 2048 * 32768 * 2,
    ),
    "Jamba-v0.1": (
        sized(
            "jamba", 4096, 32, 32, 8, attn_layer_period=8, attn_layer_offset=4, mamba_d_state=16, mamba_d_conv=4, mamba_expand=2
        ),
        {"state": (28, 0), "full attention": (4, 2048)},
        4 * 2048 * 32768 * 2,
    ),
    "Falcon-7B": (
        sized("falcon", 4544, 32, 71, multi_query=True, new_decoder_architecture=False, num_kv_heads=71),
        {"full attention": (32, 128)},
        32 * 128 * 32768 * 2,
    ),
    "GPT-J-6B": (
        {"model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64, "n_positions": 2048},
        {"full attention": (28, 8192)},
        28 * 8192 * 32768 * 2,
    ),
    "StarCoder": (
        {"model_type": "gpt_bigcode", "n_embd": 6144, "n_layer": 40, "n_head": 48, "multi_query": True, "n_positions": 8192},
        {"full attention": (40, 256)},
        40 * 256 * 32768 * 2,
    ),
    # Keys of 192 and values of 128; the window's layers have 8 heads, the full ones 4. transformers counts the token itself.
    "MiMo-V2-Flash": (
        sized(
            "mimo_v2_flash",
            4096,
            48,
            64,
            4,
            head_dim=192,
            v_head_dim=128,
            swa_num_key_value_heads=8,
            swa_num_attention_heads=64,
            swa_head_dim=192,
            swa_v_head_dim=128,
            sliding_window_size=128,
            hybrid_layer_pattern=[0, *([1] * 4), *([0, *([1] * 5)] * 7), 0],
        ),
        {"full attention": (9, 1280), "window of 129": (39, 2560)},
        (9 * 1280 * 32768 + 39 * 2560 * 129) * 2,
    ),
    # 20 layers have keys and values, four of five with a window; the last 15 read theirs.
    "Gemma-3n-E4B": (
        wrapped(
            "gemma3n",
            sized(
                "gemma3n_text",
                2048,
                35,
                8,
                2,
                head_dim=256,
                num_kv_shared_layers=15,
                sliding_window=512,
                layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 7,
            ),
        ),
        {"window of 512": (16, 1024), "full attention": (4, 1024), "no cache of its own": (15, 0)},
        (16 * 1024 * 512 + 4 * 1024 * 32768) * 2,
    ),
    "Gemma-3-27B": (
        wrapped("gemma3", sized("gemma3_text", 5376, 62, 32, 16, head_dim=128, sliding_window=1024, sliding_window_pattern=6)),
        {"window of 1,024": (52, 4096), "full attention": (10, 4096)},
        (52 * 1024 + 10 * 32768) * 4096 * 2,
    ),
    "gpt-oss-120b": (
        sized(
            "gpt_oss",
            2880,
            36,
            64,
            8,
            head_dim=64,
            sliding_window=128,
            layer_types=["sliding_attention", "full_attention"] * 18,
        ),
        {"window of 128": (18, 1024), "full attention": (18, 1024)},
        18 * 1024 * (128 + 32768) * 2,
    ),
    "Command-R7B": (
        sized("cohere2", 4096, 32, 32, 8, sliding_window=4096, sliding_window_pattern=4),
        {"window of 4,096": (24, 2048), "full attention": (8, 2048)},
        (24 * 4096 + 8 * 32768) * 2048 * 2,
    ),
    "Ministral-8B": (
        sized(
            "ministral",
            4096,
            36,
            32,
            8,
            head_dim=128,
            sliding_window=16384,
            layer_types=(["full_attention"] + ["sliding_attention"] * 3) * 9,
        ),
        {"window of 16,384": (27, 2048), "full attention": (9, 2048)},
        (27 * 16384 + 9 * 32768) * 2048 * 2,
    ),
    "Qwen2.5-7B, windows in its last layers": (
        QWEN25_7B | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 21},
        {"full attention": (21, 1024), "window of 4,096": (7, 1024)},
        (21 * 32768 + 7 * 4096) * 1024 * 2,
    ),
    "Qwen3, three windows and a full layer in turns": (
        sized(
            "qwen3",
            1024,
            8,
            16,
            8,
            head_dim=128,
            use_sliding_window=True,
            sliding_window=512,
            max_window_layers=8,
            layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 2,
        ),
        {"window of 512": (6, 2048), "full attention": (2, 2048)},
        (6 * 512 + 2 * 32768) * 2048 * 2,
    ),
    # Gated DeltaNet in three layers of four, whose states do not grow.
    "Qwen3-Next-80B-A3B": (
        sized(
            "qwen3_next",
            2048,
            48,
            16,
            2,
            head_dim=256,
            full_attention_interval=4,
            linear_num_value_heads=32,
            linear_num_key_heads=16,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            linear_conv_kernel_dim=4,
        ),
        {"state": (36, 0), "full attention": (12, 1024)},
        12 * 1024 * 32768 * 2,
    ),
    "Kimi-Linear-48B-A3B": (
        sized(
            "kimi_linear",
            2304,
            27,
            32,
            32,
            q_lora_rank=None,
            **LATENT,
            num_experts=256,
            linear_attn_config={
                "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
                "kda_layers": [layer for layer in range(1, 27) if layer % 4],
                "head_dim": 128,
                "num_heads": 32,
                "short_conv_kernel_size": 4,
            },
        ),
        {"state": (20, 0), "latent": (7, 576)},
        7 * 576 * 32768 * 2,
    ),
    # Full attention in all layers again.
    "MiniMax-M2": (
        sized("minimax_m2", 3072, 62, 48, 8, head_dim=128, num_local_experts=256),
        {"full attention": (62, 2048)},
        62 * 2048 * 32768 * 2,
    ),
    # The oldest vision-language files leave all of it to Llama's class.
    "LLaVA-1.5-7B": (
        {
            "model_type": "llava",
            "transformers_version": "4.36.0.dev0",
            "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064},
        },
        {"full attention": (32, 8192)},
        32 * 8192 * 32768 * 2,
    ),
    "DeepSeek-VL2-tiny": (
        {
            "model_type": "deepseek_vl_v2",
            "language_config": sized(
                "deepseek_v2",
                1280,
                12,
                10,
                10,
                kv_lora_rank=None,
                q_lora_rank=None,
                qk_nope_head_dim=0,
                qk_rope_head_dim=0,
                v_head_dim=0,
                use_mla=False,
            ),
        },
        {"full attention": (12, 2560)},
        12 * 2560 * 32768 * 2,
    ),
}


@pytest.mark.parametrize("name", FLAGSHIPS)
def test_a_flagship_caches_what_its_layers_say_kind_by_kind(name: str) -> None:
    config, kinds, total = FLAGSHIPS[name]
    config = {"transformers_version": "5.0.0", **config}
    layers = described(config, 32768).layers
    seen = {kind: [layer.elements for layer in layers if layer.kind == kind] for kind in {layer.kind for layer in layers}}
    assert {kind: (len(sizes), sizes[0]) for kind, sizes in seen.items()} == kinds
    assert all(len(set(sizes)) == 1 for sizes in seen.values())
    found = figures(config, context=32768)
    assert found["kv_bytes"] == total
    assert found["total_bytes"] == total + found["state_bytes"] == sum(kind["bytes"] for kind in found["kinds"])
    assert (found["state_bytes"] > 0) == ("state" in kinds)


@pytest.mark.parametrize(
    ("name", "layers", "state", "tails"),
    [
        # heads x key width x value width in float32; channels of queries, keys and values x 4 tokens in bfloat16
        ("Qwen3-Next-80B-A3B", 36, 32 * 128 * 128 * 4, (2 * 16 * 128 + 32 * 128) * 4 * 2),
        ("Qwen3.5-27B", 48, 48 * 128 * 128 * 4, (2 * 16 * 128 + 48 * 128) * 4 * 2),
        ("Kimi-Linear-48B-A3B", 20, 32 * 128 * 128 * 4, 3 * 32 * 128 * 4 * 2),
        ("MiniMax-Text-01", 70, 64 * 128 * 128 * 2, 0),
    ],
)
def test_states_and_the_tails_of_convolutions_are_counted_whatever_the_context(
    name: str, layers: int, state: int, tails: int
) -> None:
    config = {"transformers_version": "5.0.0", **FLAGSHIPS[name][0]}
    short, long = (figures(config, context=context)["state_bytes"] for context in (1024, 32768))
    assert short == long == layers * (state + tails)


def test_another_models_number_is_never_given() -> None:
    inner = FLAGSHIPS["Qwen3.5-27B"][0]["text_config"]
    with pytest.raises(UserError, match=r"stands in a config.json of model_type=qwen3, whose class does not know it"):
        described(inner | {"model_type": "qwen3"})
    kimi = FLAGSHIPS["Kimi-K3"][0]["text_config"]
    with pytest.raises(UserError, match=r"linear_attn_config stands in a config.json of model_type=kimi_k2"):
        described(kimi | {"model_type": "kimi_k2"})
    gemma = FLAGSHIPS["Gemma-4-26B-A4B"][0]["text_config"]
    with pytest.raises(UserError, match=r"Gemma3TextConfig does not accept this config.json: .*bidirectional"):
        described(gemma | {"model_type": "gemma3_text"})
    gemma = {key: value for key, value in gemma.items() if key != "use_bidirectional_attention"}
    with pytest.raises(UserError, match=r"global_head_dim stands in a config.json of model_type=gemma3_text"):
        described(gemma | {"model_type": "gemma3_text"})


def test_names_of_layer_types_that_transformers_renamed_are_known() -> None:
    old = {"deepseek_sparse_attention": "indexed_attention"}
    sparse = as_published(tiny_config("deepseek_v32"))
    renamed = sparse | {"layer_types": [next(iter(old))] * sparse["num_hidden_layers"]}
    assert described(renamed).layers == described(sparse).layers
    hybrid = as_published(tiny_config("granitemoehybrid"))
    renamed = hybrid | {"layer_types": ["mamba", "attention"] * 3}
    assert described(renamed).layers == described(hybrid).layers


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (LLAMA_3_8B | {"num_hidden_layers": 10**9}, r"num_hidden_layers=1000000000 .* is more than any model has \(2,048\)"),
        (LLAMA_3_8B | {"hidden_size": 10**18, "head_dim": 10**18}, r"transformers cannot run|does not accept"),
        (LLAMA_3_8B | {"use_cache": "false"}, r'use_cache="false" of the config.json is text: write false without quotes'),
        (GEMMA_3_4B | {"text_config": [1]}, r"text_config=\[1\] of the config.json must be an object"),
        (GEMMA_3_4B | {"text_config": "llama"}, r'text_config="llama" of the config.json must be an object'),
        (LLAMA_3_8B | {"layer_types": "full_attention"}, r"layer_types"),
        (LLAMA_3_8B | {"layer_types": [["full_attention"]] * 32}, r"layer_types"),
        (LLAMA_3_8B | {"layer_types": {"0": "full_attention"}}, r"layer_types"),
        (LLAMA_3_8B | {"rope_scaling": [1, 2]}, r"LlamaConfig does not accept|cannot run"),
        (LLAMA_3_8B | {"model_type": ["llama"]}, r'model_type=\["llama"\] of the config.json must be a name'),
        (LLAMA_3_8B | {"num_attention_heads": True}, r"."),
        (LLAMA_3_8B | {"num_attention_heads": 10**30}, r"num_attention_heads of the config.json has 31 digits"),
        (KIMI_K2 | {"num_hidden_layers": [61]}, r"num_hidden_layers=\[61\] .* whole number"),
        (LLAMA_3_8B | {"x": [0] * 300_000}, r"more than 200,000 values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_json_that_no_model_has_is_a_sentence(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as refused:
        described(config)
    assert len(str(refused.value).splitlines()) == 1


def test_code_beside_a_config_json_is_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    evil = {
        "auto_map": {"AutoConfig": "modeling_evil.C", "AutoModel": "modeling_evil.M", "AutoModelForCausalLM": "modeling_evil.M"}
    }
    found = json.loads(printed(capsys, "--config", str(as_file(tmp_path, LLAMA_3_8B | evil).parent), "--json"))
    assert found["elements_per_token"] == 65_536 and not (tmp_path / "ran").exists()


def test_a_fault_of_ours_in_measuring_is_not_the_config_jsons(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaModel

    def fault(*_: object, **__: object) -> None:
        raise ValueError("who is to blame")

    for ours, name in ((cache_measured, "_layer"), (meta_model, "_tensors"), (meta_model, "_signature")):
        with monkeypatch.context() as planted, pytest.raises(ValueError, match="who is to blame"):
            planted.setattr(ours, name, fault)
            describe_config(LLAMA_3_8B, name="tested")
    for ours, name in ((meta_model, "_answer"), (shapes, "is_draw")):  # while transformers runs
        with monkeypatch.context() as planted, pytest.raises(Mistake) as inside:
            planted.setattr(ours, name, fault)
            describe_config(LLAMA_3_8B, name="tested")
        assert str(inside.value.__cause__) == "who is to blame"
    for name in ("forward", "_from_config"):
        with monkeypatch.context() as planted, pytest.raises(UserError, match=r"cannot run its class .*Error: who is to blame"):
            planted.setattr(LlamaModel, name, fault)
            describe_config(LLAMA_3_8B, name="tested")


def test_a_fault_of_ours_in_running_alike_layers_once_is_none_of_theirs() -> None:
    layer = torch.nn.Linear(1, 1)
    with pytest.raises(Mistake), meta_model._once_each([layer], first=[]), meta_model._their_code():
        layer(torch.ones(1))


def test_measuring_apart_gives_the_same_and_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_apart(DEEPSEEK_V3, name="tested", context=64) == described(DEEPSEEK_V3, 64)
    monkeypatch.setattr(cache, "SECONDS", 0.05)
    with pytest.raises(UserError, match=r"took more than 0.05 seconds"):
        describe_apart(DEEPSEEK_V3, name="tested", context=64)


# --- formats, devices and contexts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bits", "said"),
    [
        ("half", 16, ""),
        ("torch.bfloat16", 16, ""),
        ("FP16", 16, ""),
        ("float", 32, ""),
        ("float8_e4m3fn", 8, "come on top"),
        ("int4", 4, "come on top"),
        ("q8_0", 8.5, "scales counted"),
        ("Q4_0", 4.5, "scales counted"),
        ("nvfp4", 4.5, "each 16 elements counted"),
        ("mxfp4", 4.25, "each 32 elements counted"),
        ("6bit", 6.5, "of 16 bits for each counted"),
        ("4-bit", 4.5, "of 16 bits for each counted"),
    ],
)
def test_a_format_counts_the_scales_that_it_fixes_and_says_so(dtype: str, bits: float, said: str) -> None:
    found = figures(LLAMA_3_8B, dtype=dtype)
    assert found["total_bytes"] * 8 == 65_536 * 4096 * bits
    assert said in found["scales"] and (said == "") == (found["scales"] == "")
    assert any(line.startswith("note: ") and said in line for line in cache_table(found)) or not said


@pytest.mark.parametrize(
    ("config", "tp", "elements"),
    [
        (LLAMA_3_8B, 1, 65_536),
        (LLAMA_3_8B, 4, 65_536 // 4),
        (LLAMA_3_8B, 8, 65_536 // 8),
        (LLAMA_3_8B, 16, 65_536 // 8),  # a head on two devices
        (DEEPSEEK_V3, 8, 576 * 61),  # the latent on all
        (FLAGSHIPS["Falcon-7B"][0], 2, 128 * 32),  # one head on all
    ],
)
def test_a_device_keeps_its_heads_and_every_latent(config: dict[str, Any], tp: int, elements: int) -> None:
    found = figures(config, tp=tp)
    assert found["elements_per_token"] == elements and found["total_bytes"] == elements * 2 * 4096
    repeated = any("repeated" in note for note in found["notes"])
    assert repeated == (elements * tp > figures(config)["elements_per_token"])


def test_states_are_divided_among_devices_and_heads_that_do_not_divide_are_refused() -> None:
    config = {"transformers_version": "5.0.0"} | FLAGSHIPS["Qwen3.5-27B"][0]
    assert figures(config, tp=4)["state_bytes"] * 4 == figures(config)["state_bytes"]
    with pytest.raises(UserError, match=r"tp=3 devices cannot share 8 key/value heads: choose a divisor or a multiple"):
        figures(LLAMA_3_8B, tp=3)


def test_devices_go_with_our_own_configurations_too(capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads(printed(capsys, "attention=gqa", "model=gpt2", "--json"))
    third = json.loads(printed(capsys, "attention=gqa", "model=gpt2", "--tp", "3", "--json"))
    assert third["elements_per_token"] * 3 == whole["elements_per_token"] and "measured" not in third
    for variant, each in (("gla", 256 // 2 + 32), ("mha_decoupled", 12 * 2 * 64 // 2 + 32)):  # the rotated key is on all
        halved = json.loads(printed(capsys, f"attention={variant}", "model=gpt2", "--tp", "2", "--json"))
        assert halved["elements_per_token"] == 12 * each
    latent = json.loads(printed(capsys, "attention=mla", "model=gpt2", "--tp", "2", "--json"))
    assert latent["elements_per_token"] == 288 * 12


def test_a_context_is_written_as_people_write_it_and_compared_with_the_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(as_file(tmp_path, LLAMA_3_8B | {"max_position_embeddings": 8192}))
    for text, tokens in (("128k", 131_072), ("8K", 8192), ("1M", 1_048_576), ("32_768", 32_768), ("4096", 4096)):
        found = json.loads(printed(capsys, "--config", path, "--context", text, "--json"))
        assert found["context"] == tokens
        assert any("passes the 8,192 tokens that the model was made for" in n for n in found["notes"]) == (tokens > 8192)
    stretched = LLAMA_3_8B | {
        "max_position_embeddings": 8192,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
    }
    assert described(stretched).made_for == 32_768


def test_full_pages_for_layers_with_a_window_are_named() -> None:
    (note,) = (note for note in figures(PUBLISHED["Gemma-2-9B"][0], context=32768)["notes"] if "pages" in note)
    assert "11.27 GB" in note
    assert not any("pages" in note for note in figures(PUBLISHED["Gemma-2-9B"][0], context=4096)["notes"])


def test_an_export_of_our_own_class_is_measured_as_the_run_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_train_config(["name=mine", "attention=mla", "attention.kv_lora_rank=24"])
    written = {"model_type": OWN_TYPE, "model": dataclasses.asdict(config.model), "attention": config.attention}
    found = json.loads(printed(capsys, "--config", str(as_file(tmp_path, written)), "--json"))
    assert found["elements_per_token_per_layer"] == found["measured"]["elements_per_token_per_layer"] == 24 + 16
    with pytest.raises(UserError, match=r"has no attention: it is not what scripts/export.py wrote"):
        kv_calculator.main(["--config", str(as_file(tmp_path, written | {"attention": None}))])


# --- our own models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", SHIPPED)
def test_formula_and_measured_buffers_stand_side_by_side(variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(capsys, f"attention={variant}", "model=gpt2", "--json"))
    for key in ("elements_per_token_per_layer", "elements_per_token", "bytes_per_token"):
        assert found["measured"][key] == found[key], key
    assert found["context"] == 1024 and found["layers"] == 12
    text = printed(capsys, f"attention={variant}", "model=gpt2")
    assert "by formula" in text and "measured" in text


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_measured_bytes_of_a_quantised_cache_stand_beside_the_elements_alone(
    dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(printed(capsys, "attention=mla", "model=gpt2", "--dtype", dtype, "--json"))
    assert found["measured"]["elements_per_token"] == found["elements_per_token"] == found["bytes_per_token"]
    assert found["bytes_per_token"] <= found["measured"]["bytes_per_token"] < 2 * found["bytes_per_token"]


def test_keys_by_channel_are_counted_with_the_newest_that_wait_in_16_bits(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: 12 layers of 3 groups of heads of 64, of 32 tokens' keys 16 bytes and a scale for each channel, in values
    32 and two scales a head."""
    found = json.loads(printed(capsys, "attention=gqa", "model=gpt2", "--dtype", "kc4v4", "--json"))
    keys, values, newest = 3 * 64 * (16 + 2) // 32, 3 * (32 + 4), 32 * 3 * 64 * 2
    assert found["bytes_per_token"] == found["measured"]["bytes_per_token"] == 12 * (keys + values)
    assert found["state_bytes"] == found["measured"]["state_bytes"] == 12 * newest
    assert found["total_bytes"] == 12 * (1024 * (keys + values) + newest)
    assert found["mha_total_bytes"] == 4 * found["total_bytes"] and found["mha_ratio"] == 4  # 12 heads for 3 groups
    said = printed(capsys, "attention=gqa", "model=gpt2", "--dtype", "kc4v4")
    assert "scales, and parts kept in 16 bits, counted; the newest 32 tokens' keys, in 16 bits, are counted as states" in said


@pytest.mark.parametrize(
    ("variant", "window", "context"),
    [
        ("gqa", None, 1024),
        ("gqa", None, 40),
        ("gqa", 100, 1024),
        ("gqa", 100, 100),
        ("gqa", 100, 40),
        ("gqa", 64, 1000),
        ("tpa", None, 33),
    ],
)
def test_keys_by_channel_through_a_window_are_what_a_cache_of_that_length_allocates(
    variant: str, window: int | None, context: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a window ends within a group of 32 tokens the whole group is kept; tpa's groups are no whole bytes a token."""
    overrides = [f"attention={variant}", "model=mini", *([f"attention.window={window}"] if window else [])]
    found = json.loads(printed(capsys, *overrides, "--dtype", "kc4v4", "--context", str(context), "--json"))
    layer = build_layer(load_train_config(["name=tested", *overrides]))
    cache = new_cache(layer, 1, context, dtype=cache_format("kc4v4"), device="meta")
    assert found["total_bytes"] == 4 * cache.nbytes


@pytest.mark.parametrize(
    "overrides", [["attention=mla"], ["attention=mla", "attention.q_lora_rank=20"], ["attention=mla_plain"]], ids=str
)
def test_parameters_are_those_of_our_attention(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(capsys, *overrides, "--json"))
    layer = build_layer(load_train_config(["name=tested", *overrides]))
    assert found["parameters_per_layer"] == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize(
    "override",
    [
        "attention.kv_latent=split",
        "attention.latent_norm=layer",
        "model.bias=true",
        "attention.n_kv_heads=2",
        "attention.qk_norm=true",
        "attention.sink_logits=true",
    ],
)
def test_parameters_are_left_out_where_the_layer_is_not_the_papers(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(printed(capsys, "attention=mla", override, "--json"))["parameters_per_layer"] is None


def test_a_run_is_measured_from_the_configuration_inside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    save_run_config(load_train_config(["name=mine", "attention=mla", "attention.kv_lora_rank=24"]), run)
    by_name = printed(capsys, "run=mine", f"runs_dir={tmp_path / 'runs'}", "--json")
    by_folder = printed(capsys, "--run", str(run), "--json")
    assert json.loads(by_name) == json.loads(by_folder)
    found = json.loads(by_name)
    assert found["name"] == "mine" and found["model_type"] == "mla" and found["context"] == 256
    assert found["elements_per_token_per_layer"] == found["measured"]["elements_per_token_per_layer"] == 24 + 16


# --- the command line ------------------------------------------------------------------------------------------------


def test_flags_and_key_value_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = as_file(tmp_path, DEEPSEEK_V2)
    options = {"config": str(path), "dtype": "bf16", "context": "32768", "batch": "4", "memory_gb": "40"}
    pairs = printed(capsys, *(f"{key}={value}" for key, value in options.items()), "json=true")
    flags = printed(
        capsys, "--json", *(word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value))
    )
    joined = printed(capsys, *(f"--{key}={value}" for key, value in options.items()), "--json")
    folder = printed(capsys, "--json", "--config", str(tmp_path), *(f"{k}={v}" for k, v in options.items() if k != "config"))
    assert pairs == flags == joined == folder
    assert len(pairs.splitlines()) == 1
    found = json.loads(pairs)
    assert found["total_bytes"] == 34_560 * 2 * 32768 * 4 and found["largest_batch"] == 17
    promised = {
        "name",
        "model_type",
        "layers",
        "dtype",
        "context",
        "batch",
        "window",
        "elements_per_token_per_layer",
        "elements_per_token",
        "bytes_per_token",
        "total_bytes",
        "naive_elements_per_token_per_layer",
        "mha_ratio",
        "parameters_per_layer",
        "parameters_per_layer_premerged",
        "macs_per_cached_token",
    }
    assert promised <= found.keys()


def test_the_table_and_the_json_object_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = as_file(tmp_path, DEEPSEEK_V2)
    text = " ".join(printed(capsys, "--config", str(path)).split())
    assert "elements per token and layer 576 40,960 32,768" in text
    assert "bytes per token 69,120 4,915,200 3,932,160" in text
    assert "56.9 times smaller than MHA of this shape" in text


def test_help_names_the_formats_and_the_types_without_a_class(forks: Forks) -> None:
    """The options: tests/entry/test_help.py."""
    shown = forks.run("scripts/kv_calculator.py", "--help").output
    assert set(BY_FORMULA) <= set(shown.partition("By\nformula")[2].replace(".", " ").split())
    assert all(name in shown for name in FORMATS if name not in ("float32", "float16"))


def test_a_mistake_found_apart_is_one_sentence_and_status_2(tmp_path: Path, forks: Forks) -> None:
    path = as_file(tmp_path, {"model_type": "qwen33"})
    status, said, errors = forks.run("scripts/kv_calculator.py", "--config", str(path))
    assert (status, said) == ([2], "")
    assert errors.startswith("error: model_type=qwen33 is unknown here") and errors.count("\n") == 1


REFUSED: dict[str, tuple[object, str]] = {
    "no model type": ({"hidden_size": 64}, r"has no model_type"),
    "unknown type": ({"model_type": "qwen22"}, r"model_type=qwen22 is unknown here: .*qwen2 is another"),
    "missing field without a default": (
        {"model_type": "kimi_k2", "num_hidden_layers": 61},
        r"has no num_attention_heads|"
        r"has no hidden_size",
    ),
    "missing text_config": ({"model_type": "gemma3"}, r"in text_config .* is missing or names none"),
    "unknown inner type": ({"model_type": "mistral3", "text_config": {"model_type": "pixtral"}}, r"missing or names none"),
    "latent in a class without one": (LLAMA_3_8B | {"kv_lora_rank": 512}, r"kv_lora_rank .*=llama, whose class does not"),
    "no latent in a class with one": (DEEPSEEK_V2 | {"kv_lora_rank": None}, r"'kv_lora_rank' expected int"),
    "width as text": (DEEPSEEK_V2 | {"v_head_dim": "128"}, r"'v_head_dim' expected int, got str"),
    "groups that do not divide": (LLAMA_3_8B | {"num_key_value_heads": 5}, r"num_key_value_heads=5 does not divide"),
    "heads that do not divide": (LLAMA_3_8B | {"num_attention_heads": 24}, r"\(4096\) is not a multiple of .* \(24\)"),
    "null width": ({"model_type": "gemma", "head_dim": None}, r"'head_dim' expected int, got NoneType"),
    "unknown layer type": (LLAMA_3_8B | {"layer_types": ["chunked_attention"] * 32}, r"no attribute 'attention_chunk_size'"),
    "layers of their own": (LLAMA_3_8B | {"per_layer_config": {"0": {"head_dim": 64}}}, r"per_layer_config"),
    "too few layer types": (LLAMA_3_8B | {"layer_types": ["full_attention"]}, r"\(32\) must be equal to .*`layer_types` \(1\)"),
    "window missing": (LLAMA_3_8B | {"layer_types": ["sliding_attention"] * 32}, r"no attribute 'sliding_window'"),
    "cross-attention": ({"model_type": "gpt2", "add_cross_attention": True}, r"add_cross_attention=true"),
    "an encoder": (GEMMA_3_4B["text_config"] | {"use_bidirectional_attention": True}, r"use_bidirectional_attention"),
    "recurrent only": ({"model_type": "qwen3_next", "num_hidden_layers": 2}, r"only contain LinearAttention layers|leaves out"),
    "a list": ([1], r"holds no JSON object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_json_that_is_not_understood_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    config, sentence = REFUSED[name]
    with pytest.raises(UserError, match=sentence) as refused:
        kv_calculator.main(["--config", str(as_file(tmp_path, config))])
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config"], r"--config needs a value"),
        (["--config", "--json"], r"--config needs a value"),
        (["--config", "meta-llama/Llama-3-8B"], r"does not exist; download the model's config.json"),
        (["--config", "README.md"], r"cannot be read as JSON"),
        (["--config", "x", "--run", "y"], r"config=x and run=y are two models; give one"),
        (["--config", "x", "attention=mla"], r"attention=\.\.\. changes one of our configurations"),
        (["--run", "nothing"], r"run=nothing is no run"),
        (["--dtype", "int9"], r"dtype=int9 is unknown; did you mean int\d\?"),
        (["--dtype", "auto"], r"dtype=auto is unknown"),
        (["--tp", "0"], r"tp=0 is too small"),
        (["--context", "1.5k"], r"context=1.5k must be a whole number"),
        (["--context", "0"], r"context=0 is too small"),
        (["--context", "many"], r"context=many must be a whole number"),
        (["--batch", "-1"], r"batch=-1 is too small"),
        (["--memory-gb", "0"], r"memory_gb=0 is too small"),
        (["--contxt", "5"], r"contxt is not an option here; did you mean context\?"),
        (["attention=mlaa"], r"attention=mlaa does not exist; did you mean mla\?"),
        (["attention=mla", "attention.kv_lora_rank=0"], r"must be at least 1"),
        (["config.json"], r"config.json is not of the form key=value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_be_are_refused_in_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as refused:
        kv_calculator.main(arguments)
    assert len(str(refused.value).splitlines()) == 1
