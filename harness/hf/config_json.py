"""A config.json of transformers, read in one place for all that asks it: the import and the calculator of caches.

What stands in the file is data: it is bounded before anything is made of it, each field is checked as it is read, and a
refusal names the field. `FAMILIES` says of each model_type how it is read; transformers is not needed for that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.config.checks import MOST, WIDEST
from harness.config.schema import ModelConfig
from harness.config.typed import typed
from harness.errors import UserError
from harness.files.untrusted import Unreadable, read_object

LARGEST_FILE = 16 * 1024**2  # bytes
MOST_ENTRIES, DEEPEST = 200_000, 24
# What a run's configuration may say at most, by their names; any other count is a width.
_MOST = {
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_decoder_layers", "decoder_layers", "depth"),
        MOST["model.n_layers"],
    ),
    "max_position_embeddings": MOST["model.max_seq_len"],
    "vocab_size": MOST["model.vocab_size"],
}
# Where a wrapper keeps its language model, the outermost first.
INNER = ("thinker_config", "text_config", "llm_config", "language_config", "language_model_config", "lm_config")
OWN_TYPE = "attention_ablation"  # of an export where no class of transformers fits (harness/hf/own_class.py)
# Ours -> theirs, in both directions.
SIZES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "mlp_hidden": "intermediate_size",
}
STATE_SIZES = {
    "n_k_heads": "linear_num_key_heads",
    "n_v_heads": "linear_num_value_heads",
    "head_dim": "linear_key_head_dim",
    "v_head_dim": "linear_value_head_dim",
    "conv_width": "linear_conv_kernel_dim",
}
LATENT_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True)
class Family:
    """How config.json is read for one model_type, by the import, or by the calculator's formula, or by both.

    defaults: of fields that are often left out, as its class in transformers has them.
    """

    latent: bool = False
    layers: str = "num_hidden_layers"
    groups: str = "num_key_value_heads"  # empty: MHA
    width: str = "head_dim"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # The import: the class whose function a run keeps, None where there is no import; and what that class has.
    architecture: str | None = None
    qk_norm: bool = False
    bias: str = "none"  # on projections: none, qkv, or where attention_bias says so
    mlp_bias: bool = False  # whether the field is read
    window: str = "none"  # none, always, listed: where layer_types says so, or layers: where use_sliding_window does too
    turned: float | None = None  # the share of a head that is rotated where nothing says it; None: always all of it
    scaled: bool = True  # whether it knows the rotations that were stretched to longer contexts
    joined: bool = False  # whether queries, keys and values are one tensor, and gate and up of the MLP
    gated: bool = False  # whether heads are gated, by rows beside those of their queries
    states: bool = False  # whether layers may be gated DeltaNet's, where layer_types says so
    gain_above: float = 0.0  # what its norms add to their weights
    # The calculator: transformers has no class to measure, and every layer sees everything.
    by_formula: bool = False


_LATENT = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_MISTRAL = {"num_key_value_heads": 8, "sliding_window": 4096}
_STATES = dict(zip(STATE_SIZES.values(), (16, 32, 128, 128, 4), strict=True))
_QWEN = {"num_key_value_heads": 32, "max_window_layers": 28}
# What of others that are asked for is no GPT's of this project, as the rest of a sentence.
UNLIKE = {
    "gemma": "scales its embedding, adds 1 to the gains of its norms, and has a GELU MLP",
    "gemma2": "has four norms a block, caps the logits of attention and head, scales its embedding, and has a GELU MLP",
    "gemma3_text": "has four norms a block, scales its embedding, turns windowed layers by another base, and has a GELU MLP",
    "gpt_oss": "routes tokens to experts (its attention is attention=swa_sinks)",
    "cohere": "computes attention and MLP side by side from one LayerNorm, and scales its logits",
    "olmo2": "has its norms behind attention and MLP, and one over the queries and keys of all heads",
    "exaone4": "has its norms behind attention and MLP",
    "mixtral": "routes tokens to experts",
    "qwen3_next": "routes tokens to experts",
    "qwen3_5": "sees images",
}
UNLIKE |= {"gemma3": UNLIKE["gemma3_text"], "cohere2": UNLIKE["cohere"], "olmo3": UNLIKE["olmo2"]}
# Every other type is measured by its class in transformers, and not imported.
FAMILIES = {
    "llama": Family(architecture="LlamaForCausalLM", bias="attention_bias", mlp_bias=True),
    "mistral": Family(defaults=_MISTRAL, architecture="MistralForCausalLM", window="always"),
    "ministral": Family(defaults=_MISTRAL, architecture="MinistralForCausalLM", window="listed"),
    "phi3": Family(
        defaults={"rms_norm_eps": 1e-5}, architecture="Phi3ForCausalLM", window="always", turned=1.0, scaled=False, joined=True
    ),
    "qwen2": Family(defaults=_QWEN, architecture="Qwen2ForCausalLM", bias="qkv", window="layers"),
    "qwen3": Family(
        defaults=_QWEN | {"head_dim": 128},
        architecture="Qwen3ForCausalLM",
        qk_norm=True,
        bias="attention_bias",
        window="layers",
    ),
    "qwen3_5_text": Family(
        defaults={"num_key_value_heads": 4, "head_dim": 256, "full_attention_interval": 4} | _STATES,
        architecture="Qwen3_5ForCausalLM",
        qk_norm=True,
        bias="attention_bias",
        turned=0.25,
        gated=True,
        states=True,
        gain_above=1.0,
    ),
    "deepseek_v2": Family(
        latent=True, defaults=_LATENT, architecture="DeepseekV2ForCausalLM", bias="attention_bias", mlp_bias=True
    ),
    "deepseek_v3": Family(latent=True, defaults=_LATENT, architecture="DeepseekV3ForCausalLM", bias="attention_bias"),
    # Their code is published beside their weights and is no part of transformers 5.23.
    "kimi_k2": Family(latent=True, by_formula=True),  # moonshotai/Kimi-K2: DeepSeek-V3's attention
    # deepseek-ai/deepseek-moe-16b: Llama's attention; also DeepSeek-V2's code with use_mla=false
    "deepseek": Family(by_formula=True),
    "internlm2": Family(by_formula=True),  # internlm/internlm2-7b
    "mimo": Family(by_formula=True),  # XiaomiMiMo/MiMo-7B: Qwen2's attention
    "baichuan": Family(groups="", by_formula=True),  # baichuan-inc/Baichuan2-7B: MHA
    "qwen": Family(groups="", by_formula=True),  # Qwen/Qwen-7B, the first: MHA
    "xverse": Family(groups="", by_formula=True),  # xverse/XVERSE-13B: MHA
    "exaone": Family(layers="num_layers", by_formula=True),  # LGAI-EXAONE/EXAONE-3.0-7.8B
    # stepfun-ai/step3: multi-matrix factorisation, one key and one value head; in step3_vl's text_config
    "step3_text": Family(groups="num_attention_groups", defaults={"num_attention_groups": 1, "head_dim": 256}, by_formula=True),
    "chatglm": Family(layers="num_layers", groups="multi_query_group_num", width="kv_channels", by_formula=True),
}
IMPORTED = {name: family for name, family in FAMILIES.items() if family.architecture is not None}
BY_FORMULA = {name: family for name, family in FAMILIES.items() if family.by_formula}


def their_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file that somebody else wrote. Raises UserError where there is none, or no small one."""
    try:
        if (size := file.stat().st_size) > LARGEST_FILE:
            raise Unreadable(f"{size:,} bytes are more than {LARGEST_FILE:,}")
        return read_object(file, infinite=True)
    except (OSError, Unreadable) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): fetch it again") from None


def refuse_impossible(config: Any, path: str = "", depth: int = 0) -> int:
    """How many values a config.json holds. Raises UserError for what no file means, before anything is built from it."""
    if depth > DEEPEST:
        raise UserError(f"the config.json nests deeper than {DEEPEST} levels at {path[:60]}: that is no model's")
    entries = 0
    for key, value in config.items() if isinstance(config, Mapping) else enumerate(config):
        here = f"{path}.{key}" if path else str(key)
        names = isinstance(value, list) and all(isinstance(name, str) for name in value)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if key in INNER and not (value is None or isinstance(value, Mapping)):
            raise refusal(here, value, "must be an object: correct it")
        if key == "layer_types" and value is not None and not names:
            raise refusal(here, value, "must list one name for each layer: correct it")
        if isinstance(value, str) and value.lower() in ("true", "false", "null", "none") and key != "topk_method":
            raise refusal(here, value, f"is text: write {value.lower()} without quotes")
        if is_whole and abs(value) >= 2**63:
            raise UserError(f"{here} of the config.json has {len(str(value))} digits: correct it")
        if key in _MOST and isinstance(value, (int, float)) and value > _MOST[key]:
            raise refusal(here, value, f"is more than any model has ({_MOST[key]:,}): correct it")
        entries += 1
        if isinstance(value, (Mapping, list)):
            entries += refuse_impossible(value, here, depth + 1)
        if entries > MOST_ENTRIES:
            raise UserError(f"the config.json holds more than {MOST_ENTRIES:,} values at {here[:60]}: that is no model's")
    return entries


def refusal(name: str, value: Any, reason: str) -> UserError:
    """Of a field: its value as it stands there, and the reason with the remedy."""
    shown = json.dumps(value)
    return UserError(f"{name}={shown if len(shown) < 60 else f'{shown[:56]} ...'} of the config.json {reason}")


class Fields:
    """The fields of one config.json, read as its family is."""

    def __init__(self, config: Mapping[str, Any], family: Family) -> None:
        self.config, self.family = config, family

    def get(self, name: str) -> Any:
        """As it stands there; None where it is absent and has no default."""
        return self.config.get(name, self.family.defaults.get(name))

    def refusal(self, name: str, reason: str) -> UserError:
        return refusal(name, self.get(name), reason)

    def count(self, name: str, least: int = 1) -> int:
        """A whole number. Raises UserError for anything else, and where it is absent."""
        if name not in self.config and name not in self.family.defaults:
            raise UserError(f"the config.json has no {name}, which nothing else says: add the field")
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.refusal(name, f"must be a whole number of at least {least}: correct it")
        if value > (most := _MOST.get(name, WIDEST)):
            raise self.refusal(name, f"is more than any model has ({most:,}): correct it")
        return value

    def optional(self, name: str) -> int | None:
        return None if self.get(name) is None else self.count(name)

    def number(self, name: str, default: float) -> float:
        value = self.config.get(name, self.family.defaults.get(name, default))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise self.refusal(name, "must be a number above 0: correct it")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.config.get(name, default)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(name, "must be true or false: correct it")
        return bool(value)

    def heads(self) -> tuple[int, int, int]:
        """(query heads, key/value heads, the width of one) of attention without a latent."""
        heads, family = self.count("num_attention_heads"), self.family
        groups = (self.optional(family.groups) if family.groups else None) or heads
        if heads % groups:
            raise self.refusal(family.groups, f"does not divide num_attention_heads={heads}: correct one of them")
        width = self.optional(family.width)
        if width is None:
            d_model = self.count("hidden_size")
            if d_model % heads:
                raise self.refusal("hidden_size", f"is no multiple of num_attention_heads={heads}: add {family.width}")
            width = d_model // heads
        return heads, groups, width

    def latent_sizes(self) -> dict[str, Any]:
        """LATENT_SIZES by name; a q_lora_rank of None has no latent of queries."""
        return {name: self.optional(name) if name == "q_lora_rank" else self.count(name) for name in LATENT_SIZES}


def refuse_absent(config: Mapping[str, Any]) -> None:
    """Raises UserError, naming the first field of those given that is null."""
    for name, value in config.items():
        if value is None:
            raise UserError(f"the config.json has no {name}: it is not what scripts/export.py wrote; export the run again")


def own_model(model: Any) -> ModelConfig:
    """Its `model`, checked as a run's own is. Raises UserError, naming the field."""
    shape: ModelConfig = typed(ModelConfig, model, "model")
    if not shape.causal:
        raise UserError("model.causal=false cannot write text: it is no causal language model")
    return shape
