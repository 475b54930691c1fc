"""The KV-cache calculator: published models, Hugging Face's own classes and caches, our models, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.build import build_layer
from harness.config import ROOT, load_train_config, save_run_config
from harness.errors import UserError
from harness.evaluation.hf_config import MODEL_TYPES, WRAPPERS, describe_config
from harness.evaluation.kv_calculator import CacheDescription, report, table
from scripts import kv_calculator
from tests.support.variants import SHIPPED

# model_type, hidden_size, layers, heads, key/value heads: as published.
LLAMA_3_8B = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 8}  # fmt: skip
MISTRAL_7B = LLAMA_3_8B | {"model_type": "mistral", "sliding_window": 4096}
DEEPSEEK_V2 = {"model_type": "deepseek_v2", "hidden_size": 5120, "num_hidden_layers": 60, "num_attention_heads": 128,
               "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
               "qk_rope_head_dim": 64, "v_head_dim": 128}  # fmt: skip
DEEPSEEK_V3 = DEEPSEEK_V2 | {"model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61}
QWEN25_7B = {"model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
             "num_key_value_heads": 4, "use_sliding_window": False, "sliding_window": 131072,
             "max_window_layers": 28}  # fmt: skip
KIMI_K2 = DEEPSEEK_V3 | {"model_type": "kimi_k2", "num_attention_heads": 64, "num_key_value_heads": 64}
# The language model inside Gemma-3-4B: heads, key/value heads and head_dim are left to the class.
GEMMA_3_4B = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 2560,
                                                      "num_hidden_layers": 34, "sliding_window": 1024}}  # fmt: skip

# name -> config, elements per token and layer, layers, elements of MHA of the same shape
PUBLISHED: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "Llama-2-7B": (LLAMA_3_8B | {"num_key_value_heads": 32}, 8192, 32, 8192),
    "Llama-3-8B": (LLAMA_3_8B, 2048, 32, 8192),
    "Llama-3.2-1B": (LLAMA_3_8B | {"hidden_size": 2048, "num_hidden_layers": 16, "head_dim": 64}, 1024, 16, 4096),
    "GPT-2": ({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12}, 1536, 12, 1536),
    "Pythia-6.9B": ({"model_type": "gpt_neox", "hidden_size": 4096, "num_hidden_layers": 32,
                     "num_attention_heads": 32}, 8192, 32, 8192),
    "Mistral-7B": (MISTRAL_7B, 2048, 32, 8192),
    "Qwen2.5-7B": (QWEN25_7B, 1024, 28, 7168),
    "Qwen3-8B": ({"model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
                  "num_key_value_heads": 8, "head_dim": 128}, 2048, 36, 8192),
    "Qwen3-30B-A3B": ({"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48,
                       "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}, 1024, 48, 8192),
    "Gemma-7B": ({"model_type": "gemma", "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
                  "num_key_value_heads": 16, "head_dim": 256}, 8192, 28, 8192),
    "Gemma-2-9B": ({"model_type": "gemma2", "hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16,
                    "num_key_value_heads": 8, "head_dim": 256, "sliding_window": 4096}, 4096, 42, 8192),
    "Gemma-3-4B": (GEMMA_3_4B, 2048, 34, 4096),
    "Phi-3-mini": ({"model_type": "phi3", "hidden_size": 3072, "num_hidden_layers": 32, "num_attention_heads": 32,
                    "num_key_value_heads": 32, "sliding_window": 2047}, 6144, 32, 6144),
    "gpt-oss-20b": ({"model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
                     "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128}, 1024, 24, 8192),
    "DeepSeek-67B": (LLAMA_3_8B | {"hidden_size": 8192, "num_hidden_layers": 95, "num_attention_heads": 64}, 2048, 95,
                     16384),
    "DeepSeek-V2": (DEEPSEEK_V2, 576, 60, 32768),
    "DeepSeek-V2-Lite": (DEEPSEEK_V2 | {"hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
                                        "num_key_value_heads": 16, "q_lora_rank": None}, 576, 27, 4096),
    "DeepSeek-V3": (DEEPSEEK_V3, 576, 61, 32768),
    "DeepSeek-V3.2": (DEEPSEEK_V3 | {"model_type": "deepseek_v32", "index_head_dim": 128}, 576 + 128, 61, 32768),
    "Kimi-K2": (KIMI_K2, 576, 61, 16384),
    "Kimi-K2.5": ({"model_type": "kimi_k25", "text_config": KIMI_K2}, 576, 61, 16384),
    "MiniCPM3-4B": ({"model_type": "minicpm3", "hidden_size": 2560, "num_hidden_layers": 62, "num_attention_heads": 40,
                     "num_key_value_heads": 40, "q_lora_rank": 768, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
                     "qk_rope_head_dim": 32}, 288, 62, 5120),
}  # fmt: skip


def described(config: dict[str, Any]) -> CacheDescription:
    return describe_config(config, name="tested")


def figures(config: dict[str, Any], **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"dtype": "bfloat16", "context": 4096, "batch": 1, "memory_gb": None}
    return report(described(config), **(given | options))


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
        "mha": 32_768, "absorbed": 139_264, "expand": 16_818_176, "expand_up_projection": 16_777_216
    }  # fmt: skip
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


@pytest.mark.parametrize(
    ("dtype", "width"), [("float32", 4), ("fp32", 4), ("bf16", 2), ("fp16", 2), ("fp8", 1), ("int8", 1)]
)
def test_bytes_follow_from_dtype_context_and_batch(dtype: str, width: int) -> None:
    found = figures(LLAMA_3_8B, dtype=dtype, context=1000, batch=3, memory_gb=1)
    assert found["total_bytes"] == 32 * 2048 * 1000 * 3 * width
    assert found["largest_batch"] == 10**9 // (32 * 2048 * 1000 * width)
    assert any("scales" in line for line in table(found)) == (width == 1)


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
        (LLAMA_3_8B | {"model_type": "ministral", "sliding_window": 8, "layer_types": ["sliding_attention"] * 3
                       + ["full_attention"] * 29}, range(3), 8),
    ],
    ids=["mistral", "mistral without", "qwen2 off", "qwen2 on", "gemma2", "gemma3", "gpt_oss", "listed"],
)  # fmt: skip
def test_a_layer_with_a_window_holds_no_more_tokens_than_it(
    config: dict[str, Any], windowed: Any, window: int | None
) -> None:
    description = described(config)
    assert [i for i, layer in enumerate(description.layers) if layer.window is not None] == list(windowed)
    context = 200_000
    held = sum(min(context, window) if window and i in windowed else context for i in range(len(description.layers)))
    found = figures(config, context=context)
    assert found["total_bytes"] == held * description.layers[0].elements * 2
    assert figures(config, context=4)["total_bytes"] == 4 * found["bytes_per_token"]


def test_recurrent_layers_count_nothing_and_the_report_says_so() -> None:
    config = {"model_type": "kimi_linear", "num_hidden_layers": 4, "linear_attn_config": {"full_attn_layers": [4],
              "kda_layers": [1, 2, 3], "head_dim": 128, "num_heads": 32}}  # fmt: skip
    found = figures(config)
    assert found["elements_per_token_per_layer"] == [0, 0, 0, 576]
    assert found["elements_per_token"] == 576
    assert any("3 of 4 layers keep a recurrent state of fixed size, which is not counted" in n for n in found["notes"])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_language_model_is_read_from_text_config(wrapper: str) -> None:
    inner = {"model_type": WRAPPERS[wrapper], "num_hidden_layers": 8}
    wrapped = described({"model_type": wrapper, "num_hidden_layers": 3, "text_config": inner})
    assert wrapped.layers == described(inner).layers and len(wrapped.layers) == 8
    assert described({"model_type": wrapper, "text_config": {"num_hidden_layers": 8}}).layers == wrapped.layers


def test_a_flat_glm5_next_is_read_as_its_text_config_would_be() -> None:
    assert (
        described({"model_type": "glm5_next", "kv_lora_rank": 96}).layers
        == described({"model_type": "glm5_next", "text_config": {"kv_lora_rank": 96}}).layers
    )


def test_a_field_that_is_not_there_is_the_classes_default_and_the_report_says_which() -> None:
    found = figures(GEMMA_3_4B)
    (note,) = (note for note in found["notes"] if "default of its Hugging Face class" in note)
    assert "num_attention_heads=8" in note and "num_key_value_heads=4" in note and "head_dim=256" in note
    assert not any("default" in note for note in figures(DEEPSEEK_V2)["notes"])


# --- against Hugging Face's own classes and caches -------------------------------------------------------------------

CLASSES = [name for name in MODEL_TYPES if name != "kimi_k2"]  # whose class lives on the hub
TOKENS, WINDOW = 12, 8
TINY: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 6,
    "num_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 12,
    "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": None, "bos_token_id": 0,
    "eos_token_id": 1, "sliding_window": WINDOW, "original_max_position_embeddings": 64,
    "kv_lora_rank": 24, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 16,
    "n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 6, "shared_expert_intermediate_size": 16, "ffn_hidden_size": 32,
    "expert_ffn_hidden_size": 16, "zero_expert_num": 2, "moe_topk": 2, "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 4,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_head_dim": 8, "linear_num_heads": 4,
}  # fmt: skip
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
        "kv_source_layers": [0, 1, 0, 1, 0, 1], "no_rope_layers": [1, 0] * 3, "indexer_types": ["full", "shared"] * 3
    },
}  # fmt: skip


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


@pytest.mark.parametrize("model_type", CLASSES)
def test_an_empty_config_json_means_the_classes_defaults(model_type: str) -> None:
    from transformers import AutoConfig

    # 4096 / 96 is no width: every published glm4_moe says its own.
    said = {"head_dim": 128} if model_type == "glm4_moe" else {}
    full = as_published(AutoConfig.for_model(model_type, **said))
    assert described({"model_type": model_type} | said).layers == described(full).layers


@pytest.mark.parametrize("model_type", CLASSES)
def test_a_real_cache_of_hugging_face_holds_what_is_calculated(model_type: str) -> None:
    config = tiny_config(model_type)
    description = described(as_published(config))
    with torch.no_grad():
        cache = tiny_model(config)(torch.zeros(1, TOKENS, dtype=torch.long), use_cache=True).past_key_values
    assert len(cache.layers) == len(description.layers)
    held, windowed = [], []
    for layer in cache.layers:
        keys, indexer = getattr(layer, "keys", None), getattr(layer, "indexer_keys", None)
        tokens = 0 if keys is None else keys.shape[-2]
        windowed.append(0 < tokens < TOKENS)
        held.append((keys.numel() + layer.values.numel()) // tokens if tokens else 0)
        if windowed[-1]:  # transformers drops the oldest token before the next one comes, not after
            assert tokens == WINDOW - 1
        held[-1] += indexer.numel() // TOKENS if indexer is not None else 0
    assert [layer.elements for layer in description.layers] == held
    assert [layer.window is not None for layer in description.layers] == windowed
    assert sum(held) > 0


@pytest.mark.parametrize("model_type", [name for name in CLASSES if MODEL_TYPES[name].plain])
def test_parameters_are_those_of_hugging_faces_attention(model_type: str) -> None:
    config = tiny_config(model_type)
    latent = described(as_published(config)).latent
    assert latent is not None
    modules = [module for name, module in tiny_model(config).named_modules() if hasattr(module, "kv_b_proj")]
    assert {sum(p.numel() for p in module.parameters()) for module in modules} == {latent.parameters}


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


@pytest.mark.parametrize("overrides", [["attention=mla"], ["attention=mla", "attention.q_lora_rank=20"],
                                       ["attention=mla_plain"]], ids=str)  # fmt: skip
def test_parameters_are_those_of_our_attention(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(capsys, *overrides, "--json"))
    layer = build_layer(load_train_config(["name=tested", *overrides]))
    assert found["parameters_per_layer"] == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("override", ["attention.kv_latent=split", "attention.latent_norm=layer", "model.bias=true",
                                      "attention.n_kv_heads=2"])  # fmt: skip
def test_parameters_are_left_out_where_the_layer_is_not_the_papers(
    override: str, capsys: pytest.CaptureFixture[str]
) -> None:
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
    flags = printed(capsys, "--json", *(word for key, value in options.items()
                                        for word in (f"--{key.replace('_', '-')}", value)))  # fmt: skip
    joined = printed(capsys, *(f"--{key}={value}" for key, value in options.items()), "--json")
    folder = printed(
        capsys, "--json", "--config", str(tmp_path), *(f"{k}={v}" for k, v in options.items() if k != "config")
    )
    assert pairs == flags == joined == folder
    assert len(pairs.splitlines()) == 1
    found = json.loads(pairs)
    assert found["total_bytes"] == 34_560 * 2 * 32768 * 4 and found["largest_batch"] == 17
    promised = {"name", "model_type", "layers", "dtype", "context", "batch", "window", "elements_per_token_per_layer",
                "elements_per_token", "bytes_per_token", "total_bytes", "naive_elements_per_token_per_layer",
                "mha_ratio", "parameters_per_layer", "parameters_per_layer_premerged", "macs_per_cached_token"}  # fmt: skip
    assert promised <= found.keys()


def test_the_table_and_the_json_object_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = as_file(tmp_path, DEEPSEEK_V2)
    text = " ".join(printed(capsys, "--config", str(path)).split())
    assert "elements per token and layer 576 40,960 32,768" in text
    assert "bytes per token 69,120 4,915,200 3,932,160" in text
    assert "56.9 times smaller than MHA of this shape" in text


def test_help_explains_every_option_and_names_every_model_type(tmp_path: Path) -> None:
    shown = subprocess.run([sys.executable, str(ROOT / "scripts/kv_calculator.py"), "--help"], cwd=tmp_path,
                           capture_output=True, text=True)  # fmt: skip
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "python scripts/kv_calculator.py" in shown.stdout
    for option in kv_calculator.OPTIONS:
        assert f"\n{option} " in shown.stdout
    listed = set(shown.stdout.partition("Known model types:")[2].replace(".", " ").split())
    inner = {name for name in MODEL_TYPES if name.endswith("_text") and name != "gemma3_text"}
    assert (set(MODEL_TYPES) | set(WRAPPERS)) - inner <= listed


def test_a_mistake_is_one_sentence_and_status_2(tmp_path: Path) -> None:
    path = as_file(tmp_path, {"model_type": "mamba"})
    shown = subprocess.run([sys.executable, str(ROOT / "scripts/kv_calculator.py"), "--config", str(path)],
                           capture_output=True, text=True)  # fmt: skip
    assert shown.returncode == 2 and shown.stdout == ""
    assert shown.stderr.startswith("error: model_type=mamba is unknown here") and shown.stderr.count("\n") == 1


REFUSED: dict[str, tuple[object, str]] = {
    "no model type": ({"hidden_size": 64}, r"has no model_type"),
    "unknown type": ({"model_type": "qwen22"}, r"model_type=qwen22 is unknown here \(did you mean qwen2\?\)"),
    "missing field without a default": ({"model_type": "kimi_k2", "num_hidden_layers": 61}, r"has no num_attention_heads|"
                                        r"has no hidden_size"),
    "missing text_config": ({"model_type": "gemma3"}, r"language model in text_config, which is missing"),
    "unknown inner type": ({"model_type": "mistral3", "text_config": {"model_type": "pixtral"}}, r"model_type=pixtral"),
    "latent in a class without one": (LLAMA_3_8B | {"kv_lora_rank": 512}, r"kv_lora_rank=512 .* model_type=llama"),
    "no latent in a class with one": (DEEPSEEK_V2 | {"kv_lora_rank": None}, r"kv_lora_rank=null .* whole number"),
    "width as text": (DEEPSEEK_V2 | {"v_head_dim": "128"}, r"v_head_dim=128 .* whole number of at least 1"),
    "groups that do not divide": (LLAMA_3_8B | {"num_key_value_heads": 5}, r"num_key_value_heads=5 does not divide"),
    "heads that do not divide": (LLAMA_3_8B | {"num_attention_heads": 24}, r"hidden_size=4096 is no multiple of .*24"),
    "null width": ({"model_type": "gemma", "head_dim": None}, r"head_dim=null"),
    "unknown layer type": (LLAMA_3_8B | {"layer_types": ["chunked_attention"] * 32}, r"names chunked_attention"),
    "indexer in a class without one": (LLAMA_3_8B | {"layer_types": ["indexed_attention"] * 32}, r"indexed_attention"),
    "layers of their own": (LLAMA_3_8B | {"per_layer_config": {"0": {"head_dim": 64}}}, r"per_layer_config"),
    "too few layer types": (LLAMA_3_8B | {"layer_types": ["full_attention"]}, r"one str for each of the 32 layers"),
    "window missing": (LLAMA_3_8B | {"layer_types": ["sliding_attention"] * 32}, r"has no sliding_window"),
    "cross-attention": ({"model_type": "gpt2", "add_cross_attention": True}, r"add_cross_attention=true"),
    "an encoder": (GEMMA_3_4B["text_config"] | {"use_bidirectional_attention": True}, r"use_bidirectional_attention"),
    "recurrent only": ({"model_type": "qwen3_next", "num_hidden_layers": 2}, r"no layer whose cache grows"),
    "a list": ([1], r"holds no JSON object"),
}  # fmt: skip


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
        (["--dtype", "int4"], r"dtype=int4 is unknown; did you mean int8\?"),
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
