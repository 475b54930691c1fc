"""The size of a KV cache, for any model: python scripts/kv_calculator.py --config path/to/config.json --context 32768.

A config.json may be of any type for which transformers has a causal language model of its own, alone or inside a wrapper:
that class runs a few tokens without weights, and its cache is measured. Code beside the config.json is never run. By
formula, since transformers has no class of them: baichuan chatglm deepseek exaone internlm2 kimi_k2 mimo qwen step3_text
xverse. Any other type is refused.

With attention=NAME model=NAME and further overrides as for train_model.py it is one of our configurations, formula and
measured buffers side by side. Every option may be written key=value, --key value or --key=value. dtype: fp32, fp16, bf16;
fp8, int8, fp4, int4, int2 without scales; with their scales mxfp8, mxfp4, nvfp4, llama.cpp's q8_0 q5_1 q5_0 q4_1 q4_0
iq4_nl and mlx-lm's 8bit 6bit 5bit 4bit 3bit 2bit; of our configurations also k8v4, kc4v4 and their like, and int4_rotated.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import ROOT, enter_environment

enter_environment()

import dataclasses
import json
import re
from typing import TYPE_CHECKING, Annotated, Any

from harness.config.checks import typed_attention
from harness.config.compose import load_train_config
from harness.config.places import user_path
from harness.config.run_config import find_run, load_run_config
from harness.config.schema import TrainConfig
from harness.entry.cli import options_and_overrides, run_script
from harness.errors import UserError, as_user_error
from harness.files.text import visible
from harness.hf.config_json import OWN_TYPE, own_model, refuse_absent, their_json
from modeling.cache_formats import PAIR, ROTATED, read_format
from modeling.refusal import Refusal

if TYPE_CHECKING:
    from harness.decode.kv_calculator import CacheDescription, Format, LatentShape


@dataclass
class CalculatorOptions:
    config: Annotated[str | None, "a Hugging Face config.json, or a folder that holds one"] = None
    run: Annotated[str | None, "a run of ours, by folder or name: formula and measured buffers side by side"] = None
    dtype: Annotated[str | None, "what an element is stored in, see above; null: bfloat16"] = None
    context: Annotated[
        str | None, "tokens a sequence, 128k for 131,072; null: 4,096 for a config.json, model.max_seq_len for ours"
    ] = None
    batch: Annotated[int, "sequences"] = 1
    tp: Annotated[int, "tensor-parallel devices: the figures of one of them"] = 1
    memory_gb: Annotated[float | None, "how many sequences fit into so many GB (1e9 bytes) of cache"] = None
    json: Annotated[bool, "one JSON object and nothing else"] = False
    runs_dir: Annotated[str, "where runs are looked for"] = str(ROOT / "runs")


HF_CONTEXT = 4096


def main(arguments: list[str]) -> int:
    options, overrides = options_and_overrides(CalculatorOptions, without_flags(arguments))
    check(options, overrides)

    from harness.decode.kv_calculator import cache_figures, cache_table
    from harness.hf.cache import describe_apart

    asked = tokens(options.context)
    measured: dict[str, Any] = {}
    stored = None
    if options.config is not None:
        name, config_json = read_config_json(options.config)
        dtype, context = options.dtype or "bfloat16", asked or HF_CONTEXT
        if config_json.get("model_type") == OWN_TYPE:
            description, measured, stored = describe_ours(exported(config_json), name=name, dtype=dtype, context=context)
        else:
            description = describe_apart(config_json, name=name, context=context)
    else:
        if options.run is not None:
            folder = find_run(options.run, user_path(options.runs_dir))
            config, name = load_run_config(folder), folder.name
        else:
            config = load_train_config(["name=calculator", *overrides])
            more = [word for word in overrides if word.partition("=")[0] not in ("attention", "model")]
            name = " ".join([f"attention={config.attention['name']} model={config.model.name}", *more])
        dtype = options.dtype or config.cache.dtype
        context = asked or config.model.max_seq_len
        description, measured, stored = describe_ours(config, name=name, dtype=dtype, context=context)
    figures = cache_figures(
        description,
        dtype=dtype,
        context=context,
        batch=options.batch,
        memory_gb=options.memory_gb,
        tp=options.tp,
        stored=stored,
    ) | (measured if options.tp == 1 else {})
    if options.json:
        print(json.dumps(figures))
    else:
        print("\n".join(map(visible, cache_table(figures))))
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
    from harness.decode.kv_calculator import format_named

    if options.dtype is not None and not is_format(options.dtype):
        if PAIR.match(options.dtype) or options.dtype.endswith(ROTATED):  # of our own caches alone, and wrong
            with as_user_error("dtype="):
                read_format(options.dtype)
        format_named(options.dtype)
    for key, value in (("context", tokens(options.context)), ("batch", options.batch), ("tp", options.tp)):
        if value is not None and value < 1:
            raise UserError(f"{key}={value} is too small; choose 1 or more")
    if options.memory_gb is not None and options.memory_gb <= 0:
        raise UserError(f"memory_gb={options.memory_gb:g} is too small; choose more than 0")
    if options.config is not None and options.run is not None:
        raise UserError(f"config={options.config} and run={options.run} are two models; give one")
    whole = next((f"{key}=..." for key in ("config", "run") if getattr(options, key) is not None), None)
    for key, equals, _ in (word.partition("=") for word in overrides):
        if whole is not None:
            remedy = f"it stands beside {whole}, which is a whole model: leave one out"
            raise UserError(f"{key}{equals}{'...' if equals else ''} changes one of our configurations, and {remedy}")


def tokens(text: str | None) -> int | None:
    """A number of tokens: 4096, 4_096, 128k (1,024 each) or 1M. Raises UserError for anything else."""
    if text is None:
        return None
    number = re.fullmatch(r"(-?\d{1,12}(?:[_,]\d{3})*)([kKmM]?)", text)
    if number is None:
        raise UserError(f"context={text} must be a whole number of tokens, as 32768 or 128k")
    return int(number[1].replace("_", "").replace(",", "")) * {"": 1, "k": 1024, "m": 1024**2}[number[2].lower()]


def read_config_json(text: str) -> tuple[str, dict[str, Any]]:
    """(a name, the object) from a config.json or a folder that holds one. Raises UserError when there is none."""
    path = user_path(text)
    if path.is_dir() and (path / "config.yaml").is_file() and not (path / "config.json").is_file():
        raise UserError(f"config={text} is a run of ours; write run={text}")
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"config={text}: {file} does not exist; download the model's config.json and name it, or its folder")
    return (file.resolve().parent.name if file.name == "config.json" else file.stem), their_json(file)


def describe_ours(
    config: TrainConfig, *, name: str, dtype: str, context: int
) -> tuple[CacheDescription, dict[str, Any], Format | None]:
    """The cache of one of our configurations by formula, and what its allocated buffers hold.

    Besides, of a format that our caches alone are kept in: what it takes of them.
    """

    from harness.config.build import build_model
    from harness.decode.kv_calculator import FORMATS, Format, describe_model, format_named
    from harness.evaluation.cache_size import measure_cache
    from modeling.attention.quantisation import GROUP, cache_format
    from modeling.shapes import shapes_only

    with shapes_only():
        model = build_model(config, vocab_size=64)
    named = dtype if is_format(dtype) else format_named(dtype)[0]
    ours = is_format(named)  # otherwise a format in which our caches are not kept
    kept = cache_format(named if ours else "bfloat16")
    description = describe_model(
        model,
        name=name,
        variant=config.attention["name"],
        dtype=kept,
        context=context,
        latent=latent_shape(config),
        mha_elements=2 * config.model.n_heads * config.model.head_dim,
    )
    size = measure_cache(model, dtype=kept)
    elements = list(size.elements_per_token_by_layer)
    stored = None
    if ours and named not in FORMATS:
        waiting = f"; the newest {GROUP} tokens' keys, in 16 bits, are counted as states" if kept.by_channel else ""
        said = f"scales, and parts kept in 16 bits, counted{waiting}"
        stored = Format(round(size.held_bytes_per_token * GROUP), sum(elements) * GROUP, said)
    measured = {
        "elements_per_token_per_layer": elements[0] if len(set(elements)) == 1 else elements,
        "elements_per_token": sum(elements),
        "bytes_per_token": size.held_bytes_per_token if ours else None,
        "state_bytes": size.state_bytes,
    }
    return description, {"measured": measured}, stored


def is_format(name: str) -> bool:
    """Whether our caches can be kept so."""
    try:
        read_format(name)
    except Refusal:
        return False
    return True


def exported(config_json: dict[str, Any]) -> TrainConfig:
    """A configuration of ours with the model and attention of a folder that scripts/export.py wrote."""
    shape = {name: config_json.get(name) for name in ("model", "attention")}
    refuse_absent(shape)
    base = load_train_config(["name=calculator"])
    return dataclasses.replace(base, model=own_model(shape["model"]), attention=typed_attention(shape["attention"]))


def latent_shape(config: TrainConfig) -> LatentShape | None:
    """The sizes of MLA as DeepSeek-V2 has it; None for every other variant or choice."""
    from harness.decode.kv_calculator import LatentShape

    attention = config.attention
    paper = {
        "mechanism": "mla",
        "n_kv_heads": config.model.n_heads,
        "kv_latent": "joint",
        "latent_groups": 1,
        "gate": "none",
        "latent_norm": "rms",
        "latent_norm_place": "latent",
        "sharing": "none",
        "qk_norm": False,
        "sink_logits": False,
    }
    if any(attention.get(key) != value for key, value in paper.items()) or config.model.bias or "layers" in attention:
        return None
    if attention["positions"] == "rope_after_up":
        return None
    sizes = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return LatentShape(config.model.d_model, config.model.n_heads, *(attention[size] for size in sizes))


if __name__ == "__main__":
    run_script(main, description=__doc__, options=CalculatorOptions, groups=("attention", "model"))
