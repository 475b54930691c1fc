"""What a Hugging Face model caches, measured: transformers' own class runs a few tokens.

harness/hf/meta_model.py builds it, on the meta device. Cache layers of transformers' own kinds are read at two lengths and
followed from there; others, which compress, are run at the context itself.

A config.json may be wrong or hostile: harness/hf/cache.py asks for this in a process of its own, with limits on
time and memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from harness.decode.kv_calculator import LatentShape, LayerCache
from harness.errors import UserError
from harness.hf.config_json import LATENT_SIZES
from harness.hf.meta_model import DoesNotRun, Held, cache_after, on_meta, with_fields

SHORT, LONGER = 16, 24  # lengths at which a cache is read
# Read from the folder by nobody here: code, quantised weights and the choice of kernels change no shape.
_IGNORED = {
    "auto_map",
    "quantization_config",
    "compression_config",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "use_kernels",
    "kernel_config",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "use_cache",
    "hidden_act",
    "hidden_activation",
}
# Of a field that the file leaves out: no part of a cache's shape, or too likely to stop the class when doubled.
_BESIDE = re.compile(
    r"token|vocab|expert|topk|router|init|eps|theta|drop|seed|intermediate|position|mtp|nextn|loss|scal|"
    r"temperature|beam|length|_tp$|group$|n_group|image|audio|vision|repetition|num_return|bias|norm|residual|"
    r"softmax|upcast|bidirectional|is_encoder_decoder|return_dict|tie_|cross"
)
# Fields by which an architecture caches something else: a class that does not know one is not the model's.
FOREIGN = (
    "kv_lora_rank",
    "linear_attn_config",
    "linear_num_value_heads",
    "full_attention_interval",
    "attn_layer_period",
    "index_head_dim",
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
    "num_kv_shared_layers",
    "global_head_dim",
    "num_global_key_value_heads",
    "compress_ratios",
    "compress_rates",
    "mamba_d_state",
    "ssm_state_size",
)
# Names of sizes that decide where a class does not run with twice as much, and of all that is tried.
_SIZES = re.compile(r"layer|head|hidden|embd|d_model|kv|rank|window|state|conv|chunk")
_SHAPES = re.compile(_SIZES.pattern + r"|dim|share|interval|period|offset|pattern|expand|compress|n_?groups|attention")


@dataclass(frozen=True)
class Measurement:
    """What running the class has shown. latent: where all layers are plain MLA of one shape."""

    model_type: str
    layers: tuple[LayerCache, ...]
    latent: LatentShape | None
    defaults: Mapping[str, int]  # deciding fields that the file leaves to the class


def known_to_transformers(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def close_to(model_type: str) -> list[str]:
    """Types of transformers with a similar name: for a sentence, never to be used in its place."""
    import difflib

    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return difflib.get_close_matches(model_type, list(CONFIG_MAPPING_NAMES), n=1, cutoff=0.8)


def measure_cache_of(config: Mapping[str, Any], context: int) -> Measurement:
    """The cache of the language model that a config.json describes, whose model_type transformers knows.

    context: tokens of a sequence, for layers whose cache is in no proportion to it. Raises UserError for what the class
    refuses, what is no causal language model, and what holds no cache that can be read.
    """
    language, written = _language_config(config)
    try:
        layers, model = _seen_somehow(language, context)
    except MemoryError:
        raise UserError(
            "the model of this config.json takes more memory than any model's shape does: one of its sizes cannot be meant"
        ) from None
    except DoesNotRun as error:
        null = [
            name
            for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "layer_types", "v_head_dim")
            if name in _names(language) and _global(language, name) is None
        ]
        absent = f" (null or absent: {', '.join(null)})" if null else ""
        raise UserError(
            f"transformers cannot run its class for model_type={language.model_type} with this config.json: "
            f"{_sentence(error.__cause__ or error)}{absent}; correct the field that this comes from"
        ) from None
    if all(layer.is_empty for layer in layers):
        raise UserError(
            f"model_type={language.model_type} keeps no cache that can be read: it is no causal language model, "
            f"or keeps its states elsewhere"
        )
    return Measurement(
        language.model_type, layers, _latent_shape(language, layers, model), _deciding_defaults(language, written, layers)
    )


def _sentence(error: BaseException) -> str:
    """What went wrong, on one line. Strict classes of huggingface_hub say it in their cause."""
    while error.__cause__ is not None and "validation error" in str(error).lower():
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _without_choices(value: Any) -> Any:
    if isinstance(value, Mapping):
        if len(value) == 1 and isinstance(value.get("__float__"), str):  # as transformers writes Infinity
            return float(value["__float__"])
        return {key: _without_choices(inner) for key, inner in value.items() if key not in _IGNORED}
    return [_without_choices(inner) for inner in value] if isinstance(value, list) else value


def _language_config(config: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """(transformers' configuration of the language model, the fields that the file gives of it)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    given = _without_choices(config)
    pattern = given.get("hybrid_layer_pattern")
    if given["model_type"] == "mimo_v2_flash" and isinstance(pattern, list) and "layer_types" not in given:
        given["layer_types"] = ["sliding_attention" if windowed else "full_attention" for windowed in pattern]
        del given["hybrid_layer_pattern"]  # of which transformers' class knows the published value alone
    kind = CONFIG_MAPPING[given["model_type"]]
    try:
        whole = kind.from_dict(given)
        language = whole.get_text_config(decoder=True)
    except MemoryError:
        raise UserError(
            "the lists that this config.json implies take more memory than any model's: one of its sizes cannot be meant"
        ) from None
    except Exception as error:
        raise UserError(f"transformers' {kind.__name__} does not accept this config.json: {_sentence(error)}") from None
    if getattr(whole, "is_encoder_decoder", False) or getattr(language, "is_encoder_decoder", False):
        raise UserError(
            f"model_type={given['model_type']} is an encoder with a decoder (is_encoder_decoder=true): only "
            f"caches of causal self-attention are computed"
        )
    written = _written(whole, given, language) or {}
    fields = _names(language) | set(language.attribute_map)
    if language is not whole and not (written.keys() - {"model_type"}) & fields:
        raise UserError(
            f"model_type={given['model_type']} holds its language model in text_config or the like, which is "
            f"missing or names none: correct it"
        )
    heads, groups = _global(language, "num_attention_heads"), _global(language, "num_key_value_heads")
    if heads and groups and _global(language, "kv_lora_rank") is None and heads % groups:
        raise UserError(f"num_key_value_heads={groups} does not divide num_attention_heads={heads}: correct one of them")
    source = inspect.getsource(type(language))  # older names of fields are read there and stand in no list
    for name in FOREIGN:
        if written.get(name) and name not in fields and name not in source:
            raise UserError(
                f"{name} stands in a config.json of model_type={language.model_type}, whose class does not know "
                f"it: give the model_type of the code that runs it"
            )
    return language, written


def _written(config: Any, given: Any, language: Any) -> Mapping[str, Any] | None:
    """The part of what the file gives from which `language`, `config` or a configuration inside it, was made."""
    from transformers import PreTrainedConfig

    if config is language:
        return given if isinstance(given, Mapping) else None
    for name, inner in vars(config).items():
        if isinstance(inner, PreTrainedConfig):
            part = given.get(name) if isinstance(given, Mapping) else None
            found = _written(inner, part, language)
            if found is not None:
                return found
            if inner is language:  # older files of some wrappers are flat
                return given if isinstance(given, Mapping) else None
    return None


def _deciding_defaults(language: Any, written: Mapping[str, Any], layers: tuple[LayerCache, ...]) -> dict[str, int]:
    """Fields of the class's own that change the cache and that the file leaves out, with their defaults.

    Each is changed and measured again: a number doubled, a choice of yes and no turned round.
    """
    renamed = {alias for alias, name in language.attribute_map.items() if name in written}
    renamed |= {language.attribute_map[name] for name in written if name in language.attribute_map}
    absent = _names(language) - written.keys() - renamed
    found: dict[str, int] = {}
    for each in dataclasses.fields(type(language)):
        name: str = each.name
        default: Any = each.default
        if name not in absent or not _may_decide(name, default) or _global(language, name) != default:
            continue
        if name.removeprefix("use_") in absent - {name}:  # of use_X in a file without X: there is no X to use
            continue
        try:
            other = not default if isinstance(default, bool) else 2 * default
            seen, _ = _seen(with_fields(language, {**written, name: other}), None)
            differs = list(map(_shape, seen)) != list(map(_shape, layers))
        except (DoesNotRun, UserError, MemoryError):
            differs = not isinstance(default, bool) and _SIZES.search(name) is not None
        if differs:
            found[name] = default
    return found


def _may_decide(name: str, default: Any) -> bool:
    """Whether a field may say something of a cache, by its name and kind."""
    if name in _IGNORED or _BESIDE.search(name) or not isinstance(default, int):
        return False
    return isinstance(default, bool) or (default >= 1 and _SHAPES.search(name) is not None)


def _shape(layer: LayerCache) -> tuple[Any, ...]:
    return dict(layer.parts), layer.window, dict(layer.states), layer.kind, layer.naive, layer.mha


def _seen(language: Any, context: int | None) -> tuple[tuple[LayerCache, ...], Any]:
    """What each layer keeps, and the model that showed it."""
    model = on_meta(language)
    short, longer = cache_after(model, language, SHORT), cache_after(model, language, LONGER)
    whole: Sequence[Held | None] = [None] * len(short)
    if context is not None and any(layer.custom for layer in short):
        whole = cache_after(model, language, context)
    types, own = getattr(language, "layer_types", None) or [], language.per_layer_config
    layers = []
    for i, held in enumerate(zip(short, longer, whole, strict=True)):
        config, layer_type = own[i] if i < len(own) else language, types[i] if i < len(types) else ""
        layers.append(_layer(*held, config, layer_type, context))
    return tuple(layers), model


# What routes tokens to experts shapes no cache, and files that describe the cache alone leave it out.
_ROUTING = {
    **dict.fromkeys(("num_experts_per_tok", "n_group", "topk_group", "n_shared_experts", "top_k_experts"), 1),
    **dict.fromkeys(("n_routed_experts", "num_local_experts", "num_experts"), 4),
    "moe_intermediate_size": 64,
}


def _seen_somehow(language: Any, context: int) -> tuple[tuple[LayerCache, ...], Any]:
    """What is seen; where the class does not run, once more with what is null and follows from other fields filled in."""
    try:
        return _seen(language, context)
    except DoesNotRun:
        values: dict[str, Any] = dict(_ROUTING)
        heads, width = _global(language, "num_attention_heads"), _global(language, "hidden_size")
        if heads and width and width % heads == 0:
            values |= {"head_dim": width // heads, "num_key_value_heads": heads}
        filled = {name: value for name, value in values.items() if name in _names(language) and _global(language, name) is None}
        # A latent has no use for the number of key/value heads, but transformers' class repeats keys by it.
        if heads and _global(language, "kv_lora_rank") and _global(language, "num_key_value_heads") not in (None, heads):
            filled["num_key_value_heads"] = heads
        if not filled:
            raise
        for name, value in filled.items():
            setattr(language, name, value)
        return _seen(language, context)


def _global(language: Any, name: str) -> Any:
    """A field that is one for all layers; None where there is none, or layers differ in it."""
    with contextlib.suppress(AttributeError, RuntimeError):
        return getattr(language, name)
    return None


def _names(language: Any) -> set[str]:
    return {each.name for each in dataclasses.fields(type(language))}


def _layer(short: Held, longer: Held, whole: Held | None, language: Any, layer_type: str, context: int | None) -> LayerCache:
    """What one layer keeps, from its cache at two lengths, and at the context where its kind is its own."""
    window, at_short, at_longer = short.window, short.tensors, longer.tensors
    parts: dict[str, int] = {}
    states: dict[str, int] = {}
    groups, divides = 1, 0
    latent = getattr(language, "kv_lora_rank", None)
    is_latent = latent is not None and "keys" in at_short and at_short["keys"].shape[1::2] == (1, latent)
    names = {"keys": "latent", "values": "rotated key"} if is_latent else {"keys": "keys", "values": "values"}
    names |= {"indexer_keys": "indexer key", "idx_keys": "indexer key"}
    for name, tensor in at_longer.items():
        before = at_short.get(name)
        if name in ("keys", "values"):  # (batch, heads, tokens, width)
            held = tensor.shape[1] * tensor.shape[3] if tensor.dim() == 4 else 0
            if held:
                parts[names[name]] = held
                groups = 1 if is_latent else tensor.shape[1]
        elif before is not None and before.shape == tensor.shape:
            states[name] = tensor.numel() * tensor.element_size()
            divides = gcd(divides, tensor.shape[1])
        elif not short.custom:
            parts[names.get(name, name)] = tensor.numel() // LONGER
    at_context = 0
    if whole is not None and context is not None and short.custom:
        states = {}
        held = sum(tensor.numel() for name, tensor in whole.tensors.items() if name not in ("keys", "values"))
        if held % context == 0 and window is None:
            parts |= {"indexer key": held // context} if held else {}
        else:
            at_context = held
    if "keys" in at_longer and at_longer.get("values") is None and "keys" in parts:
        parts = {"keys as values": parts.pop("keys"), **parts}
    kind = _kind(parts, states, window, layer_type, at_context, is_latent)
    naive, mha = _compared(parts, groups, is_latent, language)
    return LayerCache(parts, naive, mha, window if parts else None, kind, groups, states, max(divides, 1), at_context)


def _kind(
    parts: Mapping[str, int], states: Mapping[str, int], window: int | None, layer_type: str, at_context: int, latent: bool
) -> str:
    if at_context:
        return f"{layer_type.replace('_', ' ') or 'compressed'}, window of {window:,}" if window else "compressed"
    if not parts:
        return "state" if states else "no cache of its own"
    kept = "" if window is None else f"{'chunks' if 'chunk' in layer_type and not latent else 'window'} of {window:,}"
    kind = ", ".join(filter(None, ("latent" if latent else "", kept))) or "full attention"
    if "indexer key" in parts:
        kind += ", indexed"
    return f"{kind} and state" if states else kind


def _compared(parts: Mapping[str, int], groups: int, latent: bool, language: Any) -> tuple[int | None, int | None]:
    """(elements with MLA's keys and values expanded, elements of MHA of this shape); None where that says nothing."""
    held, heads = sum(parts.values()), getattr(language, "num_attention_heads", None)
    if not isinstance(heads, int) or not held:
        return held, 0 if not held else None
    if latent:
        nope, rope, value = (getattr(language, f"{name}_head_dim", None) for name in ("qk_nope", "qk_rope", "v"))
        if nope is None or rope is None:
            return None, None
        value = value or language.hidden_size // heads
        indexer = parts.get("indexer key", 0)
        rotated = "rotated key" in parts
        return heads * (nope + rope + value) + indexer, heads * (nope + value + (0 if rotated else rope))
    plain = parts.get("keys", 0) + parts.get("values", 0)
    return held, heads * plain // groups if heads % groups == 0 and plain else None


def _latent_shape(language: Any, layers: tuple[LayerCache, ...], model: Any) -> LatentShape | None:
    """MLA's sizes, where all layers are alike and the class's attention has exactly the parameters that follow from them."""
    if layers[0].kind != "latent" or any(layer != layers[0] for layer in layers):
        return None
    d_model, heads, *sizes = (_global(language, name) for name in ("hidden_size", "num_attention_heads", *LATENT_SIZES))
    named = dict(zip(LATENT_SIZES, sizes, strict=True))
    if None in (d_model, heads, named["qk_nope_head_dim"], named["qk_rope_head_dim"]):
        return None
    shape = LatentShape(d_model, heads, **named | {"v_head_dim": named["v_head_dim"] or d_model // heads})
    counted = {sum(p.numel() for p in module.parameters()) for module in model.modules() if hasattr(module, "kv_b_proj")}
    return shape if counted == {shape.parameters} else None
