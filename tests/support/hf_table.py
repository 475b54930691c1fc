"""What a Hugging Face model caches by formula, kept by hand: what the measurement of its class must agree with.

Written from the papers and from transformers' configurations (5.23), whose defaults count where a field is absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harness.decode.kv_calculator import LatentShape, LayerCache
from harness.errors import UserError

FULL, SLIDING, LINEAR, INDEXED = "full_attention", "sliding_attention", "linear_attention", "indexed_attention"


class _Fields:
    """The fields of one config.json, completed with its class's defaults; it remembers which ones it took from there."""

    def __init__(self, config: Mapping[str, Any], family: _Family) -> None:
        self.config, self.family = config, family
        self.model_type = str(config["model_type"])
        self.taken: dict[str, Any] = {}

    def raw(self, name: str) -> Any:
        """The value as written, or the default; None for null. Raises UserError where there is neither."""
        for key in (self.family.aliases.get(name, name), name):
            if key in self.config:
                return self.config[key]
        if name not in self.family.defaults:
            raise UserError(
                f"the config.json has no {name}, and model_type={self.model_type} has no default for it: add the field"
            )
        value = self.family.defaults[name]
        if value is not None and value is not False:
            self.taken[name] = value
        return value

    def count(self, name: str, least: int = 1) -> int:
        """A whole number. Raises UserError for anything else."""
        value = self.raw(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            shown = "null" if value is None else value
            raise UserError(f"{name}={shown} of the config.json must be a whole number of at least {least}: correct it")
        return value

    def optional(self, name: str) -> int | None:
        """A whole number, or None where the field is null or absent without a default."""
        return None if self.raw(name) is None else self.count(name)

    def listed(self, name: str, length: int, kind: type) -> list[Any] | None:
        """A list with one entry a layer, or None where the field is null or absent."""
        value = self.config.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length or not all(isinstance(item, kind) for item in value):
            raise UserError(f"{name} of the config.json must list one {kind.__name__} for each of the {length} layers")
        return value


@dataclass(frozen=True)
class _Family:
    """How one model type says what it caches."""

    defaults: Mapping[str, Any]
    layer_types: Callable[[_Fields, int], list[str]]  # where the config lists none
    latent: bool = False
    plain: bool = False  # MLA exactly as in DeepSeek-V2: no gates, no indexer, one shape
    indexers: Callable[[_Fields, int], list[bool]] | None = None  # layers that keep keys of a sparse-attention indexer
    indexer_parts: Callable[[int], int] = lambda width: width  # elements that such a layer keeps, from index_head_dim
    aliases: Mapping[str, str] = field(default_factory=dict)
    sublayers: int = 1  # attention layers in each of num_layers


def _all_full(fields: _Fields, n: int) -> list[str]:
    return [FULL] * n


def _all_sliding(fields: _Fields, n: int) -> list[str]:
    """Every layer has the window, unless it is null."""
    return [SLIDING if fields.optional("sliding_window") else FULL] * n


def _sliding_but_every(period: int, key: str | None = None) -> Callable[[_Fields, int], list[str]]:
    """Layers period, 2 period, ... (from 1) see everything; `key` is the field that may say another period."""

    def types(fields: _Fields, n: int) -> list[str]:
        every = fields.count(key) if key is not None and key in fields.config else period
        return [FULL if (i + 1) % every == 0 else SLIDING for i in range(n)]

    return types


def _qwen_window(sees_all: Callable[[int, int], bool]) -> Callable[[_Fields, int], list[str]]:
    """A window only with use_sliding_window, in the layers that max_window_layers leaves to it."""

    def types(fields: _Fields, n: int) -> list[str]:
        if not fields.raw("use_sliding_window") or not fields.raw("sliding_window"):
            return [FULL] * n
        limit = fields.count("max_window_layers", least=0)
        return [FULL if sees_all(i, limit) else SLIDING for i in range(n)]

    return types


def _smollm3(fields: _Fields, n: int) -> list[str]:
    if not fields.raw("use_sliding_window") or not fields.raw("sliding_window"):
        return [FULL] * n
    return [FULL if rotates else SLIDING for rotates in _rotating(fields, n)]


def _rotating(fields: _Fields, n: int) -> list[bool]:
    """Which layers rotate queries and keys: all but every no_rope_layer_interval-th, unless they are listed (1: rotates)."""
    listed = fields.listed("no_rope_layers", n, int)
    if listed is not None:
        return list(map(bool, listed))
    interval = fields.count("no_rope_layer_interval")
    return [(i + 1) % interval != 0 for i in range(n)]


def _linear_but_every(key: str) -> Callable[[_Fields, int], list[str]]:
    """Layers key, 2 key, ... (from 1) are attention, the others recurrent."""

    def types(fields: _Fields, n: int) -> list[str]:
        every = fields.count(key)
        return [FULL if (i + 1) % every == 0 else LINEAR for i in range(n)]

    return types


def _kimi_linear(fields: _Fields, n: int) -> list[str]:
    layers = fields.config.get("linear_attn_config") or {}
    if "full_attn_layers" in layers:  # counted from 1
        return [FULL if i + 1 in layers["full_attn_layers"] else LINEAR for i in range(n)]
    return [FULL if i and i % 4 == 0 else LINEAR for i in range(n)]


def _glm5_next(fields: _Fields, n: int) -> list[str]:
    return [INDEXED if i % 4 == 3 else LINEAR for i in range(n)]


def _every_layer_indexes(fields: _Fields, n: int) -> list[bool]:
    return [True] * n


def _glm_indexers(fields: _Fields, n: int) -> list[bool]:
    """Layers that reuse an earlier layer's choice ("shared") keep no keys of their own."""
    listed = fields.config.get("indexer_types") or fields.config.get("index_topk_pattern")
    if listed is not None:
        if len(listed) != n:
            raise UserError(f"indexer_types of the config.json must have one entry for each of the {n} layers")
        return [kind in ("full", "F") for kind in listed]
    every, offset = max(1, fields.count("index_topk_freq")), fields.count("index_skip_topk_offset", least=0)
    return [max(i - offset + 1, 0) % every == 0 for i in range(n)]


def _hy_v4_indexers(fields: _Fields, n: int) -> list[bool]:
    if fields.config.get("indexer_types") is not None:
        return _glm_indexers(fields, n)
    return [i == 0 or (i - 1) % 4 == 0 for i in range(n)]


def _mha(d_model: int, layers: int, heads: int, aliases: Mapping[str, str]) -> _Family:
    """Defaults of a class that knows neither grouped heads nor a width of its own for them."""
    defaults = {"hidden_size": d_model, "num_hidden_layers": layers, "num_attention_heads": heads}
    return _Family(defaults, _all_full, aliases=aliases)


def _gqa(
    d_model: int,
    layers: int,
    heads: int,
    kv_heads: int | None,
    head_dim: int | None = None,
    types: Callable[[_Fields, int], list[str]] = _all_full,
    **more: Any,
) -> _Family:
    """Defaults of a class with grouped keys and values; kv_heads None: as many as heads, head_dim None: d_model / heads."""
    defaults = {
        "hidden_size": d_model,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    } | more
    return _Family(defaults, types)


def _mla(
    d_model: int,
    layers: int,
    heads: int,
    q_rank: int | None,
    rank: int,
    nope: int,
    rope: int,
    v: int | None,
    types: Callable[[_Fields, int], list[str]] = _all_full,
    *,
    plain: bool = True,
    sublayers: int = 1,
    indexers: Callable[[_Fields, int], list[bool]] | None = None,
    indexer_parts: Callable[[int], int] = lambda width: width,
    **more: Any,
) -> _Family:
    """Defaults of a class with a key/value latent; v None: d_model / heads."""
    layers_field = "num_hidden_layers" if sublayers == 1 else "num_layers"
    defaults = {
        "hidden_size": d_model,
        layers_field: layers,
        "num_attention_heads": heads,
        "q_lora_rank": q_rank,
        "kv_lora_rank": rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": v,
        "num_key_value_heads": None,
    } | more
    return _Family(defaults, types, True, plain, indexers, indexer_parts, {}, sublayers)


_WINDOW: dict[str, Any] = {"sliding_window": 4096}
_QWEN: dict[str, Any] = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_SPARSE: dict[str, Any] = {"plain": False, "index_head_dim": 128}
_SHARED: dict[str, Any] = _SPARSE | {"indexers": _glm_indexers, "index_topk_freq": 1, "index_skip_topk_offset": 2}
_EVERY_TWO = _qwen_window(lambda i, limit: (i + 1) % 2 == 0 or i >= limit)

# Numbers are the defaults of Hugging Face's classes, in the order of the functions above; tests compare them.
MODEL_TYPES: dict[str, _Family] = {
    "cohere2": _gqa(8192, 40, 64, None, types=_sliding_but_every(4, "sliding_window_pattern"), **_WINDOW),
    "gemma": _gqa(3072, 28, 16, 16, 256),
    "gemma2": _gqa(2304, 26, 8, 4, 256, _sliding_but_every(2), **_WINDOW),
    "gemma3_text": _gqa(2304, 26, 8, 4, 256, _sliding_but_every(6, "sliding_window_pattern"), **_WINDOW),
    "glm4": _gqa(4096, 40, 32, 2, 128),
    "glm4_moe": _gqa(4096, 46, 96, 8),
    "gpt2": _mha(768, 12, 12, {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}),
    "gpt_neox": _mha(6144, 44, 64, {}),
    "gpt_oss": _gqa(2880, 36, 64, 8, 64, _sliding_but_every(2), sliding_window=128),
    "granite": _gqa(4096, 32, 32, None),
    "llama": _gqa(4096, 32, 32, None),
    "ministral": _gqa(4096, 32, 32, 8, types=_all_sliding, **_WINDOW),
    "ministral3": _gqa(4096, 34, 32, 8, 128, _all_sliding, sliding_window=None),
    "mistral": _gqa(4096, 32, 32, 8, types=_all_sliding, **_WINDOW),
    "mixtral": _gqa(4096, 32, 32, 8, types=_all_sliding, sliding_window=None),
    "olmo": _gqa(4096, 32, 32, None),
    "olmo2": _gqa(4096, 32, 32, None),
    "olmo3": _gqa(4096, 32, 32, None, types=_sliding_but_every(4), **_WINDOW),
    "phi": _gqa(2048, 24, 32, None),
    "phi3": _gqa(3072, 32, 32, None, types=_all_sliding, sliding_window=None),
    "phimoe": _gqa(4096, 32, 32, 8, types=_all_sliding, sliding_window=None),
    "qwen2": _gqa(4096, 32, 32, 32, types=_qwen_window(lambda i, limit: i < limit), **_QWEN),
    "qwen2_moe": _gqa(2048, 24, 16, 16, types=_EVERY_TWO, **_QWEN),
    "qwen3": _gqa(4096, 32, 32, 32, 128, _qwen_window(lambda i, limit: i < limit), **_QWEN),
    "qwen3_moe": _gqa(2048, 24, 32, 4, types=_qwen_window(lambda i, limit: False), **_QWEN),
    "qwen3_next": _gqa(2048, 48, 16, 2, 256, _linear_but_every("full_attention_interval"), full_attention_interval=4),
    "seed_oss": _gqa(4096, 64, 80, 8, 128),
    "smollm3": _gqa(2048, 36, 16, 4, types=_smollm3, use_sliding_window=False, sliding_window=None, no_rope_layer_interval=4),
    "starcoder2": _gqa(3072, 30, 24, 2, types=_all_sliding, sliding_window=None),
    "axk1": _mla(7168, 61, 64, 1536, 512, 128, 64, 128),
    "axk2": _mla(2048, 48, 32, 384, 128, 64, 32, 64, indexers=_every_layer_indexes, **_SPARSE),
    "bailing_hybrid": _mla(
        2560, 42, 32, None, 512, 128, 64, 128, _linear_but_every("layer_group_size"), plain=False, layer_group_size=6
    ),
    "deepseek_v2": _mla(4096, 32, 32, 1536, 512, 128, 64, 128),
    "deepseek_v3": _mla(7168, 61, 128, 1536, 512, 128, 64, 128),
    "deepseek_v32": _mla(7168, 61, 128, 1536, 512, 128, 64, 128, indexers=_every_layer_indexes, **_SPARSE),
    "glm4_moe_lite": _mla(2048, 47, 20, 768, 512, 192, 64, 256),
    "glm5_next_text": _mla(
        4096, 45, 64, 1536, 512, 256, 0, 256, _glm5_next, indexer_parts=lambda width: 2 * width + 1, **_SHARED
    ),
    "glm_moe_dsa": _mla(6144, 78, 64, 2048, 512, 192, 64, 256, **_SHARED),
    "hy_v4": _mla(2816, 34, 32, 1536, 512, 192, 64, 256, indexers=_hy_v4_indexers, **_SPARSE),
    "kimi_linear": _mla(2304, 27, 32, None, 512, 128, 64, 128, _kimi_linear, plain=False),
    "longcat_flash": _mla(6144, 28, 64, 1536, 512, 128, 64, 128, sublayers=2),
    "minicpm3": _mla(2560, 62, 40, 768, 256, 64, 32, None),
    "mistral4": _mla(4096, 36, 32, 1024, 256, 64, 64, 128),
    "mistral_large4_text": _mla(6144, 72, 64, None, 512, 64, 64, 128, no_rope_layer_interval=4, **_SHARED),
    "youtu": _mla(2048, 32, 16, 1536, 512, 128, 64, 128),
}

# Models that wrap a language model in `text_config` -> its type where that does not say.
WRAPPERS = {
    "gemma3": "gemma3_text",
    "glm5_next": "glm5_next_text",
    "kimi_k25": "deepseek_v3",
    "mistral3": "mistral",
    "mistral_large4": "mistral_large4_text",
}


def by_table(config: Mapping[str, Any]) -> list[LayerCache]:
    """The layers of a model from its config.json, whose type is in MODEL_TYPES or WRAPPERS."""
    model_type = config["model_type"]
    if model_type in WRAPPERS:
        inner = config.get("text_config") or {key: value for key, value in config.items() if key != "model_type"}
        config = {"model_type": WRAPPERS[model_type], **inner}
    family = MODEL_TYPES[config["model_type"]]
    fields = _Fields(config, family)
    types = fields.listed("layer_types", _n_layers(fields), str) or family.layer_types(fields, _n_layers(fields))
    layers, _ = (_latent_layers if family.latent else _grouped_layers)(fields, types)
    return list(layers)


def _n_layers(fields: _Fields) -> int:
    sublayers = fields.family.sublayers
    if sublayers == 1 or ("num_layers" not in fields.config and "num_hidden_layers" in fields.config):
        return fields.count("num_hidden_layers")
    return sublayers * fields.count("num_layers")


def _window(fields: _Fields, kind: str) -> int | None:
    return fields.count("sliding_window") if kind == SLIDING else None


def _divided(fields: _Fields, missing: str) -> int:
    """The width of a head where no field says it."""
    d_model, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    if d_model % heads:
        raise UserError(
            f"hidden_size={d_model} is no multiple of num_attention_heads={heads}, and the config.json has no {missing}: add it"
        )
    return d_model // heads


def _grouped_layers(fields: _Fields, types: Sequence[str]) -> tuple[list[LayerCache], None]:
    """Keys and values of G heads each."""
    heads, known = fields.count("num_attention_heads"), fields.family.defaults
    groups = fields.optional("num_key_value_heads") if "num_key_value_heads" in known else None
    width = fields.optional("head_dim") if "head_dim" in known else None
    if width is None and known.get("head_dim") is not None:
        raise UserError(f"head_dim=null says nothing for model_type={fields.model_type}: give the number")
    groups, width = groups or heads, width or _divided(fields, "head_dim")
    if heads % groups:
        raise UserError(f"num_key_value_heads={groups} does not divide num_attention_heads={heads}: correct one of them")
    keys = groups * width
    cached = {"keys": keys, "values": keys}
    return [
        LayerCache({}, 0, 0) if kind == LINEAR else LayerCache(cached, 2 * keys, 2 * heads * width, _window(fields, kind))
        for kind in types
    ], None


def _latent_layers(fields: _Fields, types: Sequence[str]) -> tuple[list[LayerCache], LatentShape | None]:
    """One latent and one rotated key, and the keys of an indexer where a layer has one."""
    n, family = len(types), fields.family
    shape = LatentShape(
        d_model=fields.count("hidden_size"),
        n_heads=fields.count("num_attention_heads"),
        q_lora_rank=fields.optional("q_lora_rank") if family.plain else None,
        kv_lora_rank=fields.count("kv_lora_rank"),
        qk_nope_head_dim=fields.count("qk_nope_head_dim"),
        qk_rope_head_dim=fields.count("qk_rope_head_dim", least=0),
        v_head_dim=fields.optional("v_head_dim") or _divided(fields, "v_head_dim"),
    )
    indexes = family.indexers(fields, n) if family.indexers is not None else [False] * n
    sources = fields.listed("kv_source_layers", n, int) or list(range(n))
    rotates = _rotating(fields, n) if "no_rope_layer_interval" in family.defaults else [True] * n
    unrotated = replace(shape, qk_nope_head_dim=shape.qk_nope_head_dim + shape.qk_rope_head_dim, qk_rope_head_dim=0)
    layers = []
    for i, kind in enumerate(types):
        if kind == LINEAR:
            layers.append(LayerCache({}, 0, 0))
            continue
        here = shape if rotates[i] else unrotated
        indexer = family.indexer_parts(fields.count("index_head_dim")) if indexes[i] else 0
        own = sources[i] == i  # otherwise it reads another layer's latent
        parts = {"latent": own * here.kv_lora_rank, "rotated key": own * here.qk_rope_head_dim, "indexer key": indexer}
        layers.append(
            LayerCache(
                {part: size for part, size in parts.items() if size},
                own * here.elements_expanded + indexer,
                here.elements_mha,
                _window(fields, kind),
            )
        )
    return layers, shape if family.plain else None
