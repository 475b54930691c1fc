"""What a Hugging Face model caches, from its config.json.

A model_type that transformers knows is measured: harness/hf/cache_measured.py runs its class on the meta device. What
has no class there stands in `WITHOUT_CLASS` below, by formula; any other type is refused, and none is given another's
numbers. The language model of a wrapper is found in text_config, llm_config and the like.

A field that decides the cache and is absent is a refusal too, but in a config.json that transformers wrote
(transformers_version stands in it): such a file leaves out what is its class's default, and the description says which.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.decode.kv_calculator import CacheDescription, LatentShape, LayerCache
from harness.errors import UserError
from harness.hf.cache_measured import FOREIGN, Measurement, close_to, known_to_transformers, measure_cache_of

SECONDS, MEMORY = 240, 4 * 1024**3  # for one description, the memory beyond what the libraries take themselves
MOST_LAYERS, MOST_ENTRIES, DEEPEST = 4096, 200_000, 24  # of a config.json that is taken seriously
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_decoder_layers", "decoder_layers", "depth")
# Where a wrapper keeps its language model, the outermost first.
INNER = ("thinker_config", "text_config", "llm_config", "language_config", "language_model_config", "lm_config")


@dataclass(frozen=True)
class _Family:
    """How the config.json of a type without a class names what it caches: every layer sees everything."""

    latent: bool = False
    layers: str = "num_hidden_layers"
    groups: str = "num_key_value_heads"
    width: str = "head_dim"
    aliases: Mapping[str, str] = field(default_factory=dict)


# Types whose code is published beside their weights and is no part of transformers 5.23.
WITHOUT_CLASS: dict[str, _Family] = {
    "kimi_k2": _Family(latent=True),  # moonshotai/Kimi-K2: DeepSeek-V3's attention
    "deepseek": _Family(),  # deepseek-ai/deepseek-moe-16b: Llama's attention; also DeepSeek-V2's code with use_mla=false
    "internlm2": _Family(),  # internlm/internlm2-7b
    "mimo": _Family(),  # XiaomiMiMo/MiMo-7B: Qwen2's attention
    "baichuan": _Family(groups=""),  # baichuan-inc/Baichuan2-7B: MHA
    "qwen": _Family(groups=""),  # Qwen/Qwen-7B, the first: MHA
    "xverse": _Family(groups=""),  # xverse/XVERSE-13B: MHA
    "exaone": _Family(layers="num_layers"),  # LGAI-EXAONE/EXAONE-3.0-7.8B
    "chatglm": _Family(layers="num_layers", groups="multi_query_group_num", width="kv_channels"),
}


def describe_apart(config: Mapping[str, Any], *, name: str, context: int) -> CacheDescription:
    """`describe_config` in a process of its own. Raises UserError as it does, and where a limit is passed."""
    _refuse_impossible(config)
    command = [sys.executable, "-c", "from harness.hf.cache_table import main; main()"]
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error"}
    given = json.dumps({"config": config, "name": name, "context": context})
    try:
        done = subprocess.run(
            command,
            input=given,
            cwd=Path(__file__).resolve().parents[2],
            env=environ,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"building the model of this config.json without its weights took more than {SECONDS} seconds: one "
            f"of its sizes cannot be meant, or this machine is too busy"
        ) from None
    if done.returncode == 0:
        values = json.loads(done.stdout.splitlines()[-1])
        latent = values["latent"] and LatentShape(**values["latent"])
        layers = tuple(LayerCache(**layer) for layer in values["layers"])
        return CacheDescription(**values | {"layers": layers, "latent": latent, "notes": tuple(values["notes"])})
    if done.returncode == REFUSED:
        raise UserError(done.stdout.splitlines()[-1])
    if done.returncode < 0:
        raise UserError(
            f"the process that measures ended by signal {-done.returncode}, most likely for want of memory: "
            f"one of the sizes in this config.json cannot be meant"
        )
    raise RuntimeError(f"measuring failed:\n{done.stderr[-4000:]}")


REFUSED = 2  # status of the other process: a UserError, whose sentence is the last line that it prints


def main() -> None:
    """The other process: one JSON object in, one out; a refusal is a line and status 2."""
    given = json.load(sys.stdin)
    try:
        known_to_transformers("llama")  # imports what counts as the libraries' own memory
        _limit_memory()
        description = describe_config(given["config"], name=given["name"], context=given["context"])
    except UserError as error:
        print(" ".join(str(error).split()))
        sys.exit(REFUSED)
    print(json.dumps(dataclasses.asdict(description)))


def _limit_memory() -> None:
    """No more address space than is used now and MEMORY, where the system says how much that is (Linux)."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def describe_config(config: Mapping[str, Any], *, name: str, context: int = 4096) -> CacheDescription:
    """The cache of a model from its config.json. Raises UserError for what is unknown, missing or contradictory.

    context: tokens of a sequence, for layers whose cache is in no proportion to it.
    """
    _refuse_impossible(config)
    config = _language_model(config)
    model_type = config["model_type"]
    if _of(config, "use_mla") is False:  # DeepSeek's code has Llama's attention then, whatever the rank
        config = {**_inner(config), "model_type": "deepseek", "kv_lora_rank": None}
    if config["model_type"] in WITHOUT_CLASS:
        fields = _Fields(config)
        layers, latent = _by_formula(fields)
        return CacheDescription(
            name,
            model_type,
            layers,
            latent,
            (*_notes(config, layers), "by formula: transformers has no class of this type to measure"),
            _made_for(config),
        )
    seen = measure_cache_of(config, context)
    if seen.defaults and "transformers_version" not in config:
        missing = ", ".join(f"{field}={json.dumps(value)}" for field, value in seen.defaults.items())
        raise UserError(
            f"the config.json leaves out what decides the cache, and nothing says that transformers wrote it (no "
            f"transformers_version): add the fields; its class would take {missing}"
        )
    notes = _notes(config, seen.layers)
    if seen.defaults:
        shown = ", ".join(f"{field}={json.dumps(value)}" for field, value in seen.defaults.items())
        notes.insert(0, f"not in the config.json, so the default of its Hugging Face class: {shown}")
    return CacheDescription(name, seen.model_type, seen.layers, _latent_shape(seen), tuple(notes), _made_for(config))


# --- what is asked of the file ---------------------------------------------------------------------------------------


def _refuse_impossible(config: Any, path: str = "", depth: int = 0) -> int:
    """How many values a config.json holds. Raises UserError for what no file means, before anything is built from it."""
    if depth > DEEPEST:
        raise UserError(f"the config.json nests deeper than {DEEPEST} levels at {path[:60]}: that is no model's")
    items = config.items() if isinstance(config, Mapping) else enumerate(config)
    entries = 0
    for key, value in items:
        here = f"{path}.{key}" if path else str(key)
        if key in INNER and not (value is None or isinstance(value, Mapping)):
            raise UserError(f"{here} of the config.json must be an object, not {_shown(value)}: correct it")
        names = isinstance(value, list) and all(isinstance(name, str) for name in value)
        if key == "layer_types" and value is not None and not names:
            raise UserError(f"{here} of the config.json must list one name for each layer, not {_shown(value)}: correct it")
        if key in _LAYERS and isinstance(value, (int, float)) and value > MOST_LAYERS:
            raise UserError(f"{here}={value} is more layers than any model has (at most {MOST_LAYERS:,} are read): correct it")
        if isinstance(value, str) and value.lower() in ("true", "false", "null", "none") and key != "topk_method":
            raise UserError(f'{here}="{value}" of the config.json is text: write {value.lower()} without quotes')
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
            raise UserError(f"{here} of the config.json has {len(str(value))} digits: correct it")
        entries += 1
        if isinstance(value, (Mapping, list)):
            entries += _refuse_impossible(value, here, depth + 1)
        if entries > MOST_ENTRIES:
            raise UserError(f"the config.json holds more than {MOST_ENTRIES:,} values at {here[:60]}: that is no model's")
    return entries


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:36]} ..."


def _language_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that is measured or computed: a type that is known, with what says who wrote the file."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        inner = next((config[key] for key in INNER if config.get(key)), None)
        if model_type is None and inner is not None:
            return _language_model(_under(config, inner))
        raise UserError(
            "the config.json has no model_type, so nothing says how to read it: add the field"
            if model_type is None
            else f"model_type={_shown(model_type)} of the config.json must be a name: correct it"
        )
    for key in ("is_encoder_decoder", "add_cross_attention", "use_bidirectional_attention"):
        if _of(config, key) in (True, "all"):
            raise UserError(
                f"{key}=true: only caches of causal self-attention are computed; model_type={model_type} "
                f"with it keeps another one, or none"
            )
    if model_type in WITHOUT_CLASS:
        return config
    if not known_to_transformers(model_type):
        inner = next((config[key] for key in INNER if config.get(key)), None)
        if inner is not None:
            return _language_model(_under(config, inner))
        near = close_to(model_type)
        raise UserError(
            f"model_type={model_type} is unknown here: transformers has no class of that name to measure, and it is not in "
            f"WITHOUT_CLASS of harness/hf/cache_table.py; add it there"
            + (f" ({near[0]} is another type, and may cache something else)" if near else "")
        )
    return config


def _under(config: Mapping[str, Any], inner: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inner part, which the same program wrote."""
    written = {key: config[key] for key in ("transformers_version",) if key in config}
    return {**written, **inner}


def _inner(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's fields of a wrapper, or the config itself."""
    inner = next((config[key] for key in INNER if isinstance(config.get(key), Mapping)), None)
    return config if inner is None else _inner(_under(config, inner))


def _of(config: Mapping[str, Any], name: str) -> Any:
    return _inner(config).get(name)


class _Fields:
    """The fields of a config.json whose type has no class: nothing has a default."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config, self.model_type = config, str(config["model_type"])
        self.family = WITHOUT_CLASS[self.model_type]

    def count(self, name: str, least: int = 1) -> int:
        """A whole number. Raises UserError for anything else, and where it is absent."""
        if name not in self.config:
            raise UserError(
                f"the config.json has no {name}, and model_type={self.model_type} has no default for it: add the field"
            )
        value = self.config[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            shown = "null" if value is None else _shown(value)
            raise UserError(f"{name}={shown} of the config.json must be a whole number of at least {least}: correct it")
        return value

    def optional(self, name: str) -> int | None:
        return None if self.config.get(name) is None else self.count(name)

    def divided(self) -> int:
        """The width of a head where no field says it."""
        d_model, heads = self.count("hidden_size"), self.count("num_attention_heads")
        if d_model % heads:
            raise UserError(
                f"hidden_size={d_model} is no multiple of num_attention_heads={heads}, and the config.json has "
                f"no {self.family.width}: add it"
            )
        return d_model // heads


def _by_formula(fields: _Fields) -> tuple[tuple[LayerCache, ...], LatentShape | None]:
    """Layers that are all alike: one latent and one rotated key, or keys and values of G heads."""
    config, family = fields.config, fields.family
    for name in (*FOREIGN, "layer_types", "sliding_window_pattern"):
        if config.get(name) and not (family.latent and name == "kv_lora_rank"):
            raise UserError(
                f"{name} stands in a config.json of model_type={fields.model_type}, whose layers have none: give "
                f"the model_type of the code that runs it"
            )
    n, heads = fields.count(family.layers), fields.count("num_attention_heads")
    if family.latent:
        rank = None if config.get("q_lora_rank") is None else fields.count("q_lora_rank")
        shape = LatentShape(
            fields.count("hidden_size"),
            heads,
            rank,
            fields.count("kv_lora_rank"),
            fields.count("qk_nope_head_dim"),
            fields.count("qk_rope_head_dim", least=0),
            fields.count("v_head_dim"),
        )
        parts = {"latent": shape.kv_lora_rank, "rotated key": shape.qk_rope_head_dim}
        layer = LayerCache(parts, shape.elements_expanded, shape.elements_mha, kind="latent")
        return (layer,) * n, shape
    groups = heads if not family.groups else fields.optional(family.groups) or heads
    width = fields.optional(family.width) or fields.divided()
    if heads % groups:
        raise UserError(f"{family.groups}={groups} does not divide num_attention_heads={heads}: correct one of them")
    keys = groups * width
    window = fields.optional("sliding_window") if config.get("use_sliding_window", True) else None
    if window is not None:
        raise UserError(
            f"sliding_window={window} stands in a config.json of model_type={fields.model_type}, whose "
            f"windows are unknown here: leave it out to see layers that see everything"
        )
    return (LayerCache({"keys": keys, "values": keys}, 2 * keys, 2 * heads * width, heads=groups),) * n, None


# --- what is said of it ----------------------------------------------------------------------------------------------


def _latent_shape(seen: Measurement) -> LatentShape | None:
    """MLA's sizes, where all layers are alike and the class's attention has exactly the parameters that follow from them."""
    sizes, layer = seen.fields, seen.layers[0]
    needed = ("hidden_size", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")
    if any(other != layer for other in seen.layers) or not set(needed) <= sizes.keys() or layer.kind != "latent":
        return None
    shape = LatentShape(
        sizes["hidden_size"],
        sizes["num_attention_heads"],
        sizes.get("q_lora_rank"),
        sizes["kv_lora_rank"],
        sizes["qk_nope_head_dim"],
        sizes["qk_rope_head_dim"],
        sizes.get("v_head_dim", sizes["hidden_size"] // sizes["num_attention_heads"]),
    )
    return shape if shape.parameters == seen.attention_parameters else None


def _made_for(config: Mapping[str, Any]) -> int | None:
    """Tokens of the longest sequence that the file names, a stretched rotation included."""
    inner = _inner(config)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx")
    said = next((value for name in names if isinstance(value := inner.get(name), int) and value > 0), None)
    scaling = inner.get("rope_scaling") or inner.get("rope_parameters")
    if said is not None and isinstance(scaling, Mapping):
        original, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
        if isinstance(original, int) and isinstance(factor, (int, float)):
            said = max(said, int(original * factor))
    return said


def _notes(config: Mapping[str, Any], layers: Sequence[LayerCache]) -> list[str]:
    """What a reader of the numbers must know."""
    n, notes, inner = len(layers), [], _inner(config)
    for window, count in sorted(Counter(layer.window for layer in layers if layer.window is not None).items()):
        notes.append(f"{count} of {n} layers keep at most {window:,} tokens (sliding window)")
    empty = sum(not (layer.parts or layer.states or layer.at_context) for layer in layers)
    if empty:
        notes.append(f"{empty} of {n} layers cache nothing: they read another layer's, or have no attention")
    groups = next((inner[key] for key in ("num_key_value_heads", "num_kv_heads") if inner.get(key)), 0)
    held = {layer.heads for layer in layers if "keys" in layer.parts}
    if isinstance(groups, int) and groups and len(held) == 1 and (times := max(held) // groups) > 1:
        notes.append(
            f"transformers' class repeats its {groups} key/value heads {times} times before it caches them; an engine "
            f"that keeps each once takes 1/{times} of this"
        )
    if any("indexer key" in layer.parts for layer in layers):
        notes.append("the keys by which the sparse-attention indexer chooses tokens are counted, in the same dtype")
    if any("latent" in layer.parts for layer in layers) and inner.get("head_dim") is not None:
        notes.append(f"head_dim={inner['head_dim']} and num_key_value_heads say nothing of an MLA cache")
    if inner.get("num_nextn_predict_layers"):
        notes.append(
            f"modules for multi-token prediction (num_nextn_predict_layers={inner['num_nextn_predict_layers']}) are not counted"
        )
    return notes
