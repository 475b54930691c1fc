"""What a config.json of transformers says, as the sizes and options of our classes: kept exactly, or refused by name.

    llama  mistral  qwen2  qwen3         MHA, GQA or MQA
    deepseek_v2  deepseek_v3             MLA; every layer dense

config.json is plain JSON here: transformers is not needed. Fields that are left out have their class's default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.config.checks import MOST, WIDEST
from harness.errors import UserError
from modeling.attention.rope import SCALINGS

# What each kind of rotation takes from config.json beside rope_theta; the rest means nothing to it.
_ROTATIONS: dict[str, tuple[str, ...]] = {
    "default": (),
    **{kind: (*needed, *optional) for kind, (needed, optional) in SCALINGS.items()},
}


# What a run's configuration may say at most, by their names; any other count is a width.
_MOST = {
    "num_hidden_layers": MOST["model.n_layers"],
    "max_position_embeddings": MOST["model.max_seq_len"],
    "vocab_size": MOST["model.vocab_size"],
}


@dataclass(frozen=True)
class Family:
    """How the class of one model_type reads config.json. defaults: of fields that are often left out."""

    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    latent: bool = False
    qk_norm: bool = False
    bias: str = "none"  # on projections: none, qkv, or where attention_bias says so
    mlp_bias: bool = False  # whether the field is read
    window: str = "none"  # none, always, or in some layers


_LATENT = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", bias="attention_bias", mlp_bias=True),
    "mistral": Family("MistralForCausalLM", {"num_key_value_heads": 8, "sliding_window": 4096}, window="always"),
    "qwen2": Family("Qwen2ForCausalLM", {"num_key_value_heads": 32}, bias="qkv", window="layers"),
    "qwen3": Family(
        "Qwen3ForCausalLM", {"num_key_value_heads": 32, "head_dim": 128}, qk_norm=True, bias="attention_bias", window="layers"
    ),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", _LATENT, latent=True, bias="attention_bias", mlp_bias=True),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", _LATENT, latent=True, bias="attention_bias"),
}


@dataclass(frozen=True)
class Description:
    """One model. attention: the options of its class but for dropout and EXECUTION. notes: what a user must know."""

    model_type: str
    sizes: dict[str, Any]  # fields of ModelConfig
    attention: dict[str, Any]
    vocab_size: int  # rows of the embedding
    tied: bool  # whether the head is the embedding
    interleaved: bool  # whether rotated pairs stand side by side, as (2i, 2i + 1)
    end_of_text: tuple[int, ...]
    notes: tuple[str, ...]


def describe(config: Mapping[str, Any], max_seq_len: int | None = None) -> Description:
    """Raises UserError, naming the field, for what our classes do not compute. max_seq_len: a shorter context."""
    theirs, notes = _Fields(config), list[str]()
    model_type, family = _family(theirs)
    attention = (_latent_attention if family.latent else _grouped_attention)(theirs, family)
    attention["rope_theta"], attention["rope_scaling"] = _rotation(theirs, family, notes)
    biased = family.mlp_bias and theirs.flag("mlp_bias")
    if biased and attention["projection_bias"] != "all":
        raise theirs.refusal("mlp_bias", "is covered beside attention_bias=true only")
    if biased:  # then all matrices have them
        attention["projection_bias"] = "model"
    sizes = {
        "d_model": theirs.count("hidden_size"),
        "n_layers": theirs.count("num_hidden_layers"),
        "n_heads": theirs.count("num_attention_heads"),
        "head_dim": attention["qk_nope_head_dim" if family.latent else "head_dim"],
        "max_seq_len": _context(theirs, family, max_seq_len, notes),
        "mlp": "swiglu",
        "mlp_hidden": theirs.count("intermediate_size"),
        "bias": biased,
        "dropout": 0.0,
        "norm_eps": theirs.number("rms_norm_eps", 1e-6),
        "causal": True,
    }
    ends = theirs.get("eos_token_id")
    return Description(
        model_type,
        sizes,
        attention,
        theirs.count("vocab_size"),
        theirs.flag("tie_word_embeddings"),
        model_type == "deepseek_v2" or (model_type == "deepseek_v3" and theirs.flag("rope_interleave", True)),
        tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,),
        tuple(notes),
    )


class _Fields:
    """The fields of one config.json."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        self.config, self.defaults = config, defaults or {}

    def get(self, name: str, default: Any = None) -> Any:
        return self.config.get(name, self.defaults.get(name, default))

    def refusal(self, name: str, reason: str) -> UserError:
        return UserError(f"{name}={json.dumps(self.get(name))} of the config.json {reason}")

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.refusal(name, f"must be a whole number of at least {least}: correct it")
        if value > (most := _MOST.get(name, WIDEST)):
            raise self.refusal(name, f"is more than any model has ({most:,}): correct it")
        return value

    def optional(self, name: str) -> int | None:
        return None if self.get(name) is None else self.count(name)

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise self.refusal(name, "must be a number above 0: correct it")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(name, "must be true or false: correct it")
        return bool(value)


def _family(theirs: _Fields) -> tuple[str, Family]:
    """model_type and its family; its defaults then stand in. Raises UserError for what no class of ours computes."""
    covered = f"covered are {', '.join(FAMILIES)}"
    architectures = theirs.get("architectures") or []
    if not isinstance(architectures, list):
        raise theirs.refusal("architectures", "must be a list of names: correct it")
    model_type = theirs.get("model_type")
    if model_type is None:
        model_type = next((name for name, known in FAMILIES.items() if known.architecture in architectures), None)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"model_type={model_type or 'null'} is not covered by the import; {covered}")
    family = FAMILIES[model_type]
    if architectures and family.architecture not in architectures:
        raise UserError(
            f"architectures={architectures[0]} is not covered by the import, which reads {family.architecture} of "
            f"model_type={model_type}; {covered}"
        )
    theirs.defaults = family.defaults
    for name in ("quantization_config", "compression_config"):
        if theirs.get(name):
            raise UserError(f"{name} of the config.json means quantised weights: import the checkpoint they were made from")
    if theirs.get("per_layer_config"):
        raise UserError("per_layer_config of the config.json gives layers shapes of their own, which a GPT here cannot have")
    if theirs.get("hidden_act", "silu") not in ("silu", "swish"):
        raise theirs.refusal("hidden_act", "is not covered: the MLP here is SwiGLU, with silu")
    if theirs.flag("use_bidirectional_attention"):
        raise theirs.refusal("use_bidirectional_attention", "is not covered: a GPT here sees no later token")
    dense = 0 if theirs.get("first_k_dense_replace") is None else theirs.count("first_k_dense_replace", least=0)
    if family.latent and theirs.get("n_routed_experts") and dense < theirs.count("num_hidden_layers"):
        raise theirs.refusal(
            "n_routed_experts", f"with first_k_dense_replace={dense} makes layers of experts, which a GPT here does not have"
        )
    return model_type, family


def _grouped_attention(theirs: _Fields, family: Family) -> dict[str, Any]:
    heads = theirs.count("num_attention_heads")
    groups = theirs.optional("num_key_value_heads") or heads
    if heads % groups:
        raise theirs.refusal("num_key_value_heads", f"does not divide num_attention_heads={heads}: correct one of them")
    width = theirs.optional("head_dim")
    if width is None:
        if theirs.count("hidden_size") % heads:
            raise theirs.refusal("hidden_size", f"is no multiple of num_attention_heads={heads}: add head_dim")
        width = theirs.count("hidden_size") // heads
    bias = family.bias
    if bias == "attention_bias":
        bias = "all" if theirs.flag("attention_bias") else "none"
    return {
        "name": "mha" if groups == heads else "mqa" if groups == 1 else "gqa",
        "mechanism": "gqa",
        "n_kv_heads": groups,
        "head_dim": width,
        "v_head_dim": width,
        "qk_rope_head_dim": 0,
        "positions": "rope",
        "qk_norm": family.qk_norm,
        "projection_bias": "model" if bias == "none" else bias,
    }


def _latent_attention(theirs: _Fields, family: Family) -> dict[str, Any]:
    heads = theirs.count("num_attention_heads")
    return {
        "name": "mla",
        "mechanism": "mla",
        "n_kv_heads": heads,
        "q_lora_rank": theirs.optional("q_lora_rank"),
        "kv_lora_rank": theirs.count("kv_lora_rank"),
        "qk_nope_head_dim": theirs.count("qk_nope_head_dim"),
        "qk_rope_head_dim": theirs.count("qk_rope_head_dim"),
        "v_head_dim": theirs.count("v_head_dim"),
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


def _rotation(theirs: _Fields, family: Family, notes: list[str]) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and rope_scaling, from rope_parameters or from the older rope_theta and rope_scaling."""
    name = "rope_scaling" if theirs.get("rope_scaling") else "rope_parameters"
    given = theirs.get(name) or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise theirs.refusal(name, "must be one group of fields for all layers: a GPT here rotates all of them alike")
    kind = str(given.get("rope_type") or given.get("type") or "default")
    if kind not in _ROTATIONS:
        raise UserError(f"{name}.rope_type={kind} of the config.json is not covered; covered are {', '.join(_ROTATIONS)}")
    for place, value in ((name, given.get("partial_rotary_factor")), ("", theirs.get("partial_rotary_factor"))):
        if value not in (None, 1, 1.0):
            raise UserError(
                f"{place}{'.' if place else ''}partial_rotary_factor={value} of the config.json is not covered: "
                f"heads here are rotated whole"
            )
    theta = given.get("rope_theta") or theirs.get("rope_theta", 10_000.0)
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < float("inf"):
        raise UserError(f"rope_theta={theta} of the config.json must be a number above 0: correct it")
    known = _ROTATIONS[kind]
    if family.latent and kind != "yarn" and given.get("mscale_all_dim"):
        raise UserError(f"{name}.mscale_all_dim={given['mscale_all_dim']} of the config.json is covered with yarn only")
    usual = {"type", "rope_type", "rope_theta", "partial_rotary_factor", *known}
    if idle := sorted(key for key, value in given.items() if key not in usual and value is not None):
        notes.append(
            f"{name}.{idle[0]} means nothing to rope_type={kind} and is left out"
            + (f" (likewise {', '.join(idle[1:])})" if idle[1:] else "")
        )
    if kind == "default":
        return float(theta), None
    scaling = {key: given[key] for key in known if given.get(key) is not None}
    if "original_max_position_embeddings" in known:
        longest = theirs.count("max_position_embeddings")
        trained = theirs.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
        scaling["original_max_position_embeddings"] = trained or longest
        if kind == "yarn" and "factor" not in scaling and isinstance(trained, (int, float)) and trained > 0:
            scaling["factor"] = longest / trained
    return float(theta), {"rope_type": kind, **scaling}


def _context(theirs: _Fields, family: Family, asked: int | None, notes: list[str]) -> int:
    """max_seq_len: what is asked for, at most the config's context and its sliding window."""
    longest = theirs.count("max_position_embeddings")
    if asked is not None and not 1 <= asked <= longest:
        raise UserError(f"max_seq_len={asked} must be between 1 and the model's max_position_embeddings={longest}")
    window = _window(theirs, family)
    if window is not None and window < (asked or longest):
        if asked is not None:
            raise UserError(
                f"max_seq_len={asked} is longer than the model's sliding_window={window}, beyond which a GPT "
                f"here computes something else: choose at most {window}"
            )
        notes.append(f"max_seq_len={window} of {longest}: within its sliding_window the model is the same, beyond it is not")
        return window
    return asked or longest


def _window(theirs: _Fields, family: Family) -> int | None:
    """The sliding window of any layer."""
    if family.window == "none" or theirs.get("sliding_window") is None:
        return None
    if family.window == "layers":
        if not theirs.flag("use_sliding_window"):
            return None
        layers, first = theirs.count("num_hidden_layers"), theirs.count("max_window_layers", 28, least=0)
        kinds = theirs.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
        if set(kinds) - {"sliding_attention", "full_attention"}:
            raise theirs.refusal("layer_types", "names layers that are not covered")
        if "sliding_attention" not in kinds:
            return None
    return theirs.count("sliding_window")
