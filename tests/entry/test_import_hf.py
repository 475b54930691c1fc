"""scripts/import_hf.py: their models become our runs with the same function, or nothing is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import eval_model
import train_model
from harness.config.conversion import ConversionConfig
from harness.config.identity import identity
from harness.config.places import ROOT
from harness.config.run_config import load_run_config, save_run_config
from harness.data import Tokenizer
from harness.errors import UserError
from harness.evaluation.evaluate import evaluate_model
from harness.evaluation.perplexity import Scoring
from harness.runs.conversion import converted_from, with_attention
from harness.runs.load import TrainedModel, load_trained
from modeling.attention import EXECUTION
from modeling.attention.contract import relative_error
from modeling.conversion.layers import exact_state, grouped_layer, latent_state
from modeling.conversion.stages import merge
from modeling.generation import generate
from scripts import convert, export, import_hf
from scripts import generate as generate_script
from tests.support.forks import Ended, Forks
from tests.support.hub_server import REVISION, HubServer
from tests.support.micro import PROMISED, Workplace, contents, json_lines, records, summary_of
from tests.support.subjects import on_cpu

pytest.importorskip("transformers")

VOCABULARY = 300  # tokens; the embeddings have 305 rows, ours 320
SIZES = {
    "vocab_size": 305,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MLA = {
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "first_k_dense_replace": 2,
    "num_key_value_heads": 4,
}
PHI = {"num_key_value_heads": 2, "pad_token_id": None}
GATED = {"num_key_value_heads": 2, "head_dim": 16, "layer_types": ["full_attention"] * 2}
DELTA = GATED | {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
    "rms_norm_eps": 0.1,
}
# Stretched from 16 positions to the 64 that are compared.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}
DEEPSEEK_YARN = YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 100.0,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "llama, tied, wide heads": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 16}),
    "llama, all biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 0.1}),
    "llama, biases in attention": ("Llama", {"attention_bias": True}),
    "llama, llama3": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "llama, linear, no rows to spare": (
        "Llama",
        {"vocab_size": 300, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}},
    ),
    "llama, yarn": ("Llama", {"rope_parameters": DEEPSEEK_YARN}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None, "rms_norm_eps": 1e-5}),
    "mistral, windows": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 7}),
    "ministral": (
        "Ministral",
        {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "phi3": ("Phi3", PHI | {"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5}}),
    "phi3, windows, rotated whole, no eps said": ("Phi3", PHI | {"num_key_value_heads": 4, "sliding_window": 7}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2, windows in the last layers": (
        "Qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3, three windows and none in turns": (
        "Qwen3",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_hidden_layers": 6,
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": [f"{kind}_attention" for kind in ["sliding"] * 3 + ["full"] + ["sliding"] * 2],
        },
    ),
    "qwen2, yarn": ("Qwen2", {"num_key_value_heads": 2, "rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 0.1}),
    "qwen3, biases": ("Qwen3", {"num_key_value_heads": 4, "head_dim": 16, "attention_bias": True}),
    "qwen3_5_text": ("Qwen3_5", GATED),
    "qwen3_5_text, half of a head, biases, yarn": (
        "Qwen3_5",
        GATED | {"attention_bias": True, "rms_norm_eps": 0.1, "rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
    ),
    "qwen3_5_text, gated DeltaNet": ("Qwen3_5", DELTA),
    "deepseek_v2": ("DeepseekV2", MLA | {"q_lora_rank": None, "rms_norm_eps": 1e-5}),
    "deepseek_v2, yarn": ("DeepseekV2", MLA | {"q_lora_rank": 20, "rope_parameters": DEEPSEEK_YARN}),
    "deepseek_v3": ("DeepseekV3", MLA | {"q_lora_rank": 20}),
    "deepseek_v3, pairs apart": ("DeepseekV3", MLA | {"q_lora_rank": 20, "rope_interleave": False, "rms_norm_eps": 1e-5}),
    "deepseek_v3, yarn": (
        "DeepseekV3",
        MLA | {"q_lora_rank": None, "tie_word_embeddings": True, "rope_parameters": DEEPSEEK_YARN},
    ),
    "deepseek_v3, biases": ("DeepseekV3", MLA | {"q_lora_rank": 20, "attention_bias": True, "rms_norm_eps": 1e-4}),
    "deepseek_v3, biases but on queries": ("DeepseekV3", MLA | {"q_lora_rank": None, "attention_bias": True}),
}


CONVERTED = ("Llama", "Mistral", "Qwen2")  # QK-norm and windows are not


class Zoo(Workplace):
    """Their models, made and saved when asked for, and what they are imported as."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.tokenizer = Tokenizer.train_bpe([self.corpus.read_text()], VOCABULARY)
        assert self.tokenizer.vocab_size == VOCABULARY
        self.models: dict[str, Any] = {}

    def model(self, name: str) -> Any:
        if name not in self.models:
            self.models[name] = large_model(*MODELS[name])
        return self.models[name]

    def source(self, name: str) -> Path:
        """A folder as they save it, in shards; not to be changed."""
        folder = self.folder / "theirs" / name
        if not folder.exists():
            self.model(name).save_pretrained(folder, max_shard_size="30KB")
            self.tokenizer.save(folder)
        return folder

    def changed(self, name: str, folder: Path, **fields: Any) -> Path:
        """A copy in `folder` with other fields in its config.json; `absent` removes one."""
        shutil.copytree(self.source(name), folder)
        config = json.loads((folder / "config.json").read_text()) | fields
        config = {key: value for key, value in config.items() if value is not ABSENT}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def options(self, *more: str) -> list[str]:
        return [
            "dataset=local",
            f"dataset.path={self.corpus}",
            f"data_dir={self.folder / 'data'}",
            "device=cpu",
            "precision=float32",
            "tracking=none",
            *more,
        ]

    def bring(self, source: Path | str, to: Path, *more: str) -> TrainedModel:
        """Imported, not scored, and loaded."""
        assert import_hf.main(self.options(f"source={source}", f"to={to}", "score=false", *more)) == 0
        return loaded(to)


ABSENT = object()


def large_model(kind: str, fields: dict[str, Any]) -> Any:
    """A model of theirs whose weights are so large that attention is sharp and logits are far apart."""
    import transformers

    config = getattr(transformers, f"{kind}TextConfig" if kind == "Qwen3_5" else f"{kind}Config")(**SIZES | fields)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * (2 / parameter.shape[-1]) ** 0.5)
            else:
                parameter.copy_(1 + 0.3 * noise if "norm" in name else noise)
    return model


def loaded(run: Path) -> TrainedModel:
    return load_trained(run, device=torch.device("cpu"), precision=torch.float32, execution=EXECUTION)


def difference(trained: TrainedModel, model: Any, length: int = 64) -> float:
    tokens_BT = torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs_BTC = model(input_ids=tokens_BT).logits.float()
        ours_BTC = trained.model(tokens_BT)
    assert theirs_BTC.std() > 1 and ours_BTC[..., theirs_BTC.shape[-1] :].eq(-torch.inf).all()
    return relative_error(ours_BTC[..., : theirs_BTC.shape[-1]], theirs_BTC)


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    (checkpoint,) = (run / "checkpoints").iterdir()
    return safetensors.torch.load_file(checkpoint / "model.safetensors")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_theirs_at_every_position(zoo: Zoo, name: str, tmp_path: Path) -> None:
    source = zoo.source(name)
    assert len(list(source.glob("*.safetensors"))) > 3
    assert difference(zoo.bring(source, tmp_path / "run"), zoo.model(name)) < 1e-5


@pytest.mark.parametrize(
    "name", [name for name, (kind, fields) in MODELS.items() if kind in CONVERTED and not fields.get("sliding_window")]
)
def test_every_family_with_grouped_heads_becomes_mla_exactly(zoo: Zoo, name: str, tmp_path: Path) -> None:
    trained = zoo.bring(zoo.source(name), tmp_path / "run")
    source = trained.model.double()
    layers = [grouped_layer(attention) for attention in source.attentions]
    made = {"repeat": [latent_state(merge(layer)) for layer in layers]}
    wide = layers[0].k_GKD.shape[0] * 2 * layers[0].k_GKD.shape[1] > source.embedding.embedding_dim
    if not (wide and layers[0].k_bias_GK is not None):
        made["after_up"] = [exact_state(layer) for layer in layers]
    tokens_BT = torch.randint(VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(1))
    for rope_mode, states in made.items():
        config = converted_from(trained.config, ConversionConfig("exact", rope_mode=rope_mode))
        model = with_attention(source, config, states)
        with torch.inference_mode():
            ours, theirs = (each.hidden(tokens_BT) for each in (model, source))
        assert theirs.dtype == torch.float64 and relative_error(ours, theirs) < 1e-10


@pytest.mark.parametrize(
    "name", ["qwen2, yarn", "deepseek_v2, yarn", "mistral, windows", "qwen3, three windows and none in turns"]
)
def test_both_write_the_same_text_with_their_caches(zoo: Zoo, name: str, tmp_path: Path) -> None:
    trained, model = zoo.bring(zoo.source(name), tmp_path / "run"), zoo.model(name)
    prompts_BT = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
    ours_BT = torch.stack(list(generate(trained.model, prompts_BT.tolist(), max_new_tokens=30, temperature=0)), dim=1)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs_BT = model.generate(prompts_BT, attention_mask=torch.ones_like(prompts_BT), max_new_tokens=30, **options)
    assert torch.equal(theirs_BT[:, 9:], ours_BT)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"rms_norm_eps": 0.1}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
        ("llama, yarn", {"rope_parameters": DEEPSEEK_YARN | {"mscale": 2.0}}),
        ("llama, llama3", {"rope_parameters": LLAMA3 | {"factor": 2.0}}),
        ("deepseek_v2, yarn", {"rope_parameters": DEEPSEEK_YARN | {"mscale_all_dim": 0.0}}),
        ("deepseek_v3", {"rope_interleave": False}),
        ("deepseek_v3, pairs apart", {"rope_interleave": True}),
        ("deepseek_v3, pairs apart", {"rms_norm_eps": 1e-2}),
        ("mistral, windows", {"sliding_window": 8}),
        ("ministral", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("qwen2, windows in the last layers", {"max_window_layers": 0, "layer_types": ABSENT}),
        ("qwen2, windows in the last layers", {"use_sliding_window": False}),
        ("phi3", {"rms_norm_eps": 0.1}),
        ("phi3", {"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.34}}),  # cut to 4 of 12
        ("phi3, windows, rotated whole, no eps said", {"sliding_window": 8}),
        ("qwen3_5_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
        ("qwen3_5_text, gated DeltaNet", {"linear_num_key_heads": 4, "linear_key_head_dim": 4}),
        ("qwen3_5_text, gated DeltaNet", {"linear_num_key_heads": 1, "linear_key_head_dim": 16}),
    ],
)
def test_each_field_that_shapes_the_function_is_read(zoo: Zoo, name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    source = zoo.changed(name, tmp_path / "theirs", **fields)
    assert difference(zoo.bring(source, tmp_path / "run"), zoo.model(name)) > 1e-3


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        (
            "llama",
            {
                "rope_parameters": ABSENT,
                "rope_theta": 10000.0,
                "head_dim": ABSENT,
                "attention_bias": ABSENT,
                "mlp_bias": ABSENT,
                "hidden_act": "swish",
            },
        ),
        (
            "llama, llama3",
            {
                "rope_parameters": ABSENT,
                "rope_theta": 100.0,
                "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
            },
        ),
        (
            "qwen2, yarn",
            {
                "rope_parameters": ABSENT,
                "rope_theta": 100.0,
                "use_sliding_window": False,
                "sliding_window": 8,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            },
        ),
        ("qwen2, yarn", {"rope_parameters": YARN | {"factor": None}}),
        (
            "qwen2, yarn",
            {
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0},
                "original_max_position_embeddings": 16,
            },
        ),
        ("qwen2, yarn", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ABSENT, "max_window_layers": 2}),
        (
            "deepseek_v3",
            {"rope_interleave": ABSENT, "architectures": ABSENT, "n_routed_experts": None, "first_k_dense_replace": 0},
        ),
        ("mistral", {"model_type": ABSENT, "sliding_window": 64}),
        ("mistral, windows", {"layer_types": ["sliding_attention", "sliding_attention"]}),
        ("qwen2, windows in the last layers", {"layer_types": ABSENT}),
        ("phi3", {"rope_parameters": ABSENT, "rope_theta": 100.0, "rope_scaling": None, "partial_rotary_factor": 0.5}),
        ("phi3, windows, rotated whole, no eps said", {"rms_norm_eps": ABSENT, "rope_parameters": ABSENT}),
        ("qwen3_5_text", {"rope_parameters": ABSENT, "mtp_num_hidden_layers": 0}),
        ("qwen3_5_text, gated DeltaNet", {"layer_types": ABSENT, "full_attention_interval": 2}),
    ],
)
def test_older_and_shorter_ways_to_say_the_same_are_understood(
    zoo: Zoo, name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    trained = zoo.bring(zoo.changed(name, tmp_path / "theirs", **fields), tmp_path / "run")
    assert trained.model.max_seq_len == 64 and difference(trained, zoo.model(name)) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama, llama3",
        "mistral",
        "qwen2",
        "qwen2, yarn",
        "qwen3",
        "phi3",
        "qwen3_5_text",
        "qwen3_5_text, gated DeltaNet",
        "deepseek_v2, yarn",
        "deepseek_v3",
    ],
)
def test_an_import_exported_and_imported_again_has_the_same_bits(zoo: Zoo, name: str, tmp_path: Path) -> None:
    zoo.bring(zoo.source(name), tmp_path / "first")
    assert export.main([f"run={tmp_path / 'first'}", f"to={tmp_path / 'exported'}"]) == 0
    zoo.bring(tmp_path / "exported", tmp_path / "second")
    first, second = weights_of(tmp_path / "first"), weights_of(tmp_path / "second")
    added = second.keys() - first.keys()
    if name.startswith("qwen2"):  # written as Llama, since this tokenizer is not Qwen2's: the output has a bias of zeros
        assert len(added) == 2 and all(".o_proj.bias" in key and not second[key].any() for key in added)
        added = set()
    assert first.keys() <= second.keys() and not added and len(first) > 15
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_weights_keep_their_dtype_and_a_product_is_not_rounded_to_it(zoo: Zoo, tmp_path: Path) -> None:
    import transformers

    name = "deepseek_v3, pairs apart"  # whose norm_eps is another than that of their latent norms
    model = large_model(*MODELS[name]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    zoo.tokenizer.save(tmp_path / "theirs")
    trained = zoo.bring(tmp_path / "theirs", tmp_path / "run")
    dtypes = {key.split(".", 2)[-1]: tensor.dtype for key, tensor in weights_of(tmp_path / "run").items()}
    scaled = {"attention.kv_down_proj.weight", "attention.q_down_proj.weight"}
    assert {key for key, dtype in dtypes.items() if dtype == torch.float32} == scaled
    assert {dtype for key, dtype in dtypes.items() if key not in scaled} == {torch.bfloat16}
    assert {parameter.dtype for parameter in trained.model.parameters()} == {torch.float32}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    assert difference(trained, theirs) < 1e-5


def test_an_imported_run_is_generated_with_evaluated_and_exported(
    zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = zoo.runs / "llama-imported"
    assert import_hf.main(zoo.options(f"source={zoo.source('llama')}", f"to={run}")) == 0
    said = capsys.readouterr().out
    # 320 x 48 twice, then per layer q, o, k, v, three of the MLP and two norms, and the last norm
    parameters = 2 * 320 * 48 + 2 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 80 + 2 * 48) + 48
    assert "LlamaForCausalLM" in said and f"parameters  {parameters:,}" in said
    assert f"KV cache    {2 * 2 * 2 * 2 * 12} bytes per token in bfloat16" in said  # layers, bytes, k and v, heads of 12
    assert "documents end with token 0 here, writing with eos_token_id=2" in said
    summary = summary_of(run)
    line = json_lines(said)[0]
    assert Path(line.pop("record")) == run / "summary.json"
    assert set(summary) >= PROMISED and line.items() <= summary.items()
    assert (summary["parameters"], summary["steps"], summary["attention"]) == (parameters, 0, "gqa")
    assert summary["origin"]["kind"] == "import" and summary["cache_bytes_per_token"] == 2 * 2 * 2 * 2 * 12
    assert zoo.evaluate(f"run={run.name}", "split=validation", "max_tokens=65536") == 0
    (record,) = records(capsys.readouterr().out)
    assert record["perplexity"] == pytest.approx(summary["perplexity"], rel=1e-6)
    assert generate_script.main([f"run={run}", "device=cpu", "prompt=the sea", "max_new_tokens=5"]) == 0
    assert capsys.readouterr().out.startswith("the sea")
    assert export.main([f"run={run}", f"to={tmp_path / 'exported'}"]) == 0


def test_the_run_names_where_it_came_from(zoo: Zoo, tmp_path: Path) -> None:
    import hashlib

    source = zoo.source("deepseek_v2, yarn")
    zoo.bring(source, tmp_path / "run", "max_seq_len=40")
    origin = json.loads((tmp_path / "run" / "origin.json").read_text())
    used = {path.name: path for path in source.iterdir() if path.name != "generation_config.json"}
    assert origin["sha256"] == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in used.items()}
    assert (origin["kind"], origin["source"], origin["revision"]) == ("import", str(source), None)
    assert (origin["model_type"], origin["architecture"]) == ("deepseek_v2", "DeepseekV2ForCausalLM")
    config = load_run_config(tmp_path / "run")
    assert (config.name, config.runs_dir, config.dataset.name) == ("run", str(tmp_path), "local")
    assert (config.tokenizer.name, config.tokenizer.path) == ("pretrained", None)
    assert (config.model.name, config.attention["name"], config.model.max_seq_len) == ("deepseek_v2_yarn", "mla", 40)
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == used["tokenizer.json"].read_bytes()


def test_the_same_import_elsewhere_is_the_same_run_and_an_older_one_goes_on(zoo: Zoo, tmp_path: Path) -> None:
    here, there = tmp_path / "here" / "run", tmp_path / "there" / "run"
    source = shutil.copytree(zoo.source("llama"), tmp_path / "copy" / "llama")
    assert import_hf.main(zoo.options(f"source={zoo.source('llama')}", f"to={here}")) == 0
    assert import_hf.main(zoo.options(f"source={source}", f"to={there}")) == 0
    summaries = [json.loads((run / "summary.json").read_text()) for run in (here, there)]
    assert summaries[0]["setup_hash"] == summaries[1]["setup_hash"]
    assert identity(load_run_config(here)) == identity(load_run_config(there))

    def tuned(run: Path, steps: int = 2) -> list[str]:
        return [
            f"init_from={run}",
            "name=tuned",
            f"runs_dir={tmp_path}",
            "batch_size=2",
            f"budget.steps={steps}",
            "model.max_seq_len=32",
            f"data_dir={zoo.folder / 'data'}",
            "tracking=none",
            "device=cpu",
        ]

    # As it was written before: with the place of its tokenizer, wherever the run lies by now.
    config = load_run_config(here)
    config.tokenizer.path = str(tmp_path / "moved away" / "tokenizer.json")
    save_run_config(config, here)
    assert import_hf.main(zoo.options(f"source={source}", f"to={here}")) == 0  # the same import
    assert (
        eval_model.main(
            [f"run={here}", f"data_dir={zoo.folder / 'data'}", "tracking=none", "extras=[]", "device=cpu", "max_tokens=100"]
        )
        == 0
    )
    assert train_model.main(tuned(here)) == 0
    before = json.loads((tmp_path / "tuned" / "summary.json").read_text())
    (tmp_path / "tuned" / "summary.json").unlink()
    assert train_model.main(tuned(here)) == 0  # is continued
    after = json.loads((tmp_path / "tuned" / "summary.json").read_text())
    assert (after["setup_hash"], after["loss"]) == (before["setup_hash"], before["loss"])


def test_the_same_command_scores_later_and_another_import_is_left_alone(
    zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = zoo.options(f"source={zoo.source('mistral')}", f"to={run}")
    assert import_hf.main([*command, "score=false"]) == 0
    assert "the same command with score=true" in capsys.readouterr().out and not (run / "summary.json").exists()
    before = contents(run)
    assert import_hf.main(command) == 0
    after = contents(run)
    assert set(after) - set(before) == {"summary.json", "metrics.jsonl"} and before.items() <= after.items()
    assert import_hf.main(command) == 0
    assert "already" in capsys.readouterr().out and contents(run) == after
    with pytest.raises(UserError, match=r"holds another import \(it was imported from other files, those of"):
        import_hf.main(zoo.options(f"source={zoo.source('llama')}", f"to={run}"))
    with pytest.raises(UserError, match=r"holds another import \(model.max_seq_len is 64 there and 32 here\)"):
        import_hf.main([*command, "max_seq_len=32"])
    assert contents(run) == after


BEGIN, END, TURN = 300, 301, 302
TEMPLATE = "{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"


@pytest.fixture(scope="module")
def with_text(zoo: Zoo) -> Path:
    """A Llama in bfloat16 whose tokenizer begins a text with a token, and that says where writing ends and how one chats."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    folder = zoo.folder / "theirs" / "with text"
    large_model(*MODELS["llama"]).to(torch.bfloat16).save_pretrained(folder)
    backend = Backend.from_file(str(zoo.tokenizer.save(folder)))
    backend.add_special_tokens(["<|begin|>", "<|end|>", "<|turn|>"])
    backend.post_processor = TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B", special_tokens=[("<|begin|>", BEGIN)]
    )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": {
                    "__type": "AddedToken",
                    "content": "<|begin|>",
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                },
                "eos_token": "<|end|>",
                "chat_template": TEMPLATE,
                "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
            }
        )
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, 0], "bos_token_id": BEGIN}))
    return folder


PROMPTS = ["the sea", "", "<|turn|>user: the ship<|end|>", "<|begin|>the storm", "e\u0301 1234  x\n", "<|endoftext|>a"]


def without_code(source: Path, folder: Path) -> Path:
    """As it loads with no code of theirs."""
    shutil.copytree(source, folder)
    said = json.loads((folder / "tokenizer_config.json").read_text())
    del said["auto_map"]
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def test_what_a_checkpoint_says_of_text_is_kept_and_exported(
    zoo: Zoo, with_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    trained = zoo.bring(with_text, tmp_path / "run")
    said = capsys.readouterr().out
    assert "a text begins with token 300, as tokenizer.json says" in said and "documents end" not in said
    tokenizer = trained.tokenizer
    assert (tokenizer.begins, tokenizer.opening, tokenizer.stops) == ((BEGIN,), BEGIN, (END, 0))
    theirs = transformers.AutoTokenizer.from_pretrained(without_code(with_text, tmp_path / "theirs"))
    for prompt in PROMPTS:
        expected = theirs(prompt)["input_ids"]
        assert tokenizer.encode_prompt(prompt) == (expected[1:] if expected[:2] == [BEGIN, BEGIN] else expected)
    for name, said in {"opening": 10**6, "stops": [10**6], "tokenizer_config": 3, "dtype": ["float32"]}.items():
        sent = shutil.copytree(tmp_path / "run", tmp_path / f"sent-{name}")
        (sent / "text.json").write_text(json.dumps(json.loads((sent / "text.json").read_text()) | {name: said}))
        with pytest.raises(UserError, match=r"text.json .*: import the checkpoint again"):
            loaded(sent)
    assert tokenizer.encode("<|end|>the") == zoo.tokenizer.encode("<|end|>the")  # in data it is text
    assert export.main([f"run={tmp_path / 'run'}", f"to={tmp_path / 'out'}"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16 and "bfloat16" in (tmp_path / "out" / "README.md").read_text()
    assert model.generation_config.eos_token_id == model.config.eos_token_id == [END, 0]
    assert model.generation_config.bos_token_id == model.config.bos_token_id == BEGIN
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [again(prompt)["input_ids"] for prompt in PROMPTS] == [theirs(prompt)["input_ids"] for prompt in PROMPTS]
    assert (again.bos_token_id, again.eos_token_id) == (BEGIN, END)
    chat = [{"role": "user", "content": "the sea"}]
    assert again.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"tokenizer_config.json", "config.json"}
    assert "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    converted = convert.main(
        [
            f"run={tmp_path / 'run'}",
            f"to={tmp_path / 'mean'}",
            "method=gqa_mean",
            "n_kv_heads=1",
            "device=cpu",
            f"data_dir={zoo.folder / 'data'}",
            f"dataset.path={zoo.corpus}",
        ]
    )
    assert converted == 0 and loaded(tmp_path / "mean").tokenizer.begins == (BEGIN,)


@pytest.mark.parametrize("begins", [True, False])
def test_a_document_is_scored_behind_the_token_that_begins_it(zoo: Zoo, with_text: Path, begins: bool, tmp_path: Path) -> None:
    source = without_code(with_text, tmp_path / "theirs")
    if not begins:
        zoo.tokenizer.save(source)
    trained = zoo.bring(source, tmp_path / "run")
    text = "the captain saw a whale"
    tokens = [*trained.tokenizer.encode(text), trained.tokenizer.end_of_text]
    split = SimpleNamespace(
        tokens=np.array([*tokens, *tokens]),
        document_starts=np.array([0, len(tokens), 2 * len(tokens)]),
        document_bytes=np.array([len(text)] * 2),
        document_words=np.array([5, 5]),
    )
    for per_document in (True, False):
        result = evaluate_model(
            on_cpu(trained.model), split, trained.tokenizer, Scoring(1.0, batch_size=2, per_document=per_document)
        )
        first = BEGIN if begins else trained.tokenizer.end_of_text
        stream = [first, *tokens[:-1]] if per_document else [first, *tokens[:-1], first, *tokens[:-1]]
        with torch.no_grad():
            logits_TC = trained.model(torch.tensor([stream]))[0]
        targets = torch.tensor(tokens if per_document else 2 * tokens)
        assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits_TC, targets).item(), rel=1e-5)


def test_tasks_are_scored_as_the_harness_scores_the_checkpoint(zoo: Zoo, with_text: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate", reason="the harness's own model needs it: pip install accelerate")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from harness.hf.lm_eval import Answers, as_language_model

    trained = zoo.bring(with_text, tmp_path / "run")
    theirs = HFLM(pretrained=str(without_code(with_text, tmp_path / "theirs")), dtype="float32", device="cpu", batch_size=2)
    ours = as_language_model(
        Answers(trained.model, trained.tokenizer, precision=torch.float32, device=torch.device("cpu"), batch_size=2)
    )

    def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
        return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]  # type: ignore[arg-type]

    pairs = [("the sea ", "and a ship"), ("", "the storm"), ("<|turn|>user: a<|end|>", " whale"), ("a", " ship " * 30)]
    scored = asked("loglikelihood", *pairs)
    for mine, his in zip(ours.loglikelihood(scored), theirs.loglikelihood(scored), strict=True):
        assert mine[0] == pytest.approx(his[0], rel=1e-5) and mine[1] == his[1]
    whole = asked("loglikelihood_rolling", ("the captain saw a whale",), ("réef said the storm " * 20,))
    assert ours.loglikelihood_rolling(whole) == pytest.approx(theirs.loglikelihood_rolling(whole), rel=1e-5)
    settings = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    write = asked("generate_until", ("the sea", settings), ("<|turn|>user: a", settings))
    assert ours.generate_until(write) == theirs.generate_until(write)


def test_a_missing_package_of_the_dashboard_is_refused_before_the_import_and_the_remedy_works(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    options = [option for option in zoo.options(f"source={zoo.source('llama')}", f"to={run}") if option != "tracking=none"]
    assert import_hf.main([*options, "tracking=trackio", "score=false"]) == 0  # logs nothing
    before = contents(run)
    monkeypatch.setitem(sys.modules, "trackio", None)  # what Python itself does to say: there is no such module
    for to in (run, tmp_path / "new"):
        with pytest.raises(UserError, match=r"needs the package trackio: pip install .*, or take .* tracking=none"):
            import_hf.main([*options, f"to={to}", "tracking=trackio", f"source={tmp_path / 'not even looked for'}"])
    assert contents(run) == before and not (tmp_path / "new").exists()
    assert import_hf.main([*options, "tracking=none"]) == 0 and summary_of(run)["loss"] > 0


def test_a_validation_split_of_other_content_is_not_what_an_import_is_scored_on(zoo: Zoo, tmp_path: Path) -> None:
    command = zoo.options(f"source={zoo.source('llama')}", f"to={tmp_path / 'run'}", f"data_dir={tmp_path / 'data'}")
    assert import_hf.main(command) == 0
    (tmp_path / "run" / "summary.json").unlink()
    (file,) = tmp_path.glob("data/*/validation.bin")
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(
        UserError, match=rf"is imported but not scored.*validation\.bin has other content .*: delete {file.parent}"
    ):
        import_hf.main(command)
    shutil.rmtree(file.parent)
    assert import_hf.main(command) == 0 and (tmp_path / "run" / "summary.json").exists()


def test_data_that_is_missing_costs_the_score_and_not_the_import(zoo: Zoo, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        f"source={zoo.source('llama')}",
        f"to={run}",
        "dataset=local",
        "device=cpu",
        f"data_dir={tmp_path}",
        "tracking=none",
    ]
    with pytest.raises(UserError, match=r"is imported but not scored, and the same command scores it later: .*nowhere"):
        import_hf.main([*command, f"dataset.path={tmp_path / 'nowhere.txt'}"])
    assert difference(loaded(run), zoo.model("llama")) < 1e-5


def test_windows_become_those_of_our_layers(zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "qwen3, three windows and none in turns"
    trained = zoo.bring(zoo.source(name), tmp_path / "run")
    said = capsys.readouterr().out
    assert "5 of 6 layers see the newest 8 tokens alone; with max_seq_len=8 all would see all" in said
    token = 2 * 2 * 16 * 2  # bytes of a layer, in bfloat16
    assert f"{6 * token:,} bytes per token in bfloat16, {token * (5 * 8 + 64):,} at 64 tokens" in said
    attention = trained.config.attention
    assert (attention["name"], attention["layers"]) == ("swa", ["local", "local", "local", "full"])
    assert [layer.window for layer in trained.model.attentions] == [8, 8, 8, None, 8, 8]
    assert zoo.bring(zoo.source("mistral, windows"), tmp_path / "all").config.attention["window"] == 7
    exported = tmp_path / "back"
    assert export.main([f"run={tmp_path / 'run'}", f"to={exported}"]) == 0
    assert "Qwen3ForCausalLM" in capsys.readouterr().out
    theirs = zoo.model(name).config.to_dict()
    kept = {"layer_types", "sliding_window", "use_sliding_window", "head_dim", "num_key_value_heads"}
    written = json.loads((exported / "config.json").read_text())
    assert {field: written[field] for field in kept} == {field: theirs[field] for field in kept}


def test_within_a_sliding_window_no_layer_has_one(zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = zoo.source("mistral, windows")
    trained = zoo.bring(source, tmp_path / "run", "max_seq_len=7")
    assert "newest" not in capsys.readouterr().out
    assert [layer.window for layer in trained.model.attentions] == [None, None]
    assert trained.model.max_seq_len == 7 and difference(trained, zoo.model("mistral, windows"), 7) < 1e-5


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """All tensors of a folder changed and put into one file."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("llama", "mtp.layers.0.mlp.up_proj.weight"),
        ("qwen3_5_text, gated DeltaNet", "mtp.layers.0.mlp.up_proj.weight"),
        ("qwen3_5_text, gated DeltaNet", "model.visual.patch_embed.proj.bias"),
        ("qwen3_5_text, gated DeltaNet", "model.layers.61.mlp.up_proj.weight"),
        ("deepseek_v3", "model.layers.61.mlp.up_proj.weight"),
        ("deepseek_v3", "model.layers.2.mlp.up_proj.weight"),
    ],
)
def test_what_their_class_leaves_out_is_left_out_and_said_and_nothing_else(
    zoo: Zoo, name: str, tensor: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    source = shutil.copytree(zoo.source(name), tmp_path / "theirs")
    rewritten(source, lambda tensors: tensors.update({tensor: torch.ones(3)}))
    _, info = transformers.AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
    if info["unexpected_keys"]:
        with pytest.raises(UserError, match=f"^{re.escape(tensor)} is in the weight files and has no place"):
            zoo.bring(source, tmp_path / "run")
        return
    assert difference(zoo.bring(source, tmp_path / "run"), zoo.model(name)) < 1e-5
    assert capsys.readouterr().out.count(f"left out, as transformers does, 1 tensor: {tensor}\n") == 1


@pytest.mark.parametrize(("same", "tied"), [(True, True), (False, False)])
def test_a_head_that_is_said_to_be_tied_and_stands_there_is_believed(zoo: Zoo, same: bool, tied: bool, tmp_path: Path) -> None:
    source = zoo.changed("llama", tmp_path / "theirs", tie_word_embeddings=True)
    if same:
        rewritten(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    trained = zoo.bring(source, tmp_path / "run")
    assert (trained.model.head.weight is trained.model.embedding.weight) is tied
    assert ("head.weight" in weights_of(tmp_path / "run")) is not tied


def test_a_head_that_is_missing_is_the_embedding(zoo: Zoo, tmp_path: Path) -> None:
    name = "llama, tied, wide heads"
    source = zoo.changed(name, tmp_path / "theirs", tie_word_embeddings=False)
    assert difference(zoo.bring(source, tmp_path / "run"), zoo.model(name)) < 1e-5


MOE = {"n_routed_experts": 8, "first_k_dense_replace": 1}


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        (
            "llama",
            {"model_type": "gemma3"},
            r"model_type=gemma3, which has four norms .*, is not covered by the import; covered are",
        ),
        ("llama", {"model_type": "phi"}, r"model_type=phi is not covered by the import; covered are llama, mistral, minist"),
        ("llama", {"model_type": ABSENT, "architectures": ABSENT}, r"model_type=null is not covered"),
        ("llama", {"model_type": ["llama"]}, r"model_type=\['llama'\] is not covered"),
        ("llama", {"architectures": ["LlamaModel"]}, r"architectures=LlamaModel is not covered"),
        ("llama", {"hidden_act": "gelu"}, r'hidden_act="gelu" of the config.json is not covered'),
        ("llama", {"partial_rotary_factor": 0.5}, r"^partial_rotary_factor=0.5 .* rotated whole"),
        (
            "phi3",
            {"rope_parameters": {"partial_rotary_factor": 1.5}},
            r"^rope_parameters.partial_rotary_factor=1.5 .* at most 1",
        ),
        (
            "phi3",
            {"rope_parameters": {"partial_rotary_factor": 0.6}},
            r"rotary_fraction=0.583\d+ of head_dim=12 is 7 dimensions",
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}},
            r"rope_scaling.rope_type=longrope .* not covered; covered are default$",
        ),
        # Which its class reads as longrope.
        ("phi3", {"rope_scaling": YARN}, r"rope_scaling.rope_type=yarn .* not covered; covered are default$"),
        ("phi3", {"sliding_window": 7, "layer_types": ["full_attention"] * 2}, r"layer_types=.* is not read by its class"),
        (
            "mistral, windows",
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types=.* is not read by its class, which gives every layer the window",
        ),
        (
            "qwen3_5_text",
            {"layer_types": ["sliding_attention", "full_attention"]},
            r"layer_types=.* names layers that are not covered$",
        ),
        ("qwen3_5_text", {"layer_types": ["full_attention"]}, r"layer_types=.* names 1 layers for num_hidden_layers=2"),
        (
            "qwen3_5_text, gated DeltaNet",
            {"layer_types": ABSENT},  # as its class has it: the fourth alone were full
            r"^model.layers.1.linear_attn.A_log is in none of the weight files",
        ),
        ("qwen3_5_text, gated DeltaNet", {"linear_num_key_heads": 3}, r"n_v_heads=4 do not share n_k_heads=3 heads"),
        ("qwen3_5_text, gated DeltaNet", {"linear_conv_kernel_dim": 0}, r"^linear_conv_kernel_dim=0 .* at least 1"),
        ("qwen3_5_text", {"model_type": "qwen3_5"}, r"model_type=qwen3_5, which sees images,"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0, "partial_rotary_factor": 0.5}},
            r"rope_parameters.partial_rotary_factor=0.5",
        ),
        ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, r"rope_scaling.rope_type=longrope"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope_scaling.rope_type=dynamic"),
        ("llama", {"rope_scaling": {"rope_type": "proportional"}}, r"rope_type=proportional .* is not covered"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": -1}}, r"rope_scaling.factor=-1 must be a number"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 9.0}}}, r"rope_parameters=.* one group of fields"),
        ("llama", {"rope_parameters": {"rope_theta": "big"}}, r"rope_theta=big of the config.json must be a number"),
        ("llama", {"mlp_bias": True}, r"mlp_bias=true .* beside attention_bias=true only"),
        ("llama", {"attention_bias": "no"}, r'attention_bias="no" .* must be true or false'),
        ("llama", {"num_key_value_heads": 3}, r"num_key_value_heads=3 .* does not divide num_attention_heads=4"),
        (
            "llama",
            {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": ABSENT},
            r"hidden_size=48 .* is no multiple of num_attention_heads=5",
        ),
        ("llama", {"hidden_size": ABSENT}, r"the config.json has no hidden_size, .*: add the field"),
        ("llama", {"hidden_size": None}, r"hidden_size=null of the config.json must be a whole number"),
        ("llama", {"num_hidden_layers": True}, r"num_hidden_layers=true of the config.json must be a whole number"),
        ("llama", {"num_hidden_layers": 10**9}, r"num_hidden_layers=1000000000 .* is more than any model has \(2,048\)"),
        ("llama", {"max_position_embeddings": 2**26}, r"max_position_embeddings=67108864 .* more than any model has"),
        ("llama", {"architectures": 3}, r"architectures=3 of the config.json must be a list of names"),
        ("llama", {"rms_norm_eps": 0}, r"rms_norm_eps=0 of the config.json must be a number above 0"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, r"quantization_config .* quantised weights"),
        ("llama", {"use_bidirectional_attention": True}, r"use_bidirectional_attention=true"),
        ("llama", {"per_layer_config": {"0": {}}}, r"per_layer_config"),
        ("llama", {"num_hidden_layers": 3}, r"model.layers.2.\S+ is in none of the weight files"),
        ("llama", {"num_hidden_layers": 1}, r"model.layers.1.\S+ is in the weight files and has no place"),
        ("llama", {"intermediate_size": 96}, r"gate_proj.weight is \(80, 48\) in \S+ and \(96, 48\) by config.json"),
        ("llama", {"vocab_size": 304}, r"embed_tokens.weight is \(305, 48\) in \S+ and \(304, 48\)"),
        ("llama", {"vocab_size": 299}, r"has 300 tokens and the embedding vocab_size=299 rows"),
        ("llama", {"attention_bias": True}, r"self_attn.\w+.bias is in none of the weight files"),
        ("qwen2", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, r"_proj.bias is in the weight files"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention", "linear"]},
            r"layer_types=",
        ),
        ("ministral", {"layer_types": ["sliding_attention"]}, r"layer_types=.* names 1 layers for num_hidden_layers=2"),
        ("llama", {"model_type": "gemma2"}, r"model_type=gemma2, which has four norms a block, caps .*, is not covered by the"),
        ("llama", {"model_type": "gpt_oss"}, r"model_type=gpt_oss, which routes tokens to experts .*swa_sinks\), is not cov"),
        ("deepseek_v3", MOE, r"n_routed_experts=8 .* with first_k_dense_replace=1 makes layers of experts"),
        ("deepseek_v2", MOE | {"first_k_dense_replace": None}, r"n_routed_experts=8 .* first_k_dense_replace=0"),
        ("deepseek_v3", {"qk_rope_head_dim": 0}, r"qk_rope_head_dim=0 .* at least 1"),
        ("deepseek_v3", {"kv_lora_rank": 48, "qk_nope_head_dim": 2, "v_head_dim": 2}, r"kv_lora_rank=48 compresses nothing"),
        (
            "deepseek_v3",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}},
            r"rope_scaling.mscale_all_dim=1.0 .* with yarn only",
        ),
    ],
)
def test_what_is_not_covered_is_refused_by_name_and_nothing_is_written(
    zoo: Zoo, name: str, fields: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    source = zoo.changed(name, tmp_path / "theirs", **fields)
    refused_by(zoo, source, tmp_path / "runs" / "run", sentence)


def refused_by(zoo: Zoo, source: Path, target: Path, sentence: str, *more: str) -> None:
    before = contents(source)
    with pytest.raises(UserError, match=sentence) as refused:
        import_hf.main(zoo.options(f"source={source}", f"to={target}", *more))
    assert len(str(refused.value).splitlines()) == 1
    assert not target.parent.exists() and contents(source) == before


def shard(folder: Path, index: int = 1) -> Path:
    return sorted(folder.glob("*.safetensors"))[index]


def damage_header(folder: Path) -> None:
    shard(folder).write_bytes(b"\x10\0\0\0\0\0\0\0{'no': json      ")


def claim_terabytes(folder: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    shard(folder).write_bytes(len(header).to_bytes(8, "little") + header)


def claim_a_long_header(folder: Path) -> None:
    shard(folder).write_bytes((2**60).to_bytes(8, "little") + b"{}")


def overlap(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"x": entry, "y": entry}).encode()
    shard(folder).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)


def wrong_count(folder: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    shard(folder).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)


def truncate(folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:-1])


def pickle_only(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")


def no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def climbing_shard(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../secret.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def twice(folder: Path) -> None:
    shutil.copy(shard(folder, 2), shard(folder))


def other_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    return lambda folder: rewritten(folder, change)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"has no config.json"),
        (
            lambda folder: (folder / "config.json").write_text("[1]"),
            r"config.json cannot be read as JSON \(it holds no JSON object\)",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"has no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), r"is not a tokenizer.json"),
        (
            lambda folder: shard(folder).unlink(),
            r"model-00002-of-\d+.safetensors, a shard that model.safetensors.index.json names, is not in",
        ),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), r"has no weight_map"),
        (damage_header, r"is no safetensors file \(its header: "),
        (claim_terabytes, r"its header: incomplete metadata, file not fully covered"),
        (claim_a_long_header, r"is no safetensors file \(its header: header too large\)"),
        (truncate, r"its header: incomplete metadata, file not fully covered"),
        (overlap, r"its header: invalid offset for tensor `[xy]`"),
        (wrong_count, r"its header: invalid shape, data type, or offset"),
        (pickle_only, r"has pickled weights only \(pytorch_model.bin\), .* convert them to safetensors"),
        (no_weights, r"has neither model.safetensors nor"),
        (climbing_shard, r"names ../secret.safetensors as a shard"),
        (twice, r"\S+ stands in \S+ and in \S+: remove the shard"),
        (other_tensors(lambda t: t.pop("model.norm.weight")), r"model.norm.weight is in none of the weight files"),
        (other_tensors(lambda t: t.update({"model.norm.bias": torch.ones(48)})), r"model.norm.bias is in the weight files"),
        (
            other_tensors(lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)})),
            r"model.norm.weight is of I8, which is not read",
        ),
    ],
)
def test_files_that_are_damaged_or_missing_are_refused_and_nothing_is_written(
    zoo: Zoo, damage: Callable[[Path], object], sentence: str, tmp_path: Path
) -> None:
    source = shutil.copytree(zoo.source("llama"), tmp_path / "theirs")
    damage(source)
    refused_by(zoo, source, tmp_path / "runs" / "run", sentence)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["max_seq_len=65"], r"max_seq_len=65 must be between 1 and the model's max_position_embeddings=64"),
        (["max_seq_len=0"], r"max_seq_len=0 must be between"),
        (["dataset=nowhere"], r"dataset=nowhere does not exist"),
        (["dataset=mqar", "dataset.path=null"], r"it takes tokenizer=bytes"),
        (["to=runs/a name"], r"runs/a name must end in one plain folder name"),
        (["source=", "to=runs/x"], r"source= is missing"),
        (["to="], r"to= is missing"),
        (["source=./nowhere"], r"source=./nowhere does not exist"),
        (["source=a/b/c"], r"source=a/b/c does not exist"),
        (["sauce=x"], r"sauce is not an option here; did you mean source\?"),
        (["device=gpu"], r"device=gpu is unknown"),
    ],
)
def test_options_that_make_no_sense_are_refused(zoo: Zoo, options: list[str], sentence: str, tmp_path: Path) -> None:
    refused_by(zoo, zoo.source("llama"), tmp_path / "runs" / "run", sentence, *options)


def test_a_target_that_holds_something_is_left_as_it_was(zoo: Zoo, tmp_path: Path) -> None:
    target = tmp_path / "run"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists and is no empty folder"):
        import_hf.main(zoo.options(f"source={zoo.source('llama')}", f"to={target}"))
    assert contents(tmp_path) == {"run/mine.txt": b"mine"}


# The system's own count of the peak: getrusage's would be at least that of the process that started this one.
_MEASURED = """
import re, sys
from pathlib import Path
from harness.hf import importing
from harness.hf.checkpoint_files import find_checkpoint

def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

plan = importing.plan_import(find_checkpoint(sys.argv[1]), Path(sys.argv[2]), overrides=[], max_seq_len=None)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = kilobytes("VmRSS")
importing.import_model(plan, Path(sys.argv[2]))
print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read off Linux's /proc")
def test_no_more_than_a_few_tensors_are_ever_in_memory(zoo: Zoo, tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=305,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "theirs", max_shard_size="16MB")
    zoo.tokenizer.save(tmp_path / "theirs")
    sizes = [path.stat().st_size for path in (tmp_path / "theirs").glob("*.safetensors")]
    assert len(sizes) >= 6 and sum(sizes) > 100e6
    child = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(tmp_path / "theirs"), str(tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(child.stdout) < 12e6  # the largest tensor has 3.1 MB
    assert sum(tensor.nbytes for tensor in weights_of(tmp_path / "run").values()) > 100e6


# --- from the hub ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    shutil.copytree(zoo.source("qwen2"), tmp_path / "hub/models/someone/small")
    (tmp_path / "hub/models/someone/small/pytorch_model.bin").write_bytes(b"never fetched")
    for key in [key for key in os.environ if key.startswith("HF_") or "proxy" in key.lower()]:
        monkeypatch.delenv(key)
    with HubServer(tmp_path / "hub") as hub:
        yield hub


def from_hub(forks: Forks, zoo: Zoo, hub: HubServer, name: str, to: Path, **environment: str) -> Ended:
    """In a process of its own: the hub's library reads its environment once."""
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub.root / "home")} | environment
    options = zoo.options(f"source={name}", f"to={to}", "score=false")
    return forks.run("scripts/import_hf.py", *options, environment=ours)


def test_a_model_comes_from_the_hub_through_faults_and_again_offline(
    forks: Forks, zoo: Zoo, hub: HubServer, tmp_path: Path
) -> None:
    hub.cut, hub.unavailable = 1, 1
    first = from_hub(forks, zoo, hub, "someone/small", tmp_path / "run")
    assert first.status == 0, first.errors
    assert f"someone/small at {REVISION}: Qwen2ForCausalLM" in first.output
    assert difference(loaded(tmp_path / "run"), zoo.model("qwen2")) < 1e-5
    origin = json.loads((tmp_path / "run" / "origin.json").read_text())
    assert (origin["source"], origin["revision"]) == ("someone/small", REVISION)
    assert hub.downloads["pytorch_model.bin"] == 0 and hub.downloads["generation_config.json"] == 1
    hub.silent = True
    hub.requests.clear()
    named = f"someone/small@{REVISION}"
    again = from_hub(forks, zoo, hub, named, tmp_path / "again", HF_HUB_OFFLINE="1")
    assert again.status == 0 and not hub.requests, again.errors
    first_weights, weights = weights_of(tmp_path / "run"), weights_of(tmp_path / "again")
    assert all(torch.equal(first_weights[key], weights[key]) for key in first_weights)


def test_wrong_bytes_of_the_right_length_are_not_believed(forks: Forks, zoo: Zoo, hub: HubServer, tmp_path: Path) -> None:
    hub.corrupt = True
    result = from_hub(forks, zoo, hub, "someone/small", tmp_path / "run")
    assert result.status == 2 and "is not what the hub states of config.json: delete it" in result.errors
    assert not (tmp_path / "run").exists()


def test_what_the_hub_does_not_have_is_said_in_one_sentence(forks: Forks, zoo: Zoo, hub: HubServer, tmp_path: Path) -> None:
    result = from_hub(forks, zoo, hub, "someone/else", tmp_path / "run")
    assert result.status == 2 and result.errors.startswith("error: ") and "does not have the model" in result.errors
    offline = from_hub(forks, zoo, hub, "someone/small", tmp_path / "run", HF_HUB_OFFLINE="1")
    assert offline.status == 2 and "name a folder of this machine that holds the model" in offline.errors
    assert len(result.errors.splitlines()) == len(offline.errors.splitlines()) == 1
