"""Multi-head, grouped-query and multi-query attention (Vaswani et al. 2017; Ainslie et al. 2023, arXiv 2305.13245).

One mechanism: H query heads share G key/value heads. G = H is MHA, G = 1 is MQA. Positions are a choice, so that an
ablation can take one step at a time:

    rope       all K dimensions of queries and keys are rotated, or the first ones  cache per token: G * (K + V)
    learned    nothing is rotated; the GPT adds a learned position table            cache per token: G * (K + V)
    none       no position information but the causal mask's                        cache per token: G * (K + V)
    decoupled  MLA's split on uncompressed heads: K un-rotated dimensions a head    cache per token: G * (K + V) + P
               plus P rotated ones, whose key is shared by all heads

q_lora_rank gives queries a low rank, with a norm between the two factors: q = W_UQ norm(W_DQ x). With one key/value head and
wide heads it is multi-matrix factorisation attention, MFA (Hu et al. 2024, arXiv 2412.19255; the norm is that of Step-3's
code, where q_down_proj, q_latent_norm and q_up_proj are q_proj, inter_norm and wq). The cache does not change.

Logits are scaled by 1/sqrt(K), with decoupled positions by 1/sqrt(K + P). Two more choices change what is seen:

    window       query t sees keys t-w+1..t (Beltagy et al. 2020, arXiv 2004.05150; Gemma 2, arXiv 2408.00118): of S tokens
                 min(S, w) are cached
    sink_logits  a learned logit a head joins the softmax and brings no value (gpt-oss, arXiv 2508.10925):
                 p_s = exp(l_s) / (exp(sink) + sum exp(l_s'))

Letters: B batch, T new tokens, S visible tokens, D d_model, H query heads, G key/value heads, K query/key width,
V value width, R q_lora_rank, P width of the shared rotated part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modeling.attention.cache import Cache, place_without_cache
from modeling.attention.norms import normed, normed_first
from modeling.attention.output import attend_as, gate_projection, kernels_of, project_out
from modeling.attention.refusals import check_alike, check_choice, check_heads, check_query_rank, check_reach
from modeling.attention.rope import RotaryEmbedding, rotate, rotate_first
from modeling.refusal import Refusal


class GroupedQueryAttention(nn.Module):
    """MHA, GQA and MQA. Weights carry Llama's names: q_proj, k_proj, v_proj, o_proj (and k_rope_proj if decoupled).

    head_dim is the width K of queries and per-head keys, v_head_dim that of values; qk_norm applies an RMSNorm over
    each head's K dimensions to queries and keys before rotation (Henry et al. 2020, arXiv 2010.04245; as in Qwen3).
    rotary_fraction: the share of the K dimensions, from the first one on, that positions=rope turns (GPT-NeoX, Black et al.
    2022, arXiv 2204.06745); frequencies are computed over the part that is turned.
    window: how many of the newest tokens, its own included, a query sees; None for all. sink_logits: a learned sink a head,
    0 at first.
    projection_bias: which projections have biases: as the model's other matrices (`model`), besides on queries, keys and
    values (`qkv`, as in Qwen2) or on all four (`all`). rope_scaling: modeling/attention/rope.py, scaled_frequencies.
    gate: on what the heads give, modeling/attention/output.py.
    Raises Refusal for sizes that do not fit together.
    """

    decode_paths = ("auto",)  # keys and values are cached as they are used

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        max_seq_len: int,
        causal: bool,
        bias: bool,
        norm_eps: float,
        n_kv_heads: int,
        head_dim: int,
        v_head_dim: int,
        qk_rope_head_dim: int,
        positions: str,
        rope_theta: float,
        qk_norm: bool,
        dropout: float,
        projection_bias: str = "model",
        rope_scaling: dict[str, Any] | None = None,
        gate: str = "none",
        q_lora_rank: int | None = None,
        window: int | None = None,
        sink_logits: bool = False,
        rotary_fraction: float = 1.0,
    ) -> None:
        super().__init__()
        check_heads(n_heads, n_kv_heads)
        check_choice("positions", positions, ("rope", "learned", "none", "decoupled"))
        check_choice("projection_bias", projection_bias, ("model", "qkv", "all"))
        if rope_scaling is not None and positions not in ("rope", "decoupled"):
            raise Refusal(f"rope_scaling does not go with positions={positions}, which rotates nothing: leave it out")
        if head_dim < 1 or v_head_dim < 1:
            raise Refusal(f"head_dim={head_dim} and v_head_dim={v_head_dim} must be at least 1")
        if (positions == "decoupled") != (qk_rope_head_dim > 0) or qk_rope_head_dim < 0:
            raise Refusal(
                f"positions={positions} does not go with qk_rope_head_dim={qk_rope_head_dim}: the shared rotated key "
                f"is wider than 0 exactly when positions=decoupled"
            )
        check_query_rank(q_lora_rank, d_model, n_heads * (head_dim + qk_rope_head_dim))
        check_reach(window, causal)
        self.n_heads, self.n_kv_heads, self.head_dim, self.v_head_dim = n_heads, n_kv_heads, head_dim, v_head_dim
        self.qk_rope_head_dim, self.qk_width = qk_rope_head_dim, head_dim + qk_rope_head_dim
        self.positions, self.causal, self.dropout = positions, causal, dropout
        self.backend, self.decode, self.kernel = "auto", "auto", "auto"
        self.window, self.follows = window, False
        self.scale = self.qk_width**-0.5
        self.has_positions = positions in ("rope", "decoupled")
        self.sixteen_bits: tuple[str, ...] = ("k_rope",) if qk_rope_head_dim else ()
        self.cached_values: tuple[str, ...] = ("v",)

        on_inputs, on_output = bias or projection_bias != "model", bias or projection_bias == "all"
        self.q_lora_rank = q_lora_rank
        if q_lora_rank is None:
            self.q_proj = nn.Linear(d_model, n_heads * self.qk_width, bias=on_inputs)
        else:
            self.q_down_proj = nn.Linear(d_model, q_lora_rank, bias=on_inputs)
            self.q_latent_norm = nn.RMSNorm(q_lora_rank, eps=norm_eps)
            self.q_up_proj = nn.Linear(q_lora_rank, n_heads * self.qk_width, bias=False)
        self.k_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=on_inputs)
        self.v_proj = nn.Linear(d_model, n_kv_heads * v_head_dim, bias=on_inputs)
        self.o_proj = nn.Linear(n_heads * v_head_dim, d_model, bias=on_output)
        self.gate_proj = gate_projection(gate, d_model=d_model, n_heads=n_heads, v_head_dim=v_head_dim, bias=on_output)
        self.k_rope_proj = nn.Linear(d_model, qk_rope_head_dim, bias=on_inputs) if qk_rope_head_dim else None
        self.sink_logits = nn.Parameter(torch.zeros(n_heads)) if sink_logits else None
        self.q_norm = nn.RMSNorm(head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=norm_eps) if qk_norm else None
        self.rotary_fraction = rotary_fraction
        turned = head_dim if rotary_fraction == 1 else _turned(head_dim, rotary_fraction, positions)
        rotated_width = {"rope": turned, "decoupled": qk_rope_head_dim}.get(positions, 0)
        self.rope = (
            RotaryEmbedding(width=rotated_width, max_seq_len=max_seq_len, theta=rope_theta, scaling=rope_scaling)
            if rotated_width
            else None
        )

    def follow(self, leader: GroupedQueryAttention) -> None:
        """Read an earlier layer's keys and values, rotated and normed there (Brandon et al. 2024, arXiv 2405.12981).

        Raises Refusal where these are not what the queries of this layer expect.
        """
        check_alike("keys and values", self._read, leader._read)
        self.follows = True
        del self.k_proj, self.v_proj
        self.k_rope_proj = self.k_norm = None
        self.sixteen_bits = self.cached_values = ()

    @property
    def kernels(self) -> dict[str, str | None]:
        """What else than torch computes one new token through a cache, each with why it is not for this layer, or None."""
        return kernels_of(self)

    @property
    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape per token of each cached tensor; none where another layer's are read."""
        if self.follows:
            return {}
        shapes: dict[str, tuple[int, ...]] = {"k": (self.n_kv_heads, self.head_dim), "v": (self.n_kv_heads, self.v_head_dim)}
        if self.qk_rope_head_dim:
            shapes["k_rope"] = (self.qk_rope_head_dim,)
        return shapes

    @property
    def cache_formula(self) -> int:
        """Cached elements per token: G(K + V), plus P where a rotated key is shared; none where another layer's are read."""
        return 0 if self.follows else self.n_kv_heads * (self.head_dim + self.v_head_dim) + self.qk_rope_head_dim

    def forward(
        self,
        x_BTD: Tensor,
        cache: Cache | None = None,
        positions_BT: Tensor | None = None,
        *,
        valid_BT: Tensor | None = None,
        weights_out: list[Tensor] | None = None,
        shared: list[Tensor] | None = None,
    ) -> Tensor:
        """x_BTD -> x_BTD; the arguments are explained in modeling/attention/protocol.py.

        shared: where layers read one another's keys and values, what the first fills with those it sees and others read.
        """
        B, T, _ = x_BTD.shape
        if cache is None:
            place = place_without_cache(T, valid_BT, causal=self.causal, window=self.window)
        else:
            place = cache.place(T, valid_BT)
        q_BTHK = normed_first(self.q_norm, self._queries(x_BTD).view(B, T, self.n_heads, self.qk_width))
        tables = None
        if self.rope is not None:
            tables = place.tables(self.rope, T, positions_BT)
            if self.qk_rope_head_dim:
                q_BTHN, q_BTHP = q_BTHK.split((self.head_dim, self.qk_rope_head_dim), dim=-1)
                q_BTHK = torch.cat((q_BTHN, rotate(q_BTHP, tables)), dim=-1)
            else:
                q_BTHK = rotate_first(q_BTHK, tables)
        if self.follows:
            assert shared is not None and len(shared) > 0, "a layer that reads another one's keys and values was given none"
            seen = shared
            if cache is not None:
                cache.advance(T, valid_BT)
        else:
            new = self._keys_and_values(x_BTD, tables)
            seen = list((new if cache is None else cache.append(valid_BT, **new)).values())
            if shared is not None:
                shared[:] = seen
        k_BSGK, v_BSGV, *k_rope = seen
        out_BTHV = attend_as(self, q_BTHK, k_BSGK, v_BSGV, place, weights_out, k_rope[0] if k_rope else None)
        return project_out(self, out_BTHV, x_BTD)

    def _keys_and_values(self, x_BTD: Tensor, tables: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
        """Of the new tokens, by the names of the cache's buffers."""
        k_BTGK = self.k_proj(x_BTD).unflatten(-1, (self.n_kv_heads, self.head_dim))
        v_BTGV = self.v_proj(x_BTD).unflatten(-1, (self.n_kv_heads, self.v_head_dim))
        if self.k_norm is not None:
            k_BTGK = normed(self.k_norm, k_BTGK)
        if tables is None:
            return {"k": k_BTGK, "v": v_BTGV}
        if self.k_rope_proj is None:
            return {"k": rotate_first(k_BTGK, tables), "v": v_BTGV}
        return {"k": k_BTGK, "v": v_BTGV, "k_rope": rotate(self.k_rope_proj(x_BTD).unsqueeze(2), tables).squeeze(2)}

    @property
    def _read(self) -> dict[str, Any]:
        """What queries take keys and values to be."""
        options = ("n_kv_heads", "head_dim", "v_head_dim", "qk_rope_head_dim", "positions", "rotary_fraction", "window")
        rotation = {} if self.rope is None else {"rope_theta": self.rope.theta, "rope_scaling": self.rope.scaling}
        return {option: getattr(self, option) for option in options} | {"qk_norm": self.q_norm is not None} | rotation

    def _queries(self, x_BTD: Tensor) -> Tensor:
        """Of all heads, at once or through their latent."""
        if self.q_lora_rank is None:
            return self.q_proj(x_BTD)
        return self.q_up_proj(normed(self.q_latent_norm, self.q_down_proj(x_BTD)))


def _turned(head_dim: int, fraction: float, positions: str) -> int:
    """Dimensions of a head that are rotated where not all are."""
    if positions != "rope":
        raise Refusal(f"rotary_fraction={fraction} does not go with positions={positions}, another scheme: leave it out")
    width = round(head_dim * fraction)
    if not 0 < fraction < 1 or width % 2 or abs(width - head_dim * fraction) > 1e-6:
        possible = [f"{even / head_dim:g}" for even in range(2, head_dim + 1, 2)]
        raise Refusal(
            f"rotary_fraction={fraction} of head_dim={head_dim} is {head_dim * fraction:g} dimensions, and an even number "
            f"from 2 to {head_dim} can be turned: choose one of {', '.join(possible[:16])}"
            f"{' and so on' if len(possible) > 16 else ''}"
        )
    return width
