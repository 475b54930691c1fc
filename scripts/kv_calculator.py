"""The size of a KV cache, for any model: python scripts/kv_calculator.py --config path/to/config.json --context 32768.

config     a Hugging Face config.json, or a folder that holds one
run        a run of ours, by folder or name: formula and measured buffers side by side
attention=NAME model=NAME and further overrides as for train_model.py: one of our configurations, likewise

dtype      bfloat16    bf16, fp16, fp32, fp8 or int8; the last two without a quantised cache's scales
context    null        tokens a sequence; null: 4,096 for a config.json, model.max_seq_len for ours
batch      1           sequences
memory_gb  null        how many sequences fit into so many GB (1e9 bytes) of cache
json       false       true: one JSON object and nothing else
runs_dir   runs

Every option may be written key=value, --key value or --key=value. Known model types: axk1 axk2 bailing_hybrid cohere2
deepseek_v2 deepseek_v3 deepseek_v32 gemma gemma2 gemma3 gemma3_text glm4 glm4_moe glm4_moe_lite glm5_next
glm_moe_dsa gpt2 gpt_neox gpt_oss granite hy_v4 kimi_k2 kimi_k25 kimi_linear llama longcat_flash minicpm3 ministral
ministral3 mistral mistral3 mistral4 mistral_large4 mixtral olmo olmo2 olmo3 phi phi3 phimoe qwen2 qwen2_moe qwen3
qwen3_moe qwen3_next seed_oss smollm3 starcoder2 youtu. Any other is refused.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.bootstrap import ROOT, enter_environment

enter_environment()

import difflib
import json
from typing import TYPE_CHECKING, Any

from harness.command_line import parse_options, run_script
from harness.config import did_you_mean, find_run, load_run_config, load_train_config, user_path
from harness.errors import UserError
from harness.schema import TrainConfig

if TYPE_CHECKING:
    from harness.evaluation.kv_calculator import CacheDescription, LatentShape


@dataclass
class CalculatorOptions:
    config: str | None = None
    run: str | None = None
    dtype: str | None = None
    context: int | None = None
    batch: int = 1
    memory_gb: float | None = None
    json: bool = False
    runs_dir: str = str(ROOT / "runs")


OPTIONS = [option.name for option in fields(CalculatorOptions)]
HF_CONTEXT = 4096


def main(arguments: list[str]) -> int:
    given = without_flags(arguments)
    options = parse_options(CalculatorOptions, [word for word in given if word.partition("=")[0] in OPTIONS])
    overrides = [word for word in given if word.partition("=")[0] not in OPTIONS]
    check(options, overrides)

    from harness.evaluation.hf_config import describe_config
    from harness.evaluation.kv_calculator import DTYPES, report, table

    measured: dict[str, Any] = {}
    if options.config is not None:
        name, config_json = read_config_json(options.config)
        description = describe_config(config_json, name=name)
        dtype, context = options.dtype or "bfloat16", options.context or HF_CONTEXT
    else:
        if options.run is not None:
            folder = find_run(options.run, user_path(options.runs_dir))
            config, name = load_run_config(folder), folder.name
        else:
            config = load_train_config(["name=calculator", *overrides])
            more = [word for word in overrides if word.partition("=")[0] not in ("attention", "model")]
            name = " ".join([f"attention={config.attention['name']} model={config.model.name}", *more])
        dtype = options.dtype or (config.cache.dtype if config.cache.dtype in DTYPES else "bfloat16")
        context = options.context or config.model.max_seq_len
        description, measured = describe_ours(config, name=name, dtype=dtype)
    figures = report(
        description, dtype=dtype, context=context, batch=options.batch, memory_gb=options.memory_gb
    ) | measured  # fmt: skip
    if options.json:
        print(json.dumps(figures))
    else:
        print("\n".join(table(figures)))
    return 0


def without_flags(arguments: list[str]) -> list[str]:
    """--key value, --key=value and --json as key=value; everything else unchanged."""
    words, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            words.append(word)
            continue
        if not equals and key == "json":
            value = "true"
        elif not equals and (not rest or rest[0].startswith("--")):
            raise UserError(f"{word} needs a value: write {word} VALUE")
        elif not equals:
            value = rest.pop(0)
        words.append(f"{key.replace('-', '_')}={value}")
    return words


def check(options: CalculatorOptions, overrides: list[str]) -> None:
    """Raises UserError for options that are unknown, impossible or do not go together."""
    from harness.evaluation.kv_calculator import DTYPES

    if options.dtype is not None and options.dtype not in DTYPES:
        raise UserError(f"dtype={options.dtype} is unknown; {did_you_mean(options.dtype, list(DTYPES))}")
    for key, value in (("context", options.context), ("batch", options.batch)):
        if value is not None and value < 1:
            raise UserError(f"{key}={value} is too small; choose 1 or more")
    if options.memory_gb is not None and options.memory_gb <= 0:
        raise UserError(f"memory_gb={options.memory_gb:g} is too small; choose more than 0")
    if options.config is not None and options.run is not None:
        raise UserError(f"config={options.config} and run={options.run} are two models; give one")
    whole = next((f"{key}=..." for key in ("config", "run") if getattr(options, key) is not None), None)
    for key, equals, _ in (word.partition("=") for word in overrides):
        near = difflib.get_close_matches(key, OPTIONS, n=1, cutoff=0.75)
        if near and key not in {field.name for field in fields(TrainConfig)}:
            raise UserError(f"{key} is not an option here; did you mean {near[0]}?")
        if whole is not None:
            remedy = f"it stands beside {whole}, which is a whole model: leave one out"
            raise UserError(f"{key}{equals}{'...' if equals else ''} changes one of our configurations, and {remedy}")


def read_config_json(text: str) -> tuple[str, dict[str, Any]]:
    """(a name, the object) from a config.json or a folder that holds one. Raises UserError when there is none."""
    path = user_path(text)
    if path.is_dir() and (path / "config.yaml").is_file() and not (path / "config.json").is_file():
        raise UserError(f"config={text} is a run of ours; write run={text}")
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"config={text}: {file} does not exist; download the model's config.json and name it, or its "
                        f"folder") from None  # fmt: skip
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"config={text}: {file} cannot be read as JSON ({error}); name a Hugging Face config.json") \
            from None  # fmt: skip
    if not isinstance(config, dict):
        raise UserError(f"config={text}: {file} holds no JSON object; name a Hugging Face config.json")
    return (file.resolve().parent.name if file.name == "config.json" else file.stem), config


def describe_ours(config: TrainConfig, *, name: str, dtype: str) -> tuple[CacheDescription, dict[str, Any]]:
    """The cache of one of our configurations by formula, and what its allocated buffers hold."""
    import torch

    from harness.build import build_model
    from harness.evaluation.cache_size import measure_cache
    from harness.evaluation.kv_calculator import DTYPES, describe_model

    with torch.device("meta"):
        model = build_model(config, vocab_size=64)
    description = describe_model(
        model, name=name, variant=config.attention["name"], latent=latent_shape(config),
        mha_elements=2 * config.model.n_heads * config.model.head_dim,
    )  # fmt: skip
    dtypes = {4: torch.float32, 2: torch.bfloat16, 1: torch.float8_e4m3fn if dtype == "fp8" else torch.int8}
    size = measure_cache(model, dtype=dtypes[DTYPES[dtype]])
    elements = list(size.elements_per_token_by_layer)
    measured = {
        "elements_per_token_per_layer": elements[0] if len(set(elements)) == 1 else elements,
        "elements_per_token": sum(elements),
        "bytes_per_token": size.bytes_per_token,
    }
    return description, {"measured": measured}


def latent_shape(config: TrainConfig) -> LatentShape | None:
    """The sizes of MLA as DeepSeek-V2 has it; None for every other variant or choice."""
    from harness.evaluation.kv_calculator import LatentShape

    attention = config.attention
    paper = {"mechanism": "mla", "n_kv_heads": config.model.n_heads, "kv_latent": "joint", "latent_norm": "rms",
             "latent_norm_place": "latent", "sharing": "none"}  # fmt: skip
    if any(attention.get(key) != value for key, value in paper.items()) or config.model.bias:
        return None
    if attention["positions"] == "rope_after_up":
        return None
    sizes = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return LatentShape(config.model.d_model, config.model.n_heads, *(attention[size] for size in sizes))


if __name__ == "__main__":
    run_script(main, description=__doc__)
