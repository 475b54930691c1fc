"""Tied keys and values: one vector per key/value head and token is cached; the value is that vector, the key is made of it.

With t = W_KV x in G heads of K dimensions, of which the last P are rotated, `keys` says how:

    joined   grouped-tied attention, GTA (Zadouri et al. 2025, arXiv 2505.21487): v = t; the key is the first K - P dimensions
             of t beside a rotated key of its own that all heads share, k = [t_1 .. t_(K-P) ; rotate(W_KR x)].
             Cached t and that key, G K + P elements; logits times 1/sqrt(K).
    turned   Gemma 4's full layers (transformers' Gemma4TextAttention with attention_k_eq_v): v = t / rms(t),
             k = rotate(g_k v), queries g_q q / rms(q). That class caches keys and values; as k follows from v and its
             position, v alone is cached here and keys are rotated when they are read. G K elements; logits times 1, their
             size is the gains': g_k begins at 1 and g_q at 1/sqrt(K) (docs/LOG.md).
    stored   the one shared vector of DeepSeek-V4 (transformers' DeepseekV4Attention, without its pools and sinks):
             k = v = rotate(g t / rms(t)), queries q / rms(q). Values were rotated with the keys, so outputs are turned back by
             their query's angle: what a token contributes depends on its distance alone. G K elements; 1/sqrt(K).

Letters: B batch, T new tokens, S visible tokens, D d_model, H query heads, G key/value heads, K width of a head (values are
as wide), P rotated part of K.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modeling.attention.cache import Cache, place_without_cache
from modeling.attention.norms import normed, normed_first
from modeling.attention.output import attend_as, gate_projection, kernels_of, project_out
from modeling.attention.refusals import check_choice, check_heads
from modeling.attention.rope import RotaryEmbedding, rotate, rotate_last
from modeling.refusal import Refusal


class TiedKeyValueAttention(nn.Module):
    """One projection for keys and values, kv_proj; what `keys` makes of it is in the module's docstring.

    gate: on what the heads give, modeling/attention/output.py. qk_norm: with keys=joined, an RMSNorm over the K - P un-rotated
    dimensions of queries and of keys as they are read; the shared rotated key and the value are left as they are. The other two
    have norms of their own.

    Names elsewhere: kv_proj and k_rope_proj are GTA's kv_proj and W_rope_k; kv_proj, q_norm and k_gain Gemma 4's k_proj,
    q_norm and k_norm; kv_proj and kv_norm DeepSeek-V4's kv_proj and kv_norm.
    Raises Refusal for sizes that do not fit together.
    """

    decode_paths = ("auto",)  # a key costs no matrix product with what is cached

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
        qk_rope_head_dim: int,
        keys: str,
        rope_theta: float,
        dropout: float,
        gate: str = "none",
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        check_heads(n_heads, n_kv_heads)
        check_choice("keys", keys, ("joined", "turned", "stored"))
        K, P, joined = head_dim, qk_rope_head_dim, keys == "joined"
        if qk_norm and not joined:
            raise Refusal(f"qk_norm=true does not go with keys={keys}, which norms queries and keys already: leave it out")
        if not 0 < P <= K - joined:
            raise Refusal(
                f"qk_rope_head_dim={P} does not fit head_dim={K}: with keys={keys} the rotated part of a head is wider than 0 "
                f"and {'narrower than' if joined else 'at most'} the head; {max(2, K // 4 * 2)} would fit"
            )
        self.n_heads, self.n_kv_heads, self.head_dim, self.qk_rope_head_dim = n_heads, n_kv_heads, K, P
        self.qk_width, self.v_head_dim = K, K
        self.keys, self.causal, self.dropout = keys, causal, dropout
        self.positions, self.has_positions = "rope", True
        self.backend, self.decode, self.kernel = "auto", "auto", "auto"
        self.scale = 1.0 if keys == "turned" else K**-0.5
        self.sixteen_bits = ("k_rope",) if joined else ()

        self.q_proj = nn.Linear(d_model, n_heads * K, bias=bias)
        self.kv_proj = nn.Linear(d_model, n_kv_heads * K, bias=bias)
        self.k_rope_proj = nn.Linear(d_model, P, bias=bias) if joined else None
        self.o_proj = nn.Linear(n_heads * K, d_model, bias=bias)
        self.gate_proj = gate_projection(gate, d_model=d_model, n_heads=n_heads, v_head_dim=K, bias=bias)
        self.q_norm = None if joined else nn.RMSNorm(K, eps=norm_eps, elementwise_affine=keys == "turned")
        self.k_norm = nn.RMSNorm(K - P, eps=norm_eps) if qk_norm else None
        if qk_norm:
            self.q_norm = nn.RMSNorm(K - P, eps=norm_eps)
        self.kv_norm = None if joined else nn.RMSNorm(K, eps=norm_eps, elementwise_affine=keys == "stored")
        self.k_gain = nn.Parameter(torch.ones(K)) if keys == "turned" else None
        if keys == "turned":
            assert self.q_norm is not None
            nn.init.constant_(self.q_norm.weight, K**-0.5)
        self.rope = RotaryEmbedding(width=P, max_seq_len=max_seq_len, theta=rope_theta)

    @property
    def kernels(self) -> dict[str, str | None]:
        """What else than torch computes one new token through a cache, each with why it is not for this layer, or None."""
        return kernels_of(self)

    @property
    def cached_as(self) -> str:
        """How what is cached is read."""
        return {
            "joined": "values as they are cached, keys joined of them and one rotated key",
            "turned": "values as they are cached, keys rotated when they are read",
            "stored": "one vector as it is cached, key and value",
        }[self.keys]

    @property
    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape per token of each cached tensor."""
        shapes: dict[str, tuple[int, ...]] = {"kv": (self.n_kv_heads, self.head_dim)}
        if self.keys == "joined":
            shapes["k_rope"] = (self.qk_rope_head_dim,)
        return shapes

    @property
    def cache_formula(self) -> int:
        """Cached elements per token: G K, plus P where a rotated key is shared."""
        return self.n_kv_heads * self.head_dim + (self.qk_rope_head_dim if self.keys == "joined" else 0)

    def forward(
        self,
        x_BTD: Tensor,
        cache: Cache | None = None,
        positions_BT: Tensor | None = None,
        *,
        valid_BT: Tensor | None = None,
        weights_out: list[Tensor] | None = None,
    ) -> Tensor:
        """x_BTD -> x_BTD; the arguments are explained in modeling/attention/protocol.py."""
        B, T, _ = x_BTD.shape
        place = place_without_cache(T, valid_BT, causal=self.causal) if cache is None else cache.place(T, valid_BT)
        if positions_BT is not None and cache is not None and self.keys == "turned":
            raise Refusal("keys=turned rotates cached keys by their slots: leave positions_BT out")
        cos, sin = tables = place.tables(self.rope, T, positions_BT)
        q_BTHK = normed_first(self.q_norm, self.q_proj(x_BTD).view(B, T, self.n_heads, self.head_dim))
        kv_BTGK = normed(self.kv_norm, self.kv_proj(x_BTD).view(B, T, self.n_kv_heads, self.head_dim))
        new = {"kv": rotate_last(kv_BTGK, tables) if self.keys == "stored" else kv_BTGK}
        if self.k_rope_proj is not None:
            new["k_rope"] = rotate(self.k_rope_proj(x_BTD).unsqueeze(2), tables).squeeze(2)
        seen = new if cache is None else cache.append(valid_BT, **new)
        kv_BSGK = k_BSGK = seen["kv"].to(q_BTHK.dtype)
        turned = None
        if self.k_norm is not None:
            k_BSGK = normed(self.k_norm, kv_BSGK[..., : -self.qk_rope_head_dim])
        elif self.k_gain is not None:
            key_tables = tables if cache is None else place.key_tables(self.rope, kv_BSGK.shape[1])
            turned = (self.k_gain, *key_tables)
        q_BTHK, k_rope = rotate_last(q_BTHK, tables), seen.get("k_rope")
        out_BTHK = attend_as(self, q_BTHK, k_BSGK, kv_BSGK, place, weights_out, k_rope, turned)
        if self.keys == "stored":
            out_BTHK = rotate_last(out_BTHK, (cos, -sin))
        return project_out(self, out_BTHK, x_BTD)
