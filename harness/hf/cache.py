"""What a Hugging Face model caches, from its config.json.

A model_type that transformers knows is measured: harness/hf/cache_measured.py runs its class on the meta device. What
has no class there is counted by formula, as `FAMILIES` of harness/hf/config_json.py says; any other type is refused, and
none is given another's numbers. The language model of a wrapper is found in text_config, llm_config and the like.

A field that decides the cache and is absent is a refusal too, but in a config.json that transformers wrote
(transformers_version stands in it): such a file leaves out what is its class's default, and the description says which.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.decode.kv_calculator import CacheDescription, LatentShape, LayerCache
from harness.errors import UserError
from harness.hf.cache_measured import FOREIGN, close_to, known_to_transformers, measure_cache_of
from harness.hf.config_json import BY_FORMULA, INNER, Fields, refusal, refuse_impossible

SECONDS, MEMORY = 240, 4 * 1024**3  # for one description, the memory beyond what the libraries take themselves


def describe_apart(config: Mapping[str, Any], *, name: str, context: int) -> CacheDescription:
    """`describe_config` in a process of its own. Raises UserError as it does, and where a limit is passed."""
    refuse_impossible(config)
    command = [sys.executable, "-c", "from harness.hf.cache import main; main()"]
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
    if done.returncode < 0:
        raise UserError(
            f"the process that measures ended by signal {-done.returncode}, most likely for want of memory: "
            f"one of the sizes in this config.json cannot be meant"
        )
    if done.returncode:
        raise RuntimeError(f"measuring failed:\n{done.stderr[-4000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "refused" in answer:
        raise UserError(answer["refused"])
    latent = answer["latent"] and LatentShape(**answer["latent"])
    layers = tuple(LayerCache(**layer) for layer in answer["layers"])
    return CacheDescription(**answer | {"layers": layers, "latent": latent, "notes": tuple(answer["notes"])})


def main() -> None:
    """The other process: a JSON object in; out, on the last line, the description or the sentence that it is refused with."""
    given = json.load(sys.stdin)
    try:
        known_to_transformers("llama")  # imports what counts as the libraries' own memory
        _limit_memory()
        answer = dataclasses.asdict(describe_config(given["config"], name=given["name"], context=given["context"]))
    except UserError as error:
        answer = {"refused": str(error)}
    print(json.dumps(answer))


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
    refuse_impossible(config)
    config = _language_model(config)
    model_type = config["model_type"]
    if _innermost(config).get("use_mla") is False:  # DeepSeek's code has Llama's attention then, whatever the rank
        config = {**_innermost(config), "model_type": "deepseek", "kv_lora_rank": None}
    if config["model_type"] in BY_FORMULA:
        layers, latent = _by_formula(Fields(config, BY_FORMULA[config["model_type"]]), config["model_type"])
        return CacheDescription(
            name,
            model_type,
            layers,
            latent,
            (*_notes(config, layers), "by formula: transformers has no class of this type to measure"),
            _made_for(config),
        )
    seen = measure_cache_of(config, context)
    left_out = ", ".join(f"{field}={json.dumps(value)}" for field, value in seen.defaults.items())
    if left_out and "transformers_version" not in config:
        raise UserError(
            f"the config.json leaves out what decides the cache, and nothing says that transformers wrote it (no "
            f"transformers_version): add the fields; its class would take {left_out}"
        )
    notes = _notes(config, seen.layers)
    if left_out:
        notes.insert(0, f"not in the config.json, so the default of its Hugging Face class: {left_out}")
    return CacheDescription(name, seen.model_type, seen.layers, seen.latent, tuple(notes), _made_for(config))


def _language_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that is measured or computed: a type that is known, with what says who wrote the file."""
    model_type, inner = config.get("model_type"), _inner(config)
    if model_type is None and inner is not None:
        return _language_model(inner)
    if model_type is None:
        raise UserError("the config.json has no model_type, so nothing says how to read it: add the field")
    if not isinstance(model_type, str) or not model_type:
        raise refusal("model_type", model_type, "must be a name: correct it")
    for key in ("is_encoder_decoder", "add_cross_attention", "use_bidirectional_attention"):
        if _innermost(config).get(key) in (True, "all"):
            raise UserError(
                f"{key}=true: only caches of causal self-attention are computed; model_type={model_type} "
                f"with it keeps another one, or none"
            )
    if model_type in BY_FORMULA:
        return config
    if not known_to_transformers(model_type):
        if inner is not None:
            return _language_model(inner)
        near = close_to(model_type)
        raise UserError(
            f"model_type={model_type} is unknown here: transformers has no class of that name to measure, and it is not in "
            f"FAMILIES of harness/hf/config_json.py; add it there"
            + (f" ({near[0]} is another type, and may cache something else)" if near else "")
        )
    return config


def _inner(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The part of a wrapper that holds its language model, which the same program wrote; None where there is none."""
    inner = next((config[key] for key in INNER if config.get(key)), None)
    written = {key: config[key] for key in ("transformers_version",) if key in config}
    return None if inner is None else {**written, **inner}


def _innermost(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's fields of a wrapper, or the config itself."""
    inner = _inner(config)
    return config if inner is None else _innermost(inner)


def _by_formula(fields: Fields, model_type: str) -> tuple[tuple[LayerCache, ...], LatentShape | None]:
    """Layers that are all alike: one latent and one rotated key, or keys and values of G heads."""
    config, family = fields.config, fields.family
    for name in (*FOREIGN, "layer_types", "sliding_window_pattern"):
        if config.get(name) and not (family.latent and name == "kv_lora_rank"):
            raise UserError(
                f"{name} stands in a config.json of model_type={model_type}, whose layers have none: give "
                f"the model_type of the code that runs it"
            )
    n = fields.count(family.layers)
    if family.latent:
        shape = LatentShape(fields.count("hidden_size"), fields.count("num_attention_heads"), **fields.latent_sizes())
        parts = {"latent": shape.kv_lora_rank, "rotated key": shape.qk_rope_head_dim}
        layer = LayerCache(parts, shape.elements_expanded, shape.elements_mha, kind="latent")
        return (layer,) * n, shape
    heads, groups, width = fields.heads()
    window = fields.optional("sliding_window") if config.get("use_sliding_window", True) else None
    if window is not None:
        raise UserError(
            f"sliding_window={window} stands in a config.json of model_type={model_type}, whose windows are unknown here: "
            f"leave it out to see layers that see everything"
        )
    keys = groups * width
    return (LayerCache({"keys": keys, "values": keys}, 2 * keys, 2 * heads * width, heads=groups),) * n, None


def _made_for(config: Mapping[str, Any]) -> int | None:
    """Tokens of the longest sequence that the file names, a stretched rotation included."""
    inner = _innermost(config)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx")
    said = next((value for name in names if isinstance(value := inner.get(name), int) and value > 0), None)
    scaling = inner.get("rope_scaling") or inner.get("rope_parameters")
    if said is not None and isinstance(scaling, Mapping):
        original, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
        if isinstance(original, int) and isinstance(factor, (int, float)) and math.isfinite(factor):
            said = max(said, int(original * factor))
    return said


def _notes(config: Mapping[str, Any], layers: Sequence[LayerCache]) -> list[str]:
    """What a reader of the numbers must know."""
    n, notes, inner = len(layers), [], _innermost(config)
    windows = Counter((layer.window, layer.at_context > 0) for layer in layers if layer.window is not None)
    for (window, compressed), count in sorted(windows.items()):
        beside = ", and older ones compressed" if compressed else ""
        notes.append(f"{count} of {n} layers keep at most {window:,} tokens (sliding window){beside}")
    empty = sum(layer.is_empty for layer in layers)
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
