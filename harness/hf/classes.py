"""Our models as transformers' own classes, with the same weights, in memory and as a folder.

    MHA, GQA, MQA               Llama; with qk_norm Qwen3; with biases on queries, keys and values alone Qwen2, or
                                Llama with a bias of zeros on the output
    the same with windows       Qwen3 and Qwen2 as above; without biases Mistral where all layers have one, Ministral
                                where some have, or Qwen2 with biases of zeros
    heads turned in part        Phi-3, without biases; with windows in all layers or in none
    gated heads and qk_norm     Qwen3.5, every layer full attention, or some of gated DeltaNet
    MLA with RMSNorm latents    DeepSeek-V3, every layer dense
    everything else             a class of ours that they know after register() (harness/hf/own_class.py)

These two alone of the files here import transformers, and only when one of these functions is called.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.config.schema import TrainConfig
from harness.errors import UserError, as_user_error
from harness.files.atomic import read_json, write_json
from harness.hf.config_json import FAMILIES, LATENT_SIZES, OWN_TYPE, SIZES, STATE_SIZES
from harness.hf.weights import their_weights
from modeling.attention import EXECUTION, kind_options, kinds_of_layers
from modeling.gpt import GPT
from modeling.shapes import shapes_only

# By mechanism, what a variant must have to be one of their classes, and the choices that fit; below, what else it must have
# to be this one. A mechanism that is not here is known to this project alone.
_FITTING: dict[str, dict[str, tuple[Any, ...]]] = {
    "gqa": {"positions": ("rope",), "q_lora_rank": (None,), "sink_logits": (False,)},
    "mla": {
        "positions": ("decoupled",),
        "kv_latent": ("joint",),
        "latent_norm": ("rms",),
        "latent_norm_place": ("latent",),
        "latent_groups": (1,),
        "gate": ("none",),
        "sharing": ("none", "weights"),
        "rope_frequencies": ("computed",),
        "qk_norm": (False,),
        "sink_logits": (False,),
    },
}
_ALSO_FITTING: dict[str, dict[str, tuple[Any, ...]]] = {
    "Qwen2": {"projection_bias": ("model", "qkv")},
    "Qwen3": {"rotary_fraction": (1.0,)},
    "Phi-3": {"projection_bias": ("model",), "rope_scaling": (None,)},
    "Qwen3.5": {"gate": ("element",), "qk_norm": (True,)},
}
MODEL_TYPES = {
    "Llama": "llama",
    "Mistral": "mistral",
    "Ministral": "ministral",
    "Phi-3": "phi3",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Qwen3.5": "qwen3_5_text",
    "DeepSeek-V3": "deepseek_v3",
}
SINCE_5 = ("MinistralForCausalLM", "Qwen3_5ForCausalLM")  # classes that transformers 4 does not have
_COMPARED = 1024  # tokens, of a model with a longer context
_FILES_ALONE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # never asked, never run


def version() -> str:
    """Of transformers."""
    import transformers

    return str(transformers.__version__)


def register() -> None:
    """Let transformers' AutoConfig and AutoModelForCausalLM load folders of our own class. Again and again if you like."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from harness.hf.own_class import AttentionAblationConfig, AttentionAblationForCausalLM

    AutoConfig.register(OWN_TYPE, AttentionAblationConfig, exist_ok=True)
    AutoModelForCausalLM.register(AttentionAblationConfig, AttentionAblationForCausalLM, exist_ok=True)


def generation_cache(max_seq_len: int, dtype: str) -> Any:
    """past_key_values for our own class: an empty cache of so many tokens a row that keeps what `dtype` says.

    Names are those of cache.dtype (modeling/cache_formats.py): generate(ids, past_key_values=generation_cache(256, "k8v4")).
    Raises UserError for others.
    """
    from harness.hf.own_class import GenerationCache
    from modeling.attention.quantisation import cache_format

    with as_user_error("cache.dtype="):
        return GenerationCache(max_seq_len, cache_format(dtype))


def as_own(model: GPT, config: TrainConfig) -> Any:
    """`model`, built from `config`, as a PreTrainedModel of our own class: any variant, the same tensors."""
    from harness.hf.own_class import as_own_class

    return as_own_class(model, config.model, config.attention | EXECUTION)


def as_transformers(model: GPT, config: TrainConfig, family: str | None = None) -> Any:
    """The PreTrainedModel that computes what `model`, built from `config`, computes: same weights, dtype and device.

    family: one of `families`, the first if None. Its vocabulary is ours without the padding. Generation stops at no token.
    Raises UserError, naming what does not fit, for a variant that none of their classes is.
    """
    differing = misfits(config)
    if differing:
        nearest = families(config)[:1]
        raise UserError(
            f"attention={config.attention['name']} is no model of transformers: {f'its {nearest[0]}' if nearest else 'it'} "
            f"has no {' and no '.join(differing)}"
        )
    from transformers import AutoModelForCausalLM

    embedding, family = model.embedding.weight, family or families(config)[0]
    theirs: Any
    with shapes_only():  # all values are replaced
        theirs = AutoModelForCausalLM.from_config(_their_config(model, config, family))
    theirs.to(embedding.dtype).to_empty(device=embedding.device)
    weights = dict(their_weights(model, config, FAMILIES[MODEL_TYPES[family]]))
    for name, parameter in theirs.named_parameters():  # their Llama and Qwen3 have four biases or none, their Qwen2 three
        if name.endswith("_proj.bias") and name not in weights:
            weights[name] = torch.zeros_like(parameter)
    if config.model.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    theirs.load_state_dict(weights)
    rotary = type(theirs.model.rotary_emb)
    theirs.model.rotary_emb = rotary(theirs.config).to(embedding.device)  # float32, in no state dict
    theirs.tie_weights()
    return theirs.eval()


def _their_config(model: GPT, config: TrainConfig, family: str) -> Any:
    """The configuration of the class of `family` that computes the same."""
    from transformers import AutoConfig

    sizes, (attention, windows, states), known = config.model, _common(config), FAMILIES[MODEL_TYPES[family]]
    scaling = attention["rope_scaling"] or {"rope_type": "default"}
    fields: dict[str, Any] = {
        **{theirs: getattr(sizes, ours) for ours, theirs in SIZES.items()},
        "vocab_size": model.vocab_size,
        "num_key_value_heads": attention["n_kv_heads"],
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": sizes.norm_eps,
        "tie_word_embeddings": sizes.tie_embeddings,
        "rope_parameters": {"rope_theta": attention["rope_theta"], **scaling},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if known.turned is not None:
        fields["rope_parameters"]["partial_rotary_factor"] = attention["rotary_fraction"]
    if known.bias == "attention_bias":  # the others have theirs, or none, without being told
        fields["attention_bias"] = sizes.bias or attention["projection_bias"] != "model"
    if known.window == "layers":
        fields["use_sliding_window"] = any(windows)
        fields["max_window_layers"] = next((layer for layer, window in enumerate(windows) if window), len(windows))
    if any(windows):
        fields["sliding_window"] = max(window or 0 for window in windows)
        if known.window != "always":
            fields["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    if known.mlp_bias:
        fields["mlp_bias"] = sizes.bias
    if family == "Phi-3":
        fields["original_max_position_embeddings"] = model.max_seq_len
    if family == "Qwen3.5":
        fields["layer_types"] = ["linear_attention" if state else "full_attention" for state in states]
        fields |= {theirs: state[ours] for state in states if state for ours, theirs in STATE_SIZES.items()}
    if family == "DeepSeek-V3":
        fields |= {size: attention[size] for size in LATENT_SIZES}
        fields |= {
            "num_key_value_heads": sizes.n_heads,
            "rope_interleave": True,  # their checkpoints' layout: implementations that know no other read ours too
            "num_mtp_layers": 0,
            "first_k_dense_replace": len(model.blocks),  # no experts
        }
    else:
        fields["head_dim"] = attention["head_dim"]
    return AutoConfig.for_model(MODEL_TYPES[family], **fields)


def families(config: TrainConfig) -> list[str]:
    """The classes of theirs that come nearest; where `misfits` finds nothing, each computes the same.

    More than one, the closest first: their Qwen2 comes with a tokenizer of its own, whatever a folder holds. None for a
    mechanism that they do not have at all.
    """
    attention, windows, states = _common(config)
    if not attention or attention["mechanism"] not in _FITTING:
        return []
    if attention["mechanism"] == "mla":
        return ["DeepSeek-V3"]
    if attention["gate"] != "none" or any(states):
        return ["Qwen3.5"]
    if attention["qk_norm"]:
        return ["Qwen3"]
    if attention["rotary_fraction"] != 1:
        return ["Phi-3"]
    plain = attention["projection_bias"] == "model" and not config.model.bias
    if any(windows):
        return ["Mistral" if all(windows) else "Ministral", "Qwen2"] if plain else ["Qwen2"]
    return ["Qwen2", "Llama"] if attention["projection_bias"] == "qkv" and not config.model.bias else ["Llama"]


def _common(config: TrainConfig) -> tuple[dict[str, Any], list[int | None], list[dict[str, Any]]]:
    """The options that all layers have but those of gated DeltaNet; of each layer its window, and its options if it is one
    of these.

    No options where these layers, or the others, differ in more than one window, or others are not of the variant's mechanism.
    """
    attention = config.attention
    kinds = kinds_of_layers(attention, config.model.n_layers)
    of_layers = [kind_options(attention["mechanism"], attention, kind) for kind in kinds]
    windows = [options.pop("window", None) for _, options in of_layers]
    states = [options if name == "gdn" else {} for name, options in of_layers]
    others = [options for name, options in of_layers if name == attention["mechanism"]]
    alike = all(options == group[0] for group in (others, [*filter(None, states)]) for options in group)
    alike &= len({*windows} - {None}) <= 1 and len(others) + sum(map(bool, states)) == len(of_layers)
    return (others[0] if alike and others else {}), windows, states


def export_line(config: TrainConfig) -> str:
    """For people: what a run of this configuration will be exported as."""
    if differing := misfits(config):
        return f"exports as  a class of our own: no stock one that we write has {' and '.join(differing)}"
    return f"exports as  transformers' {families(config)[0]}"


def misfits(config: TrainConfig) -> list[str]:
    """What no class of theirs has, as field=value; none where one computes the same."""
    model, (attention, windows, states) = config.model, _common(config)
    if config.attention["mechanism"] not in _FITTING:
        return [f"attention.mechanism={config.attention['mechanism']}"]
    if not attention:
        return [f"attention.layers=[{','.join(config.attention['layers'])}]"]
    grouped, nearest = attention["mechanism"] == "gqa", families(config)[0]
    differing = [
        f"attention.{key}={attention[key]}"
        for key, fitting in (_FITTING[attention["mechanism"]] | _ALSO_FITTING.get(nearest, {})).items()
        if attention[key] not in fitting
    ]
    if any(states) and nearest != "Qwen3.5":
        differing.append(f"attention.layers=[{','.join(config.attention['layers'])}]")
    elif any(states) and differing:
        differing[-1] += " beside layers of gdn"
    if grouped and attention["v_head_dim"] != attention["head_dim"]:
        differing.append(f"attention.v_head_dim={attention['v_head_dim']}")
    if model.bias and nearest != "Llama":  # only Llama has them in the MLP
        differing.append("model.bias=true")
    if any(windows) and FAMILIES[MODEL_TYPES[nearest]].window == "none":
        differing.append(f"attention.window={max(window or 0 for window in windows)}")
    if any(windows) and not all(windows) and nearest == "Phi-3":
        differing.append(f"attention.layers=[{','.join(config.attention['layers'])}]")
    turned = attention["head_dim"] * attention["rotary_fraction"] if grouped else 0
    if int(turned) != round(turned):  # theirs cut what ours round
        differing.append(f"attention.rotary_fraction={attention['rotary_fraction']} of heads of {attention['head_dim']}")
    # Of their projections from x, the one to queries has no bias (the one to the queries' latent has).
    if not grouped and attention["projection_bias"] == "all" and attention["q_lora_rank"] is None:
        differing.append("attention.projection_bias=all with attention.q_lora_rank=null")
    if not grouped and model.norm_eps == 0:  # which no factor makes of theirs
        differing.append("model.norm_eps=0")
    if model.mlp != "swiglu":
        differing.append(f"model.mlp={model.mlp}")
    if not model.causal:
        differing.append("model.causal=false")
    return differing


def save_theirs(theirs: Any, folder: Path, stops: Sequence[int], begins: Sequence[int] = ()) -> None:
    """config.json, generation_config.json and model.safetensors.

    begins: tokens that the tokenizer puts before a text, with which `generate` begins one where nothing is given; it stops
    at any of `stops`.
    """
    for config in (theirs.config, theirs.generation_config):
        config.bos_token_id = begins[0] if begins else None
        config.eos_token_id = stops[0] if len(stops) == 1 else list(stops)
        config.pad_token_id = stops[0]
    with _no_progress_bars():
        theirs.save_pretrained(folder)
    file = folder / "config.json"
    written = read_json(file)
    write_json(file, written | _legacy(written))


def _legacy(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers before 5, and what was built on it, reads instead of rope_parameters and dtype.

    Without these fields such a reader takes its class's defaults, and computes other logits without a word.
    """
    fields = {"torch_dtype": config["dtype"]}
    if "rope_parameters" in config:
        scaling = dict(config["rope_parameters"])
        fields["rope_theta"] = scaling.pop("rope_theta")
        if "partial_rotary_factor" in scaling:
            fields["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
        fields["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    return fields


def left_out_by(architecture: str, names: Sequence[str]) -> list[str]:
    """Of tensors without a place in this class of theirs, by their names, those that it leaves out on loading."""
    import transformers

    named = getattr(getattr(transformers, architecture, None), "_keys_to_ignore_on_load_unexpected", None) or ()
    # The last is no class's own: a buffer of older checkpoints, which follows from config.json.
    pattern = re.compile("|".join([*named, r"rotary_emb\.inv_freq"]))
    return [name for name in names if pattern.search(name)]


def load(folder: Path) -> tuple[Any, Any]:
    """Model (float32, in evaluation mode) and tokenizer of a folder, as anybody loads them: by its files alone.

    One of our own class needs register() first.
    """
    from transformers import AutoModelForCausalLM

    with _no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **_FILES_ALONE)
    return model.eval(), load_tokenizer(folder)


def load_tokenizer(folder: Path) -> Any:
    """What AutoTokenizer makes of a folder; its class depends on the model_type in config.json too."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, **_FILES_ALONE)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.inference_mode()
def difference(model: GPT, theirs: Any) -> float:
    """||ours - theirs|| / ||theirs|| of the logits of random tokens: what tells the same function from a similar one.

    Over the whole context, for what holds the first tokens may not hold later ones: windows hide some, states are handed on
    between chunks, and positions are stretched. Of a long one over its first 1,024 tokens, or more where a window takes more.
    """
    generator = torch.Generator().manual_seed(0)
    longest = max((getattr(attention, "window", None) or 0) for attention in model.attentions)
    # A vocabulary of 150,000 has 0.6 GB of logits for so many tokens.
    shape = (1, min(max(_COMPARED, longest + 16), model.max_seq_len))
    tokens_BT = torch.randint(model.vocab_size, shape, generator=generator).to(model.embedding.weight.device)
    ours_BTC = model(tokens_BT)[..., : model.vocab_size]
    theirs_BTC = theirs(input_ids=tokens_BT).logits.float()
    return ((ours_BTC - theirs_BTC).norm() / theirs_BTC.norm()).item()


@torch.inference_mode()
def generate_with_theirs(theirs: Any, prompts_BT: Tensor, new_tokens: int, stamp: Callable[[], None]) -> None:
    """Greedy `generate` with its own cache; `stamp` is called as each new token is there."""
    theirs.generate(
        input_ids=prompts_BT,
        attention_mask=torch.ones_like(prompts_BT),
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        streamer=_Stamper(stamp),
    )


class _Stamper:
    """What `generate` asks of a streamer. It is handed the prompt first."""

    def __init__(self, stamp: Callable[[], None]) -> None:
        self._stamp, self._prompt_seen = stamp, False

    def put(self, tokens: Tensor) -> None:
        if self._prompt_seen:
            self._stamp()
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""


@torch.inference_mode()
def their_cache_bytes(theirs: Any, tokens: int) -> int:
    """Bytes that so many tokens of one row take in their cache, all layers: one token's, read off its tensors, times as many.

    A layer with a window keeps one token less than that, since it is given the newest beside them; one with a state, the
    same whatever the tokens.
    """
    tokens_BT = torch.zeros(1, 1, dtype=torch.long, device=theirs.device)
    layers = theirs(input_ids=tokens_BT, use_cache=True).past_key_values.layers
    held = 0
    for layer in layers:
        if hasattr(layer, "recurrent_states"):
            held += sum(state.nbytes for state in (*layer.conv_states.values(), *layer.recurrent_states.values()))
            continue
        window = getattr(layer, "sliding_window", None)
        held += (layer.keys.nbytes + layer.values.nbytes) * (tokens if window is None else min(tokens, window - 1))
    return held
