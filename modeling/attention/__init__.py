"""Attention variants: the contract they keep and the one table that names them.

A variant is one class here plus one YAML in configs/attention/. Shape suffixes on tensors, used throughout:
B batch, T new tokens in this call, S visible tokens (cached + new), D d_model, H query heads, G key/value heads,
K query/key width per head, V value width per head, N un-rotated part of K, P rotated part of K, L kv_lora_rank,
R q_lora_rank. Weights and modules carry none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from modeling.attention.cache import Cache
from modeling.attention.gqa import GroupedQueryAttention
from modeling.attention.mla import MultiheadLatentAttention


class Attention(Protocol):
    """What the GPT, the cache measurement and the contract tests (contract.py) ask of a variant.

    The constructor takes keyword arguments only, each typed and explicit: the six that the model owns (MODEL_OWNED),
    the rest from the variant's YAML. It raises ValueError with both numbers and the remedy when they do not fit.

    Besides, where there is something to state: `frozen`, the names of parameters that are never trained (all others must
    get a gradient); `sixteen_bits`, the names of cached tensors that a cache of 8 bits keeps in 16. One rotated key
    shared by all heads is such a tensor: its elements are large and unlike, a scale calibrated on its neighbours
    saturates it (vLLM issue 42956), and it is a small part of what is cached.
    """

    has_positions: bool  # it rotates; "learned" in `positions` makes the GPT add a learned table
    positions: str
    causal: bool
    backend: str  # the three of EXECUTION
    decode: str
    kernel: str
    decode_paths: tuple[str, ...]  # what `decode` may be: ("auto",) where there is one path only
    scale: float  # of the logits
    n_heads: int
    n_kv_heads: int
    qk_width: int  # K and V as the attention kernel sees them
    v_head_dim: int
    o_proj: nn.Linear

    @property
    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape per token of each tensor that decoding needs again."""

    @property
    def cache_formula(self) -> int:
        """Elements per token by the paper's formula; what is measured on the buffers must equal it."""

    def __call__(
        self,
        x_BTD: Tensor,
        cache: Cache | None = None,
        positions_BT: Tensor | None = None,
        *,
        valid_BT: Tensor | None = None,
        weights_out: list[Tensor] | None = None,
    ) -> Tensor:
        """x_BTD -> x_BTD.

        cache: where earlier tokens stand; the new ones are appended. positions_BT: rotation angles other than the
        tokens' own places. valid_BT: True at real tokens of a padded batch (pads on either side); outputs at pads
        mean nothing. weights_out: receives weights_BHTS, on backend 'reference' only.
        """


MECHANISMS: dict[str, type[nn.Module]] = {
    "gqa": GroupedQueryAttention,  # MHA and MQA are its ends
    "mla": MultiheadLatentAttention,  # and what differs from it by options
}

MODEL_OWNED = ("d_model", "n_heads", "max_seq_len", "causal", "bias", "norm_eps")

# How attention is computed, not what it is: no constructor takes these, `set_execution` may change them at any time.
#   backend  modeling/kernels/attend.py: the kernel for explicit keys and values
#   decode   auto | expand | absorbed: the path through a cache of latents (modeling/attention/mla.py)
#   kernel   auto | torch | triton: what computes the absorbed path of one new token (modeling/kernels/latent_decode.py)
EXECUTION = {"backend": "auto", "decode": "auto", "kernel": "auto"}


def build_attentions(mechanism: str, options: Mapping[str, Any], n_layers: int, **owned: Any) -> list[Any]:
    """The attention of every layer, from its YAML's options and the model's own numbers. A name, never code, selects it.

    options may hold the keys of EXECUTION. Layers that share (options["sharing"]) are joined to their group's first.
    """
    shape = {key: value for key, value in options.items() if key not in EXECUTION}
    layers: list[Any] = [MECHANISMS[mechanism](**owned, **shape) for _ in range(n_layers)]
    group = options.get("sharing_layers", 1)
    for index, layer in enumerate(layers):
        set_execution(layer, **{key: options.get(key, default) for key, default in EXECUTION.items()})
        if index % group:
            layer.follow(layers[index - index % group])
    return layers


def shares_latents(attention: Any) -> bool:
    """Whether layers hand latents on to one another, so that `forward` takes `shared`."""
    return getattr(attention, "sharing", "none") == "latent"


def set_execution(attention: Any, *, backend: str, decode: str, kernel: str) -> None:
    """Choose how a variant is computed. Raises ValueError for a path that it does not have."""
    paths = attention.decode_paths
    if decode not in paths:
        reason = (
            "it caches keys and values as they are used"
            if len(paths) == 1
            else "a norm or a rotation stands between W_Q and W_UK"
        )
        known = decode in ("expand", "absorbed")
        raise ValueError(
            f"attention.decode={decode} is not a path of this variant{f' ({reason})' if known else ''}; choose "
            f"{' or '.join(paths)}"
        )
    if kernel not in ("auto", "torch") and ("absorbed" not in paths or decode == "expand"):
        raise ValueError(
            f"attention.kernel={kernel} computes the absorbed path, which is not taken here; use attention.kernel=torch"
        )
    if kernel not in ("auto", "torch") and len(getattr(attention, "latent_widths", ())) > 1:
        raise ValueError(
            f"attention.kernel={kernel} reads one latent as key and value; with kv_latent=split use attention.kernel=torch"
        )
    attention.backend, attention.decode, attention.kernel = backend, decode, kernel
