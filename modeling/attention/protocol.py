"""What a variant of attention offers, to the GPT and to all that measures or checks it.

Letters: B batch, T new tokens, S visible tokens, D d_model, H query heads, K query/key width, V value width.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from modeling.attention.cache import Cache


class Attention(Protocol):
    """What the GPT, the cache measurement and the contract tests (contract.py) ask of a variant.

    The constructor takes keyword arguments only, each typed and explicit: the six that the model owns (MODEL_OWNED),
    the rest from the variant's YAML. It raises Refusal with both numbers and the remedy when they do not fit.

    Besides, where there is something to state: `frozen`, the names of parameters that are never trained (all others must
    get a gradient); `products_per_token`, multiplications of a token in which no weight and no other token takes part
    (modeling/flops.py); `fan_in_factors(variance)`, by matrix what its standard deviation is multiplied by under
    init=fan_in, so that queries, keys and values begin with this variance (modeling/gpt.py); `sixteen_bits`, the names of
    cached tensors that a cache of 8 or 4 bits keeps in 16. One rotated key shared by all heads is such a tensor: its elements
    are large and unlike, a scale calibrated on its neighbours saturates it (vLLM issue 42956), and it is a small part of
    what is cached. `cached_as`: in words, how what is cached is read, where it is not used as it is and there is one path.
    `cached_values`, the names of cached tensors that are values and nothing else, which a cache may keep in other bits than all
    others: keys, and what serves as both.

    With an absorbed path also: `absorbs(new_tokens)`, whether a call of so many takes it; `absorbs_up_to`, where `auto` stops;
    `kernel_for`, what computes it; `kernels_lack`, why no kernel but torch's is for the layer, as the middle of a sentence, or
    None; and where that is more than 3, `numbers_absorbed`: how many float32 numbers of one query, head and cached token it
    holds at once. A layer without such a path may state `kernels`: what else than torch computes its every call, or, where it
    attends by `attend_as` to what is cached (output.py, kernels_of), one new token; each with why it is not for this layer, in
    the same form.

    A layer that keeps something of constant size states `state_shapes`, the shape of each such tensor by name; `wide_states`,
    those of them that are in float32 at least whatever the cache's dtype; and `state_formula`, the elements of these and of the
    others by the paper. Where no token is cached either, nothing attends to tokens (`attends`): then `products_at(context)`
    stands for the products of queries, keys and values in the count of FLOPs, and `weights_out` receives nothing.
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
