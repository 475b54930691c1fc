"""What a config.json of transformers says, as the sizes and options of our classes: kept exactly, or refused by name.

    llama  mistral  ministral  qwen2  qwen3   MHA, GQA or MQA; but for llama with windows in all layers or in some
    phi3                                      the same, turned in part or whole, with windows in all layers or in none
    qwen3_5_text                              the same, gated, every layer full attention, or some of gated DeltaNet
    deepseek_v2  deepseek_v3                  MLA; every layer dense

Fields that are left out have their class's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.errors import UserError
from harness.hf.config_json import IMPORTED, SIZES, STATE_SIZES, UNLIKE, Family, Fields, refusal, refuse_impossible
from modeling.attention.rope import SCALINGS

# What each kind of rotation takes from config.json beside rope_theta; the rest means nothing to it.
_ROTATIONS: dict[str, tuple[str, ...]] = {
    "default": (),
    **{kind: (*needed, *optional) for kind, (needed, optional) in SCALINGS.items()},
}


@dataclass(frozen=True)
class Description:
    """One model. attention: the options of its class, and PATTERN's where layers differ, but for dropout and EXECUTION.

    notes: what a user must know.
    """

    model_type: str
    sizes: dict[str, Any]  # fields of ModelConfig
    attention: dict[str, Any]
    vocab_size: int  # rows of the embedding
    tied: bool  # whether the head is the embedding
    interleaved: bool  # whether rotated pairs stand side by side, as (2i, 2i + 1)
    notes: tuple[str, ...]


def describe(config: Mapping[str, Any], max_seq_len: int | None = None) -> Description:
    """Raises UserError, naming the field, for what our classes do not compute. max_seq_len: a shorter context."""
    refuse_impossible(config)
    notes: list[str] = []
    model_type, family = _family(config)
    theirs = Fields(config, family)
    _refuse_another_function(theirs)
    attention = (_latent_attention if family.latent else _grouped_attention)(theirs)
    attention |= _rotation(theirs, notes)
    if "rotary_fraction" in attention and not family.gated:
        attention["name"] += "_partial"
    context = _context(theirs, max_seq_len)
    attention |= _windows(theirs, context, notes) | _states(theirs)
    biased = family.mlp_bias and theirs.flag("mlp_bias")
    if biased and attention["projection_bias"] != "all":
        raise theirs.refusal("mlp_bias", "is covered beside attention_bias=true only")
    if biased:  # then all matrices have them
        attention["projection_bias"] = "model"
    sizes = {
        **{ours: theirs.count(name) for ours, name in SIZES.items()},
        "head_dim": attention["qk_nope_head_dim" if family.latent else "head_dim"],
        "max_seq_len": context,
        "mlp": "swiglu",
        "bias": biased,
        "dropout": 0.0,
        "norm_eps": theirs.number("rms_norm_eps", 1e-6),
        "causal": True,
    }
    return Description(
        model_type,
        sizes,
        attention,
        theirs.count("vocab_size"),
        theirs.flag("tie_word_embeddings"),
        model_type == "deepseek_v2" or (model_type == "deepseek_v3" and theirs.flag("rope_interleave", True)),
        tuple(notes),
    )


def _family(config: Mapping[str, Any]) -> tuple[str, Family]:
    """model_type, by the architecture where it is absent, and its family. Raises UserError for what is not imported."""
    covered = f"covered are {', '.join(IMPORTED)}"
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        raise refusal("architectures", architectures, "must be a list of names: correct it")
    model_type = config.get("model_type")
    if model_type is None:
        model_type = next((name for name, known in IMPORTED.items() if known.architecture in architectures), None)
    if not isinstance(model_type, str) or model_type not in IMPORTED:
        why = f", which {UNLIKE[model_type]}," if isinstance(model_type, str) and model_type in UNLIKE else ""
        raise UserError(f"model_type={model_type or 'null'}{why} is not covered by the import; {covered}")
    family = IMPORTED[model_type]
    if architectures and family.architecture not in architectures:
        raise UserError(
            f"architectures={architectures[0]} is not covered by the import, which reads {family.architecture} of "
            f"model_type={model_type}; {covered}"
        )
    return model_type, family


def _refuse_another_function(theirs: Fields) -> None:
    """Raises UserError for a field by which the class computes what no GPT here does."""
    for name in ("quantization_config", "compression_config"):
        if theirs.get(name):
            raise UserError(f"{name} of the config.json means quantised weights: import the checkpoint they were made from")
    if theirs.get("per_layer_config"):
        raise UserError("per_layer_config of the config.json gives layers shapes of their own, which a GPT here cannot have")
    if theirs.config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise theirs.refusal("hidden_act", "is not covered: the MLP here is SwiGLU, with silu")
    if theirs.flag("use_bidirectional_attention"):
        raise theirs.refusal("use_bidirectional_attention", "is not covered: a GPT here sees no later token")
    dense = 0 if theirs.get("first_k_dense_replace") is None else theirs.count("first_k_dense_replace", least=0)
    if theirs.family.latent and theirs.get("n_routed_experts") and dense < theirs.count("num_hidden_layers"):
        raise theirs.refusal(
            "n_routed_experts", f"with first_k_dense_replace={dense} makes layers of experts, which a GPT here does not have"
        )


def _grouped_attention(theirs: Fields) -> dict[str, Any]:
    heads, groups, width = theirs.heads()
    bias, gated = theirs.family.bias, theirs.family.gated
    if bias == "attention_bias":
        bias = "all" if theirs.flag("attention_bias") else "none"
    return {
        "name": ("mha" if groups == heads else "mqa" if groups == 1 else "gqa") + ("_gated" if gated else ""),
        "mechanism": "gqa",
        "n_kv_heads": groups,
        "head_dim": width,
        "v_head_dim": width,
        "qk_rope_head_dim": 0,
        "positions": "rope",
        "qk_norm": theirs.family.qk_norm,
        **({"gate": "element"} if gated else {}),
        "projection_bias": "model" if bias == "none" else bias,
    }


def _latent_attention(theirs: Fields) -> dict[str, Any]:
    return {
        "name": "mla",
        "mechanism": "mla",
        "n_kv_heads": theirs.count("num_attention_heads"),
        **theirs.latent_sizes(),
        "latent": "learned",
        "kv_latent": "joint",
        "latent_norm": "rms",
        "latent_norm_place": "latent",
        "latent_scale": False,
        "positions": "decoupled",
        "fused_down_projections": False,
        "sharing": "none",
        "sharing_layers": 1,
        "projection_bias": "all" if theirs.flag("attention_bias") else "model",
    }


def _rotation(theirs: Fields, notes: list[str]) -> dict[str, Any]:
    """rope_theta, rope_scaling and rotary_fraction where that is not 1, from rope_parameters or from older fields."""
    name = "rope_scaling" if theirs.get("rope_scaling") else "rope_parameters"
    given = theirs.get(name) or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise theirs.refusal(name, "must be one group of fields for all layers: a GPT here rotates all of them alike")
    kind = str(given.get("rope_type") or given.get("type") or "default")
    covered = _ROTATIONS if theirs.family.scaled else ["default"]
    if kind not in covered:
        raise UserError(f"{name}.rope_type={kind} of the config.json is not covered; covered are {', '.join(covered)}")
    options = _turned(theirs, name, given)
    theta = given.get("rope_theta") or theirs.config.get("rope_theta", 10_000.0)
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < float("inf"):
        raise UserError(f"rope_theta={theta} of the config.json must be a number above 0: correct it")
    known = _ROTATIONS[kind]
    if theirs.family.latent and kind != "yarn" and given.get("mscale_all_dim"):
        raise UserError(f"{name}.mscale_all_dim={given['mscale_all_dim']} of the config.json is covered with yarn only")
    usual = {"type", "rope_type", "rope_theta", "partial_rotary_factor", *known}
    if idle := sorted(key for key, value in given.items() if key not in usual and value is not None):
        notes.append(
            f"{name}.{idle[0]} means nothing to rope_type={kind} and is left out"
            + (f" (likewise {', '.join(idle[1:])})" if idle[1:] else "")
        )
    options |= {"rope_theta": float(theta), "rope_scaling": None}
    if kind == "default":
        return options
    scaling = {key: given[key] for key in known if given.get(key) is not None}
    if "original_max_position_embeddings" in known:
        longest = theirs.count("max_position_embeddings")
        trained = theirs.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
        scaling["original_max_position_embeddings"] = trained or longest
        if kind == "yarn" and "factor" not in scaling and isinstance(trained, (int, float)) and trained > 0:
            scaling["factor"] = longest / trained
    return options | {"rope_scaling": {"rope_type": kind, **scaling}}


def _turned(theirs: Fields, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """rotary_fraction, where not all of a head is rotated. given: the fields of `name`, which win."""
    usual = theirs.family.turned
    places = [(f"{name}.", given.get("partial_rotary_factor")), ("", theirs.get("partial_rotary_factor"))]
    place, value = next(((place, value) for place, value in places if value is not None), ("", usual or 1.0))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise UserError(
            f"{place}partial_rotary_factor={value} of the config.json must be a number above 0, at most 1: correct it"
        )
    if value == 1:
        return {}
    if usual is None:
        raise UserError(
            f"{place}partial_rotary_factor={value} of the config.json is not covered: heads of its model_type are rotated whole"
        )
    _, _, width = theirs.heads()
    return {"rotary_fraction": int(width * value) / width}  # they cut what ours would round


def _context(theirs: Fields, asked: int | None) -> int:
    """max_seq_len: what is asked for, at most the config's context."""
    longest = theirs.count("max_position_embeddings")
    if asked is not None and not 1 <= asked <= longest:
        raise UserError(f"max_seq_len={asked} must be between 1 and the model's max_position_embeddings={longest}")
    return asked or longest


def _windows(theirs: Fields, context: int, notes: list[str]) -> dict[str, Any]:
    """The options that give layers their windows; none where no window is shorter than the context."""
    family, layers = theirs.family, theirs.count("num_hidden_layers")
    if family.window == "none" or theirs.get("sliding_window") is None:
        return {}
    if family.window == "layers" and not theirs.flag("use_sliding_window"):
        return {}
    window, first = theirs.count("sliding_window"), 0
    if family.window == "layers":
        first = theirs.count("max_window_layers", least=0)
    kinds = _kinds(theirs, ["local" if i >= first else "full" for i in range(layers)], {"sliding_attention": "local"})
    if family.window == "always" and "full" in kinds:
        raise theirs.refusal("layer_types", "is not read by its class, which gives every layer the window: correct one of them")
    windowed = kinds.count("local")
    if window >= context or not windowed:
        return {}
    notes.append(
        f"{windowed} of {layers} layers see the newest {window:,} tokens alone; with max_seq_len={window} all would see all"
    )
    if windowed == layers:
        return {"name": "swa", "window": window}
    return {"name": "swa", "layers": _pattern(kinds), "kinds": {"local": {"window": window}, "full": {}}}


def _states(theirs: Fields) -> dict[str, Any]:
    """The options that make layers gated DeltaNet's; none where all are full attention."""
    if not theirs.family.states:
        return {}
    layers, every = theirs.count("num_hidden_layers"), theirs.count("full_attention_interval")
    kinds = _kinds(theirs, ["delta" if (i + 1) % every else "full" for i in range(layers)], {"linear_attention": "delta"})
    if "delta" not in kinds:
        return {}
    delta = {"mechanism": "gdn", **{ours: theirs.count(name) for ours, name in STATE_SIZES.items()}}
    return {"name": "gdn", "layers": _pattern(kinds), "kinds": {"delta": delta, "full": {}}}


def _kinds(theirs: Fields, usual: list[str], other: Mapping[str, str]) -> list[str]:
    """Our name of each layer's kind, full or one of `other`, by theirs. usual: where layer_types is absent."""
    if not (given := theirs.get("layer_types")):
        return usual
    known = {"full_attention": "full", **other}
    if set(given) - set(known):
        raise theirs.refusal("layer_types", "names layers that are not covered")
    if len(given) != len(usual):
        raise theirs.refusal(
            "layer_types", f"names {len(given)} layers for num_hidden_layers={len(usual)}: correct one of them"
        )
    return [known[kind] for kind in given]


def _pattern(kinds: list[str]) -> list[str]:
    """The fewest kinds that these repeat."""
    return next(kinds[:n] for n in range(1, len(kinds) + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
