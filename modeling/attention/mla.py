"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values through one cached latent.

Equations 9-19 of the paper, in row-vector convention (W_x is the module's weight, transposed):

    c_KV = norm(x W_DKV)                  (9)         kv_down_proj    the latent that is cached, L wide
    k_C  = c_KV W_UK,  v_C = c_KV W_UV    (10, 11)    k_up_proj, v_up_proj
    k_R  = rotate(x W_KR)                 (15)        k_rope_proj     P wide, one for all heads, cached after rotation
    c_Q  = norm(x W_DQ)                   (12)        q_down_proj     R wide; absent without q_lora_rank
    [q_C ; q_R] = c_Q [W_UQ ; W_QR]       (13, 14)    q_up_proj, or q_proj on x without q_lora_rank; q_R is rotated
    o    = softmax([q_C ; q_R] [k_C ; k_R]^T / sqrt(N + P)) v_C,  out = o W_O      (16 to 19)

The norms are section 3.1.2's. That W_UK and W_UV can be absorbed is said in words: section 2.1.2 and appendix C.

Two execution paths, one set of weights (attention.decode):

    expand     keys and values are rebuilt from the latents: training, and long chunks. O(S) projections a call.
    absorbed   attention in latent space: q_L = q_C W_UK^T replaces the query, o = (softmax(...) c_KV) W_UV the value,
               as W_UK and W_UV associate with either side. MQA of width L + P; the two thin factors stay apart (merged
               they have 3.2 times the parameters at DeepSeek's shape). The scale stays 1/sqrt(N + P).

Cache per token: L + P elements. Hugging Face's names: q_down_proj q_a_proj, q_up_proj q_b_proj, kv_down_proj and
k_rope_proj together kv_a_proj_with_mqa, k_up_proj and v_up_proj together kv_b_proj, latent_norm kv_a_layernorm.

Position schemes: `decoupled` (the paper's), `learned` and `none` (plain low-rank MLA, P = 0), `rope_after_up` (the
up-projected keys are rotated; every cached latent must then be expanded and rotated at each step, because a rotation
between W_Q and W_UK depends on both positions and cannot be absorbed).

Grouped latent attention, GLA (Zadouri et al. 2025, arXiv 2505.21487), is this with latent_groups latents of L / latent_groups
each, with a norm of its own, each up-projected for its share of the heads, and one rotated key for all of them.

Letters: B batch, T new tokens, S visible tokens, D d_model, H query heads, G key/value heads, K = N + P query/key
width, V value width, N un-rotated part, P rotated part, L kv_lora_rank, R q_lora_rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modeling.attention.cache import Cache, Placement, check_window, place_without_cache
from modeling.attention.norms import widely_normed
from modeling.attention.output import attend_as, gate_projection, project_out
from modeling.attention.refusals import check_alike, check_choice, check_heads, check_query_rank, check_reach
from modeling.attention.rope import RotaryEmbedding, StoredRotaryEmbedding, logit_factor, rotate
from modeling.kernels.decode_kernels import OTHERS, select_kernel
from modeling.kernels.latent_decode import latent_attend, latent_decode
from modeling.refusal import Refusal

MANY = 2**31 - 1  # queries


class MultiheadLatentAttention(nn.Module):
    """MLA with every choice that an ablation wants to move, one at a time.

    n_kv_heads below n_heads: the up-projections make G heads, shared as in GQA; the cache does not change.
    latent: where it comes from. `learned` (the paper's); the controls `frozen`, a random projection of x that is never
        trained (N(0, 1/D), so that latents have x's variance), and `slice`, the first L dimensions of x itself.
    kv_latent: `joint` (keys and values read one latent) or `split` (each reads its own half of the L dimensions: the
        same cache as joint).
    latent_groups: so many latents of equal width, each for as many consecutive heads (1: MLA; above: GLA).
    latent_norm: rms | layer | none; latent_norm_place: `latent` (before caching, as in the paper) or `up_projected`
        (over each head's un-rotated keys, values and, with q_lora_rank, un-rotated queries; blocks absorption).
    qk_norm: an RMSNorm over the N un-rotated dimensions of each head's queries and up-projected keys (gqa.py's, gains in
        q_up_norm and k_up_norm); the rotated key that heads share is left as it is. It blocks absorption: a norm of W_UK c is
        not linear in c. The norm of the latent, which some call QK-norm in MLA, is latent_norm, and blocks nothing.
    latent_scale: latents times sqrt(D / rank) (MLRA, arXiv 2603.02188), which undoes the narrowing's loss of variance.
    fused_down_projections: all down-projections of x in one matrix (in_proj), the same function.
    sharing, sharing_layers: what groups of that many consecutive layers have in common. `weights`: one kv_down_proj and
        k_rope_proj (fewer parameters; the same cache, for each layer compresses its own input). `latent`: the latent and
        rotated key of the group's first layer, which the others read (a cache divided by sharing_layers).
    bias: on the learned projections that read x and on o_proj, none on the up-projections (DeepSeek's attention_bias, which
        leaves out a q_proj that reads x). projection_bias: `model` (where the model's other matrices have them) or `all`.
    rope_scaling: modeling/attention/rope.py, scaled_frequencies. rope_frequencies: `computed` from rope_theta, or `stored`
        with the weights (converted layers, modeling/conversion/).
    gate: on what the heads give, modeling/attention/output.py. sink_logits: a learned sink a head, 0 at first (gqa.py).
    window: how many of the newest tokens, its own included, a query sees; None for all (gqa.py).
    Raises Refusal for sizes and choices that do not fit together.
    """

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
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        latent: str,
        kv_latent: str,
        latent_norm: str,
        latent_norm_place: str,
        latent_scale: bool,
        positions: str,
        rope_theta: float,
        fused_down_projections: bool,
        sharing: str,
        sharing_layers: int,
        dropout: float,
        projection_bias: str = "model",
        rope_scaling: dict[str, Any] | None = None,
        rope_frequencies: str = "computed",
        latent_groups: int = 1,
        gate: str = "none",
        qk_norm: bool = False,
        sink_logits: bool = False,
        window: int | None = None,
    ) -> None:
        super().__init__()
        N, P, V, L, R = qk_nope_head_dim, qk_rope_head_dim, v_head_dim, kv_lora_rank, q_lora_rank
        check_choice("positions", positions, ("decoupled", "learned", "none", "rope_after_up"))
        check_choice("latent", latent, ("learned", "frozen", "slice"))
        check_choice("kv_latent", kv_latent, ("joint", "split"))
        check_choice("latent_norm", latent_norm, ("rms", "layer", "none"))
        check_choice("latent_norm_place", latent_norm_place, ("latent", "up_projected"))
        check_choice("sharing", sharing, ("none", "weights", "latent"))
        check_choice("projection_bias", projection_bias, ("model", "all"))
        check_choice("rope_frequencies", rope_frequencies, ("computed", "stored"))
        if rope_scaling is not None and (rope_frequencies == "stored" or positions in ("learned", "none")):
            raise Refusal(
                f"rope_scaling changes computed frequencies, which rope_frequencies={rope_frequencies} with "
                f"positions={positions} does not have: leave it out"
            )
        _check_sharing(sharing, sharing_layers, latent, fused_down_projections=fused_down_projections)
        check_heads(n_heads, n_kv_heads)
        if (positions == "decoupled") != (P > 0) or P < 0:
            raise Refusal(
                f"positions={positions} does not go with qk_rope_head_dim={P}: the rotated part is wider than 0 "
                f"exactly when positions=decoupled"
            )
        widths = _latent_widths(d_model, n_kv_heads, N, V, L, latent=latent, kv_latent=kv_latent, latent_groups=latent_groups)
        check_query_rank(R, d_model, n_heads * (N + P))
        check_reach(window, causal)
        on_latent = latent_norm_place == "latent"
        if qk_norm and not on_latent and latent_norm != "none":
            raise Refusal(
                "qk_norm=true norms the up-projected keys, which latent_norm_place=up_projected does already: choose one"
            )

        self.d_model, self.n_heads, self.n_kv_heads = d_model, n_heads, n_kv_heads
        self.q_lora_rank, self.kv_lora_rank = R, L
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim, self.qk_width = N, P, V, N + P
        self.positions, self.causal, self.dropout = positions, causal, dropout
        self.backend, self.decode, self.kernel = "auto", "auto", "auto"
        self.latent, self.sharing, self.follows, self.window = latent, sharing, False, window
        # Of the heads as they are compared, never of the latent.
        self.scale = logit_factor(rope_scaling) * self.qk_width**-0.5
        self.has_positions = positions in ("decoupled", "rope_after_up")
        self.sixteen_bits: tuple[str, ...] = ("k_rope",) if P else ()
        self.kv_latent, self.latent_groups, self.latent_widths = kv_latent, latent_groups, widths
        self.norms_latents = on_latent and latent_norm != "none"
        self.kv_scale = (d_model / widths[0]) ** 0.5 if latent_scale else 1.0
        self.q_scale = (d_model / R) ** 0.5 if latent_scale and R is not None else 1.0

        bias = bias or projection_bias == "all"
        # Widths that are projected straight from x, in this order in the fused matrix.
        self.down_widths = (R if R is not None else n_heads * self.qk_width, L, P)
        self.in_proj = nn.Linear(d_model, sum(self.down_widths), bias=bias) if fused_down_projections else None
        if self.in_proj is None:
            self._make_down_projections(d_model, bias)
        self.q_up_proj = nn.Linear(R, n_heads * self.qk_width, bias=False) if R is not None else None
        self.k_up_proj = _up_projection(widths[0], n_kv_heads * N, latent_groups)
        self.v_up_proj = _up_projection(widths[0], n_kv_heads * V, latent_groups)
        self.o_proj = nn.Linear(n_heads * V, d_model, bias=bias)
        self.gate_proj = gate_projection(gate, d_model=d_model, n_heads=n_heads, v_head_dim=V, bias=bias)

        self.sink_logits = nn.Parameter(torch.zeros(n_heads)) if sink_logits else None
        self.latent_norms = nn.ModuleList(
            _norm(latent_norm if on_latent else "none", width, norm_eps) for width in self.latent_widths
        )
        self.q_latent_norm = _norm(latent_norm if on_latent and R is not None else "none", R or 1, norm_eps)
        up_norm = "none" if on_latent else latent_norm
        self.q_up_norm = _norm("rms" if qk_norm else up_norm if R is not None else "none", N, norm_eps)
        self.k_up_norm = _norm("rms" if qk_norm else up_norm, N, norm_eps)
        self.v_up_norm = _norm(up_norm, V, norm_eps)

        rotated_width = {"decoupled": P, "rope_after_up": N}.get(positions, 0)
        self.rope: RotaryEmbedding | None = None
        if rotated_width and rope_frequencies == "stored":
            self.rope = StoredRotaryEmbedding(width=rotated_width, max_seq_len=max_seq_len, theta=rope_theta)
        elif rotated_width:
            self.rope = RotaryEmbedding(width=rotated_width, max_seq_len=max_seq_len, theta=rope_theta, scaling=rope_scaling)

    def _make_down_projections(self, d_model: int, bias: bool) -> None:
        """Each of its own, where they are not fused."""
        width, L, P = self.down_widths
        if self.q_lora_rank is None:
            self.q_proj = nn.Linear(d_model, width, bias=bias)
        else:
            self.q_down_proj = nn.Linear(d_model, width, bias=bias)
        learned = self.latent == "learned"
        self.kv_down_proj = nn.Linear(d_model, L, bias=bias and learned) if self.latent != "slice" else None
        if self.latent == "frozen":
            assert self.kv_down_proj is not None
            self.kv_down_proj.requires_grad_(False)
            nn.init.normal_(self.kv_down_proj.weight, std=d_model**-0.5)
        self.k_rope_proj = nn.Linear(d_model, P, bias=bias) if P else None

    def follow(self, leader: MultiheadLatentAttention) -> None:
        """Join the group of an earlier layer: its down-projections become this layer's too, or its latents do.

        Raises Refusal where its latents are others than this layer's.
        """
        if self.in_proj is not None:
            raise Refusal("fused_down_projections=true makes latents with the queries, which are never another layer's")
        check_alike("latents", self._read, leader._read)
        self.follows = True
        if self.sharing == "weights":
            self.kv_down_proj, self.k_rope_proj = leader.kv_down_proj, leader.k_rope_proj
        else:
            del self.kv_down_proj, self.k_rope_proj, self.latent_norms
            self.sixteen_bits = ()

    @property
    def _read(self) -> dict[str, Any]:
        """What up-projections and queries take latents and rotated keys to be."""
        options = ("kv_lora_rank", "latent_widths", "qk_rope_head_dim", "positions", "window")
        rotation = {} if self.rope is None else {"rope_theta": self.rope.theta, "rope_scaling": self.rope.scaling}
        return {option: getattr(self, option) for option in options} | rotation

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the parameters that are never trained."""
        return ("kv_down_proj.weight",) if self.latent == "frozen" and not self.reads_latents else ()

    @property
    def reads_latents(self) -> bool:
        """Whether the latents come from another layer, so that this one caches nothing."""
        return self.follows and self.sharing != "weights"

    @property
    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape per token of each cached tensor."""
        shapes: dict[str, tuple[int, ...]] = {}
        if not self.reads_latents:
            shapes["latent"] = (self.kv_lora_rank,)
            if self.qk_rope_head_dim:
                shapes["k_rope"] = (self.qk_rope_head_dim,)
        return shapes

    @property
    def cache_formula(self) -> int:
        """Cached elements per token: L + P (Table 1 of the paper: d_c + d_h^R); none where another layer's are read."""
        return 0 if self.reads_latents else self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def decode_paths(self) -> tuple[str, ...]:
        """The values that attention.decode may take. Between W_Q and W_UK nothing may stand for them to be absorbed."""
        between = self.positions == "rope_after_up" or not isinstance(self.k_up_norm, nn.Identity)
        return ("auto", "expand") if between else ("auto", "expand", "absorbed")

    @property
    def kernels_lack(self) -> str | None:
        """Why no kernel but torch's is for this layer, on any device; None where others may be."""
        if self.kv_latent == "split":
            return "reads one latent as key and value; with kv_latent=split"
        if self.window is not None:
            return f"reads caches without a window; with window={self.window}"
        return None if self.sink_logits is None else "has no sinks; with sink_logits=true"

    @property
    def absorbs_up_to(self) -> int:
        """Most queries a row and call for which `auto` takes the absorbed path; 0 where it does not exist.

        Expanding costs G L (N + V) products a cached token whatever T is, absorbing widens attention from N + P + V to
        2 L + P for each query and head: equal at T = G L (N + V) / (H (2 L - N - V)), whatever the context. Expanding also
        writes and reads what it makes: measured crossovers lie a third higher (docs/PERFORMANCE.md).
        """
        if "absorbed" not in self.decode_paths:
            return 0
        narrow, wide = self.qk_nope_head_dim + self.v_head_dim, 2 * self.latent_widths[0]
        if wide <= narrow:
            return MANY
        return max(1, 4 * self.n_kv_heads * self.latent_widths[0] * narrow // (3 * self.n_heads * (wide - narrow)))

    def fan_in_factors(self, variance: float) -> dict[str, float]:
        """Of the up-projections: latents that are scaled, or learned and not normed, have another mean square than 1."""
        own = 1.0 if self.norms_latents else variance**-0.5
        factors = dict.fromkeys(("k_up_proj", "v_up_proj"), (own if self.latent == "learned" else 1.0) / self.kv_scale)
        return factors if self.q_up_proj is None else factors | {"q_up_proj": own / self.q_scale}

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

        shared: with sharing=latent, what a group's first layer fills with its visible latents (and rotated keys) and the
        others read.
        """
        T = x_BTD.shape[1]
        if cache is None:
            place = place_without_cache(T, valid_BT, causal=self.causal, window=self.window)
        else:
            place = cache.place(T, valid_BT)
        if positions_BT is not None and cache is not None and self.positions == "rope_after_up":
            raise Refusal("rope_after_up turns cached keys by their slots: leave positions_BT out")
        tables = None if self.rope is None else place.tables(self.rope, T, positions_BT)
        as_words = shared is None and weights_out is None
        q_in, seen, latent_scale_BS = self._visible(x_BTD, tables, cache, valid_BT, shared, as_words=as_words)
        latent_BSL = seen[0]
        k_rope_BSP = seen[1] if self.qk_rope_head_dim else None

        q_nope_BTHN, q_rope_BTHP = self._queries(q_in)
        if self.qk_rope_head_dim:
            assert tables is not None
            q_rope_BTHP = rotate(q_rope_BTHP, tables)
        if cache is not None and self.absorbs(T):
            out_BTHV = self._attend_absorbed(
                q_nope_BTHN, q_rope_BTHP, latent_BSL, latent_scale_BS, k_rope_BSP, place, cache, weights_out
            )
        else:
            out_BTHV = self._attend_expanded(
                q_nope_BTHN, q_rope_BTHP, latent_BSL, k_rope_BSP, place, tables, weights_out, cached=cache is not None
            )
        return project_out(self, out_BTHV, x_BTD)

    def _visible(
        self,
        x_BTD: Tensor,
        tables: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        valid_BT: Tensor | None,
        shared: list[Tensor] | None,
        *,
        as_words: bool,
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """What the queries are made of; the latents, and rotated keys, that they see; the scales of latents in 8 bits.

        as_words: latents may come as the cache stores them, where a kernel reads them so.
        """
        if self.reads_latents:
            assert shared is not None and len(shared) > 0, "a layer that reads another one's latents was given none"
            if cache is not None:
                cache.advance(x_BTD.shape[1], valid_BT)
            return self._query_input(x_BTD), shared, None
        q_in, latent_BTL, k_rope_BTP = self._project_down(x_BTD)
        new = {"latent": latent_BTL}
        if self.qk_rope_head_dim:
            assert tables is not None
            new["k_rope"] = rotate(k_rope_BTP.unsqueeze(2), tables).squeeze(2)
        if cache is not None and as_words and self._reads_words(latent_BTL, cache):
            parts = cache.append_stored(valid_BT, **new)
            latent_BSL, latent_scale_BS = cache.stored["latent"].payload_and_scale(parts["latent"])
            return q_in, [latent_BSL, *parts.get("k_rope", ())], latent_scale_BS
        seen = list((new if cache is None else cache.append(valid_BT, **new)).values())
        if shared is not None:
            shared[:] = seen
        return q_in, seen, None

    def absorbs(self, new_tokens: int) -> bool:
        """Whether a call of so many tokens a row through a cache takes the absorbed path."""
        if self.decode == "auto":
            # An adapter around an up-projection computes more than its weight.
            plain = isinstance(self.k_up_proj, nn.Linear) and isinstance(self.v_up_proj, nn.Linear)
            return plain and new_tokens <= self.absorbs_up_to and not (self.training and self.dropout)
        return self.decode == "absorbed"

    def _reads_words(self, latent_BTL: Tensor, cache: Cache) -> bool:
        """Whether the next token's kernel reads what the cache holds as it is stored in 8 bits."""
        if latent_BTL.shape[1] > 1 or not (cache.stored["latent"].in_words and self.absorbs(1)) or self.latent_widths[0] % 4:
            return False
        kernel = self.kernel_for(latent_BTL.dtype, latent_BTL.device, cache.window)
        return kernel in OTHERS and OTHERS[kernel].reads_8_bits

    def kernel_for(self, dtype: torch.dtype, device: torch.device, window: int | None = None) -> str:
        """What computes the absorbed path of one new token, from latents read in this dtype (of 8 bits: the queries')."""
        if self.kernels_lack is not None:
            return "torch"
        return select_kernel(
            self.kernel,
            device=device,
            dtype=dtype,
            latent_width=self.latent_widths[0],
            qk_rope_head_dim=self.qk_rope_head_dim,
            window=window,
        )

    def _attend_expanded(
        self,
        q_nope_BTHN: Tensor,
        q_rope_BTHP: Tensor,
        latent_BSL: Tensor,
        k_rope_BSP: Tensor | None,
        place: Placement,
        tables: tuple[Tensor, Tensor] | None,
        weights_out: list[Tensor] | None,
        *,
        cached: bool,
    ) -> Tensor:
        """Attention over keys and values rebuilt from the latents."""
        k_BSGN, v_BSGV = self._expand(latent_BSL.to(q_nope_BTHN.dtype))
        if self.positions == "rope_after_up":
            assert self.rope is not None and tables is not None
            q_nope_BTHN = rotate(q_nope_BTHN, tables)
            k_BSGN = rotate(k_BSGN, place.key_tables(self.rope, k_BSGN.shape[1]) if cached else tables)
        q_BTHK = q_nope_BTHN if k_rope_BSP is None else torch.cat((q_nope_BTHN, q_rope_BTHP), dim=-1)
        return attend_as(self, q_BTHK, k_BSGN, v_BSGV, place, weights_out, k_rope_BSP)

    def _attend_absorbed(
        self,
        q_nope_BTHN: Tensor,
        q_rope_BTHP: Tensor,
        latent_BSL: Tensor,
        latent_scale_BS: Tensor | None,
        k_rope_BSP: Tensor | None,
        place: Placement,
        cache: Cache,
        weights_out: list[Tensor] | None,
    ) -> Tensor:
        """Attention over the latents themselves: W_UK goes to the queries, W_UV to what comes out."""
        B, T, H, N = q_nope_BTHN.shape
        G, share = self.n_kv_heads, self.latent_widths[0]
        up_GNL = self.k_up_proj.weight.view(G, N, share)
        q_latent_BTHL = torch.einsum("btghn,gnl->btghl", q_nope_BTHN.view(B, T, G, H // G, N), up_GNL).flatten(2, 3)
        latents = latent_BSL.split(self.latent_widths, dim=-1)
        # Each group of heads has its own latent as key and value; split ones are the key and the value of all heads.
        key_values = [(latents[0], latents[-1])] if self.kv_latent == "split" else [(latent, latent) for latent in latents]
        per_latent = H // self.latent_groups
        sinks = [None] * len(key_values) if self.sink_logits is None else self.sink_logits.split(per_latent)
        queries = zip(q_latent_BTHL.split(per_latent, dim=2), q_rope_BTHP.split(per_latent, dim=2), sinks, strict=True)
        attended = [
            self._attend_one(
                q_BTHL,
                q_BTHP,
                key,
                latent_scale_BS,
                k_rope_BSP,
                value,
                sinks_H,
                place,
                cache,
                want_weights=weights_out is not None,
            )
            for (q_BTHL, q_BTHP, sinks_H), (key, value) in zip(queries, key_values, strict=True)
        ]
        out_BTHL = torch.cat([out for out, _ in attended], dim=2)
        if weights_out is not None:
            weights_out.append(torch.cat([weights for _, weights in attended if weights is not None], dim=1))
        up_GVL = self.v_up_proj.weight.view(G, self.v_head_dim, share)
        out_BTGHV = torch.einsum("btghl,gvl->btghv", out_BTHL.unflatten(2, (G, H // G)).to(up_GVL.dtype), up_GVL)
        return out_BTGHV.flatten(2, 3)

    def _attend_one(
        self,
        q_latent_BTHL: Tensor,
        q_rope_BTHP: Tensor,
        key_BSL: Tensor,
        latent_scale_BS: Tensor | None,
        k_rope_BSP: Tensor | None,
        value_BSL: Tensor,
        sinks_H: Tensor | None,
        place: Placement,
        cache: Cache,
        *,
        want_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The heads of one latent (or of a split one's halves): (out_BTHL, weights_BHTS or None)."""
        T, dtype = q_latent_BTHL.shape[1], q_rope_BTHP.dtype
        kept = key_BSL.dtype if latent_scale_BS is None else dtype
        kernel = "torch" if T > 1 or want_weights else self.kernel_for(kept, key_BSL.device, cache.window)
        if kernel == "torch":
            read_BSL = key_BSL.to(dtype)
            causal, mask_BTS = place.seen(T, key_BSL.device)
            return latent_attend(
                q_latent_BTHL.to(dtype),
                q_rope_BTHP,
                read_BSL,
                None if k_rope_BSP is None else k_rope_BSP.to(dtype),
                read_BSL if value_BSL is key_BSL else value_BSL.to(dtype),
                scale=self.scale,
                causal=causal,
                mask_BTS=mask_BTS,
                sinks_H=sinks_H,
            )
        check_window(kernel, cache.window)
        out_BHL = latent_decode(
            q_latent_BTHL[:, 0].to(kept),
            q_rope_BTHP[:, 0].to(kept) if k_rope_BSP is not None else None,
            key_BSL,
            None if k_rope_BSP is None else k_rope_BSP.to(kept),
            place.lengths_B(key_BSL),
            latent_scale_BS,
            scale=self.scale,
            kernel=kernel,
        )
        return out_BHL.unsqueeze(1), None

    def _project_down(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(queries or their latent, the normed and scaled key/value latent, the un-rotated shared key)."""
        if self.in_proj is not None:
            q_in, latent_BTL, k_rope_BTP = self.in_proj(x_BTD).split(self.down_widths, dim=-1)
        else:
            q_in = self._query_input(x_BTD)
            latent_BTL = x_BTD[..., : self.kv_lora_rank] if self.kv_down_proj is None else self.kv_down_proj(x_BTD)
            k_rope_BTP = self.k_rope_proj(x_BTD) if self.k_rope_proj is not None else x_BTD[..., :0]
        parts = latent_BTL.split(self.latent_widths, dim=-1)
        normed = [widely_normed(norm, part) for norm, part in zip(self.latent_norms, parts, strict=True)]
        latent_BTL = (torch.cat(normed, dim=-1) if len(normed) > 1 else normed[0]) * self.kv_scale
        return q_in, latent_BTL.to(q_in.dtype), k_rope_BTP

    def _query_input(self, x_BTD: Tensor) -> Tensor:
        """The queries, or their latent before its norm."""
        return (self.q_proj if self.q_lora_rank is None else self.q_down_proj)(x_BTD)

    def _queries(self, q_in: Tensor) -> tuple[Tensor, Tensor]:
        """Un-rotated and to-be-rotated query parts, from x's projection or from its latent."""
        if self.q_up_proj is not None:
            q_in = self.q_up_proj((widely_normed(self.q_latent_norm, q_in) * self.q_scale).to(q_in.dtype))
        q_BTHK = q_in.unflatten(-1, (self.n_heads, self.qk_width))
        q_nope_BTHN, q_rope_BTHP = q_BTHK.split((self.qk_nope_head_dim, self.qk_rope_head_dim), dim=-1)
        return widely_normed(self.q_up_norm, q_nope_BTHN).to(q_in.dtype), q_rope_BTHP

    def _expand(self, latent_BSL: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (un-rotated part) and values of every head from cached latents: O(S) work."""
        parts = latent_BSL.split(self.latent_widths, dim=-1) if self.kv_latent == "split" else (latent_BSL,)
        k_BSGN = self.k_up_proj(parts[0]).unflatten(-1, (self.n_kv_heads, self.qk_nope_head_dim))
        v_BSGV = self.v_up_proj(parts[-1]).unflatten(-1, (self.n_kv_heads, self.v_head_dim))
        return widely_normed(self.k_up_norm, k_BSGN).to(v_BSGV.dtype), widely_normed(self.v_up_norm, v_BSGV).to(v_BSGV.dtype)


class GroupedLinear(nn.Linear):
    """Rows in `groups` blocks, each of which reads its own `in_features` of the input: a block-diagonal matrix's blocks."""

    def __init__(self, in_features: int, out_features: int, groups: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """(..., groups in_features) -> (..., out_features)."""
        weight = self.weight.unflatten(0, (self.groups, -1))
        return torch.einsum("...gl,gnl->...gn", x.unflatten(-1, (self.groups, self.in_features)), weight).flatten(-2)


def _check_sharing(sharing: str, sharing_layers: int, latent: str, *, fused_down_projections: bool) -> None:
    """What groups of layers may have in common, and of which latents."""
    if (sharing_layers < 2) if sharing != "none" else (sharing_layers != 1):
        raise Refusal(
            f"sharing={sharing} does not go with sharing_layers={sharing_layers}: groups of layers have at least 2, "
            f"and without sharing each layer is on its own (1)"
        )
    if sharing != "none" and fused_down_projections:
        raise Refusal(
            f"sharing={sharing} takes the key/value down-projections apart from the queries': set fused_down_projections=false"
        )
    if latent != "learned" and (fused_down_projections or sharing == "weights"):
        raise Refusal(
            f"latent={latent} has no learned down-projection, which fused_down_projections=true and sharing=weights "
            f"are about: set fused_down_projections=false and sharing=none"
        )


def _latent_widths(
    d_model: int, n_kv_heads: int, N: int, V: int, L: int, *, latent: str, kv_latent: str, latent_groups: int
) -> tuple[int, ...]:
    """The width of each latent. Raises Refusal for what cannot be so divided, or compresses nothing."""
    if min(N, V, L) < 1:
        raise Refusal(f"qk_nope_head_dim={N}, v_head_dim={V} and kv_lora_rank={L} must be at least 1")
    if kv_latent == "split" and latent_groups != 1:
        raise Refusal(
            f"kv_latent=split does not go with latent_groups={latent_groups}: either keys and values or groups of heads "
            f"have a latent each; set kv_latent=joint or latent_groups=1"
        )
    if latent_groups < 1 or n_kv_heads % latent_groups or L % latent_groups:
        raise Refusal(
            f"latent_groups={latent_groups} does not divide n_kv_heads={n_kv_heads} and kv_lora_rank={L}; choose one of "
            f"{[groups for groups in range(1, n_kv_heads + 1) if n_kv_heads % groups == 0 and L % groups == 0]}"
        )
    parts = 2 if kv_latent == "split" else latent_groups
    share = L // parts
    heads_joined = n_kv_heads // latent_groups
    widest = min(d_model, heads_joined * (N + V) if kv_latent == "joint" else heads_joined * min(N, V))
    if share > widest:
        recommended = min(4 * N, d_model // 2, widest) * parts
        raise Refusal(
            f"kv_lora_rank={L} compresses nothing: the narrowest of what it joins (d_model={d_model}, "
            f"{heads_joined} heads of {N}+{V}) is {widest} wide; {recommended} would"
        )
    if kv_latent == "split" and L % 2:
        raise Refusal(f"kv_latent=split halves kv_lora_rank={L}; choose an even number, {max(2, L - 1)} for instance")
    if latent == "slice" and d_model < L:
        raise Refusal(
            f"latent=slice takes kv_lora_rank={L} dimensions of x, which has d_model={d_model}; choose at most {d_model}"
        )
    return (share,) * parts


def _up_projection(rank: int, width: int, groups: int) -> nn.Linear:
    return nn.Linear(rank, width, bias=False) if groups == 1 else GroupedLinear(rank, width, groups)


def _norm(kind: str, width: int, eps: float) -> nn.Module:
    return {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[kind](width, eps=eps) if kind != "none" else nn.Identity()
