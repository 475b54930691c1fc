"""Our models as transformers' own classes, with the same weights: Llama for MHA, GQA and MQA, DeepSeek-V3 for MLA.

The one file that imports transformers, and only when one of these functions is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from harness.errors import UserError
from harness.schema import TrainConfig
from modeling.gpt import GPT

# What a variant must have to be one of their classes, and the class. Their DeepSeek norms take 1e-6 whatever is asked.
_LLAMA: dict[str, Any] = {"positions": "rope", "qk_norm": False, "qk_rope_head_dim": 0}
_DEEPSEEK: dict[str, Any] = {
    "positions": "decoupled", "latent": "learned", "kv_latent": "joint", "latent_norm": "rms", "latent_norm_place": "latent",
    "latent_scale": False, "fused_down_projections": False, "sharing": "none",
}  # fmt: skip


def as_transformers(model: GPT, config: TrainConfig) -> Any:
    """The PreTrainedModel that computes what `model`, built from `config`, computes: same weights, dtype and device.

    Its vocabulary is ours without the padding. Generation stops at no token. Raises UserError, naming what does not fit,
    for a variant that none of their classes is.
    """
    _check(config)
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes, attention = config.model, config.attention
    shared = {
        "vocab_size": model.vocab_size, "hidden_size": sizes.d_model, "intermediate_size": sizes.mlp_hidden,
        "num_hidden_layers": len(model.blocks), "num_attention_heads": sizes.n_heads,
        "num_key_value_heads": attention["n_kv_heads"], "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": sizes.norm_eps, "tie_word_embeddings": sizes.tie_embeddings, "attention_bias": sizes.bias,
        "rope_parameters": {"rope_type": "default", "rope_theta": attention["rope_theta"]},
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    theirs: Any
    with torch.device("meta"):  # no initial values: all of them are replaced
        if attention["mechanism"] == "gqa":
            theirs = LlamaForCausalLM(LlamaConfig(**shared, head_dim=sizes.head_dim, mlp_bias=sizes.bias))
        else:
            ranks = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
            theirs = DeepseekV3ForCausalLM(
                DeepseekV3Config(
                    **shared, **{rank: attention[rank] for rank in ranks}, rope_interleave=False, num_mtp_layers=0,
                    first_k_dense_replace=len(model.blocks),  # no experts
                )
            )  # fmt: skip
    theirs.to(model.embedding.weight.dtype).to_empty(device=model.embedding.weight.device)
    weights = dict(_weights(model))
    if sizes.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    theirs.load_state_dict(weights)
    rotary = type(theirs.model.rotary_emb)
    theirs.model.rotary_emb = rotary(theirs.config).to(model.embedding.weight.device)  # float32, in no state dict
    theirs.tie_weights()
    return theirs.eval()


def _check(config: TrainConfig) -> None:
    """Raises UserError where no class of theirs computes the same."""
    model, attention = config.model, config.attention
    wanted = _LLAMA if attention["mechanism"] == "gqa" else _DEEPSEEK
    differing = [f"attention.{key}={attention[key]}" for key, value in wanted.items() if attention.get(key) != value]
    if model.mlp != "swiglu":
        differing.append(f"model.mlp={model.mlp}")
    if attention["mechanism"] == "gqa":
        if attention["v_head_dim"] != attention["head_dim"]:
            differing.append(f"attention.v_head_dim={attention['v_head_dim']}")
        if attention["head_dim"] != model.head_dim:
            differing.append(f"attention.head_dim={attention['head_dim']}")
    else:
        if attention["n_kv_heads"] != model.n_heads:
            differing.append(f"attention.n_kv_heads={attention['n_kv_heads']}")
        if model.bias:
            differing.append("model.bias=true")
        if model.norm_eps != 1e-6:
            differing.append(f"model.norm_eps={model.norm_eps}")
    if differing:
        name = "Llama" if attention["mechanism"] == "gqa" else "DeepSeek-V3"
        raise UserError(
            f"attention={attention['name']} is no model of transformers: its {name} has no {' and no '.join(differing)}"
        )


def _weights(model: GPT) -> Iterator[tuple[str, Tensor]]:
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
        attention = block.attention
        if not hasattr(attention, "kv_lora_rank"):
            for key, value in attention.state_dict().items():  # Llama's names are ours
                yield f"{layer}.self_attn.{key}", value
            continue
        if attention.q_lora_rank is None:
            queries = {"q_proj": attention.q_proj}
        else:
            queries = {"q_a_proj": attention.q_down_proj, "q_a_layernorm": attention.q_latent_norm,
                       "q_b_proj": attention.q_up_proj}  # fmt: skip
        for name, module in (
            queries | {"kv_a_layernorm": attention.latent_norms[0], "o_proj": attention.o_proj}
        ).items():
            yield f"{layer}.self_attn.{name}.weight", module.weight.detach()
        down = torch.cat([attention.kv_down_proj.weight, attention.k_rope_proj.weight])
        yield f"{layer}.self_attn.kv_a_proj_with_mqa.weight", down.detach()
        # Theirs has each head's keys and values side by side.
        heads = [up.weight.unflatten(0, (attention.n_heads, -1)) for up in (attention.k_up_proj, attention.v_up_proj)]
        yield f"{layer}.self_attn.kv_b_proj.weight", torch.cat(heads, dim=1).flatten(0, 1).detach()


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
