"""Our models as transformers' own classes, with the same weights, in memory and as a folder.

    MHA, GQA, MQA               Llama; with qk_norm Qwen3; with biases on queries, keys and values alone Qwen2
    MLA with RMSNorm latents    DeepSeek-V3, every layer dense
    everything else             a class of ours that they know after register() (harness/huggingface_own.py)

These two files alone import transformers, and only when one of these functions is called.

Letters: D d_model, H heads, N un-rotated and P rotated part of queries and keys, V value width, L kv_lora_rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.errors import UserError
from harness.schema import TrainConfig
from modeling.attention import EXECUTION
from modeling.gpt import GPT

# What a variant must have to be one of their classes, and the choices that fit.
_GQA: dict[str, tuple[Any, ...]] = {"positions": ("rope",)}
_MLA: dict[str, tuple[Any, ...]] = {
    "positions": ("decoupled",), "kv_latent": ("joint",), "latent_norm": ("rms",), "latent_norm_place": ("latent",),
    "sharing": ("none", "weights"), "rope_frequencies": ("computed",),
}  # fmt: skip
# Of the norms on latents in their DeepSeek-V3, whatever its configuration says.
_FILES_ALONE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # never asked, never run
LATENT_NORM_EPS = 1e-6


def register() -> None:
    """Let transformers' AutoConfig and AutoModelForCausalLM load folders of our own class. Again and again if you like."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from harness.huggingface_own import MODEL_TYPE, AttentionAblationConfig, AttentionAblationForCausalLM

    AutoConfig.register(MODEL_TYPE, AttentionAblationConfig, exist_ok=True)
    AutoModelForCausalLM.register(AttentionAblationConfig, AttentionAblationForCausalLM, exist_ok=True)


def as_own(model: GPT, config: TrainConfig) -> Any:
    """`model`, built from `config`, as a PreTrainedModel of our own class: any variant, the same tensors."""
    from harness.huggingface_own import wrapped

    return wrapped(model, config.model, config.attention | EXECUTION)


def as_transformers(model: GPT, config: TrainConfig) -> Any:
    """The PreTrainedModel that computes what `model`, built from `config`, computes: same weights, dtype and device.

    Its vocabulary is ours without the padding. Generation stops at no token. Raises UserError, naming what does not fit,
    for a variant that none of their classes is.
    """
    differing = misfits(config)
    if differing:
        raise UserError(
            f"attention={config.attention['name']} is no model of transformers: its {_family(config)} has no "
            f"{' and no '.join(differing)}"
        )
    from transformers import (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    sizes, attention, family = config.model, config.attention, _family(config)
    scaling = attention["rope_scaling"] or {"rope_type": "default"}
    shared: dict[str, Any] = {
        "vocab_size": model.vocab_size, "hidden_size": sizes.d_model, "intermediate_size": sizes.mlp_hidden,
        "num_hidden_layers": len(model.blocks), "num_attention_heads": sizes.n_heads,
        "max_position_embeddings": model.max_seq_len, "rms_norm_eps": sizes.norm_eps,
        "tie_word_embeddings": sizes.tie_embeddings,
        "rope_parameters": {"rope_theta": attention["rope_theta"], **scaling},
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if family != "Qwen2":  # which has its biases without being told
        shared["attention_bias"] = sizes.bias or attention["projection_bias"] != "model"
    theirs: Any
    with torch.device("meta"):  # no initial values: all of them are replaced
        if attention["mechanism"] == "gqa":
            heads: dict[str, Any] = {"num_key_value_heads": attention["n_kv_heads"], "head_dim": attention["head_dim"]}
            if family == "Qwen3":
                theirs = Qwen3ForCausalLM(Qwen3Config(**shared, **heads))
            elif family == "Qwen2":
                theirs = Qwen2ForCausalLM(Qwen2Config(**shared, **heads, use_sliding_window=False))
            else:
                theirs = LlamaForCausalLM(LlamaConfig(**shared, **heads, mlp_bias=sizes.bias))
        else:
            ranks = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
            theirs = DeepseekV3ForCausalLM(
                DeepseekV3Config(
                    **shared, **{rank: attention[rank] for rank in ranks}, num_key_value_heads=sizes.n_heads,
                    # Their checkpoints' layout: implementations that know no other read ours too.
                    rope_interleave=True, num_mtp_layers=0,
                    first_k_dense_replace=len(model.blocks),  # no experts
                )
            )  # fmt: skip
    theirs.to(model.embedding.weight.dtype).to_empty(device=model.embedding.weight.device)
    weights = dict(_weights(model, sizes.norm_eps))
    if sizes.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    theirs.load_state_dict(weights)
    rotary = type(theirs.model.rotary_emb)
    theirs.model.rotary_emb = rotary(theirs.config).to(model.embedding.weight.device)  # float32, in no state dict
    theirs.tie_weights()
    return theirs.eval()


def _family(config: TrainConfig) -> str:
    """The class of theirs that comes nearest."""
    attention = config.attention
    if attention["mechanism"] != "gqa":
        return "DeepSeek-V3"
    if attention["qk_norm"]:
        return "Qwen3"
    return "Qwen2" if attention["projection_bias"] == "qkv" and not config.model.bias else "Llama"


def misfits(config: TrainConfig) -> list[str]:
    """What no class of theirs has, as field=value; none where one computes the same."""
    model, attention = config.model, config.attention
    grouped = attention["mechanism"] == "gqa"
    wanted = _GQA if grouped else _MLA
    differing = [
        f"attention.{key}={attention[key]}" for key, fitting in wanted.items() if attention[key] not in fitting
    ]
    if grouped and attention["v_head_dim"] != attention["head_dim"]:
        differing.append(f"attention.v_head_dim={attention['v_head_dim']}")
    if model.bias and (not grouped or attention["qk_norm"]):  # only Llama has them in the MLP
        differing.append("model.bias=true")
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


def _weights(model: GPT, norm_eps: float) -> Iterator[tuple[str, Tensor]]:
    """Our parameters under their names."""
    yield "model.embed_tokens.weight", model.embedding.weight[: model.vocab_size].detach()
    yield "model.norm.weight", model.norm.weight.detach()
    yield "lm_head.weight", model.head.weight[: model.vocab_size].detach()
    block: Any
    for number, block in enumerate(model.blocks):
        layer = f"model.layers.{number}"
        parts = {"input_layernorm": block.attention_norm, "post_attention_layernorm": block.mlp_norm, "mlp": block.mlp}
        for name, part in parts.items():
            for key, value in part.state_dict().items():
                yield f"{layer}.{name}.{key}", value
        if hasattr(block.attention, "kv_lora_rank"):
            attention = _latent_weights(block.attention, norm_eps)
        else:  # Llama's and Qwen's names are ours
            attention = block.attention.state_dict()
            if "q_norm.weight" in attention and "q_proj.bias" in attention:  # their Qwen3 has four biases or none
                attention.setdefault("o_proj.bias", torch.zeros_like(block.attention.o_proj.weight[:, 0]))
        for key, value in attention.items():
            yield f"{layer}.self_attn.{key}", value.detach()


def _latent_weights(attention: Any, norm_eps: float) -> dict[str, Tensor]:
    """MLA's parameters under DeepSeek's names.

    A latent times a is normed with eps as the latent itself with eps / a^2: that makes our eps of their fixed one. Scales
    of latents go into the norms' gains, a latent that is a slice of x is a projection by rows of the identity, up-projections
    that several heads share stand there once for each. A latent that has no bias beside a rotated key with one has zeros.
    """
    H, N, P, L = attention.n_heads, attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.kv_lora_rank
    eps_factor = (LATENT_NORM_EPS / norm_eps) ** 0.5
    biases: tuple[Tensor | None, ...]
    if attention.in_proj is not None:
        queries, kv_down, k_rope = attention.in_proj.weight.split(attention.down_widths)
        bias = attention.in_proj.bias
        biases = (None, None, None) if bias is None else bias.split(attention.down_widths)
    else:
        to_queries = attention.q_proj if attention.q_lora_rank is None else attention.q_down_proj
        queries, k_rope = to_queries.weight, attention.k_rope_proj.weight
        if attention.kv_down_proj is None:
            kv_down = torch.eye(L, attention.d_model, dtype=k_rope.dtype, device=k_rope.device)
        else:
            kv_down = attention.kv_down_proj.weight
        biases = (to_queries.bias, getattr(attention.kv_down_proj, "bias", None), attention.k_rope_proj.bias)
    weights = {
        "kv_a_proj_with_mqa.weight": torch.cat([kv_down * eps_factor, _interleaved(k_rope)]),
        "kv_a_layernorm.weight": attention.latent_norms[0].weight * attention.kv_scale,
        "o_proj.weight": attention.o_proj.weight,
    }
    if attention.q_lora_rank is not None:
        weights["q_a_proj.weight"] = queries * eps_factor
        weights["q_a_layernorm.weight"] = attention.q_latent_norm.weight * attention.q_scale
        queries = attention.q_up_proj.weight
    q_bias, kv_bias, k_rope_bias = biases
    if k_rope_bias is not None:
        assert q_bias is not None and attention.q_lora_rank is not None
        kv_bias = torch.zeros_like(kv_down[:, 0]) if kv_bias is None else kv_bias
        weights["q_a_proj.bias"] = q_bias * eps_factor
        weights["kv_a_proj_with_mqa.bias"] = torch.cat([kv_bias * eps_factor, _interleaved(k_rope_bias)])
        weights["o_proj.bias"] = attention.o_proj.bias
    nope, rope = queries.unflatten(0, (H, N + P)).split((N, P), dim=1)
    name = "q_proj.weight" if attention.q_lora_rank is None else "q_b_proj.weight"
    weights[name] = torch.cat([nope, _interleaved(rope, dim=1)], dim=1).flatten(0, 1)
    # Theirs has each head's keys and values side by side.
    ups = [up.weight.unflatten(0, (attention.n_kv_heads, -1)) for up in (attention.k_up_proj, attention.v_up_proj)]
    weights["kv_b_proj.weight"] = (
        torch.cat(ups, dim=1).repeat_interleave(H // attention.n_kv_heads, dim=0).flatten(0, 1)
    )
    return weights


def _interleaved(weight: Tensor, dim: int = 0) -> Tensor:
    """Rows that are rotated in pairs (i, i + P/2), reordered for pairs (2i, 2i + 1)."""
    return weight.unflatten(dim, (2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def save(theirs: Any, folder: Path, end_of_text: int) -> None:
    """config.json, generation_config.json and model.safetensors; `generate` stops at the token `end_of_text`."""
    theirs.config.eos_token_id = theirs.config.pad_token_id = end_of_text
    theirs.generation_config.eos_token_id = theirs.generation_config.pad_token_id = end_of_text
    with _no_progress_bars():
        theirs.save_pretrained(folder)


def load(folder: Path) -> tuple[Any, Any]:
    """Model (float32, in evaluation mode) and tokenizer of a folder, as anybody loads them: by its files alone.

    One of our own class needs register() first.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **_FILES_ALONE)
    return model.eval(), AutoTokenizer.from_pretrained(folder, **_FILES_ALONE)


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
    """||ours - theirs|| / ||theirs|| of the logits of random tokens: what tells the same function from a similar one."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, min(32, model.max_seq_len))
    tokens_BT = torch.randint(model.vocab_size, shape, generator=generator).to(model.embedding.weight.device)
    ours_BTC = model(tokens_BT)[..., : model.vocab_size]
    theirs_BTC = theirs(input_ids=tokens_BT).logits.float()
    return ((ours_BTC - theirs_BTC).norm() / theirs_BTC.norm()).item()


@torch.inference_mode()
def write(theirs: Any, prompts_BT: Tensor, new_tokens: int, stamp: Callable[[], None]) -> None:
    """Greedy `generate` with its own cache; `stamp` is called as each new token is there."""
    theirs.generate(
        input_ids=prompts_BT, attention_mask=torch.ones_like(prompts_BT), max_new_tokens=new_tokens, do_sample=False,
        use_cache=True, streamer=_Stamper(stamp),
    )  # fmt: skip


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
def cache_bytes_per_token(theirs: Any) -> int:
    """Bytes that one token of one row takes in their cache, all layers, read off its tensors."""
    tokens_BT = torch.zeros(1, 8, dtype=torch.long, device=theirs.device)
    cache = theirs(input_ids=tokens_BT, use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // tokens_BT.shape[1]
