"""Tensor product attention, TPA (Zhang et al. 2025, arXiv 2501.06425, section 3.1): heads as sums of outer products.

For every token the queries, keys and values of all H heads are each a matrix of low rank, whose factors x gives:

    q = 1/R_q sum_i a_q,i outer b_q,i      a_q = x W_AQ (R_q, H),  b_q = rotate(x W_BQ) (R_q, K)     q_a_proj, q_b_proj
    k = 1/R_k sum_i a_k,i outer b_k,i      likewise, cached: a_k, and b_k after rotation             k_a_proj, k_b_proj
    v = 1/R_v sum_i a_v,i outer b_v,i      likewise, cached: a_v, b_v, nothing rotated               v_a_proj, v_b_proj
    o = softmax(q k^T / sqrt(K)) v,  out = o W_O

Rotation acts on the K dimensions of b alone, so a factor that was rotated once stays right for every head. Cached per token:
(R_k + R_v)(H + K) elements.

Two execution paths, one set of weights (attention.decode):

    expand     keys and values of all heads are made of the cached factors: training, and long chunks
    absorbed   they never are: q_h . k_h = 1/R_k sum_i a_k,i,h (q_h . b_k,i), and the weights times a_v multiply b_v

QK-norm (qk_norm) keeps both paths and the cache: a head's root mean square is a number of that head, so the normed heads
g k_h / rms(k_h) are sums of the same outer products with a_k,i,h / rms(k_h) and g b_k,i, which is what is cached then.

Letters: B batch, T new tokens, S visible tokens, D d_model, H query heads, K width of a head, R rank of the factor at hand.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modeling.attention.cache import Cache, Placement, place_without_cache
from modeling.attention.norms import normed
from modeling.attention.output import attend_as, gate_projection, project_out
from modeling.attention.rope import RotaryEmbedding, rotate
from modeling.kernels.latent_decode import wide_product
from modeling.refusal import Refusal


class TensorProductAttention(nn.Module):
    """q_rank, k_rank, v_rank: how many outer products the queries, keys and values of a token are sums of.

    gate: on what the heads give, modeling/attention/output.py. qk_norm: an RMSNorm over each head's K dimensions of queries and
    keys before rotation. The paper's W^a and W^b of queries, keys and values are
    q_a_proj and q_b_proj, k_a_proj and k_b_proj, v_a_proj and v_b_proj.
    Raises Refusal for ranks and widths that do not fit together.
    """

    decode_paths = ("auto", "expand", "absorbed")
    # Most queries a row and call for which `auto` takes the absorbed path. By products alone the two are equal at
    # R / (R - 2) queries, R = R_k + R_v, but expanding writes and reads all keys and values: measured (docs/PERFORMANCE.md),
    # absorbing is faster up to here at every size tried.
    absorbs_up_to = 16
    kernels_lack = "reads one latent as key and value; for tensor products"

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        max_seq_len: int,
        causal: bool,
        bias: bool,
        norm_eps: float,
        head_dim: int,
        q_rank: int,
        k_rank: int,
        v_rank: int,
        rope_theta: float,
        dropout: float,
        gate: str = "none",
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        for name, rank in (("q_rank", q_rank), ("k_rank", k_rank), ("v_rank", v_rank)):
            most = min(n_heads, head_dim)
            if not 1 <= rank <= most:
                raise Refusal(
                    f"{name}={rank} is no low rank: {n_heads} heads of {head_dim} are a matrix of rank {most} at most; choose "
                    f"1 to {most}"
                )
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_heads, head_dim
        self.qk_width, self.v_head_dim = head_dim, head_dim
        self.q_rank, self.k_rank, self.v_rank = q_rank, k_rank, v_rank
        self.positions, self.has_positions = "rope", True
        self.causal, self.dropout, self.scale = causal, dropout, head_dim**-0.5
        self.backend, self.decode, self.kernel = "auto", "auto", "auto"
        self.cached_values = ("v_a", "v_b")

        self.q_a_proj = nn.Linear(d_model, q_rank * n_heads, bias=bias)
        self.q_b_proj = nn.Linear(d_model, q_rank * head_dim, bias=bias)
        self.k_a_proj = nn.Linear(d_model, k_rank * n_heads, bias=bias)
        self.k_b_proj = nn.Linear(d_model, k_rank * head_dim, bias=bias)
        self.v_a_proj = nn.Linear(d_model, v_rank * n_heads, bias=bias)
        self.v_b_proj = nn.Linear(d_model, v_rank * head_dim, bias=bias)
        self.o_proj = nn.Linear(n_heads * head_dim, d_model, bias=bias)
        self.gate_proj = gate_projection(gate, d_model=d_model, n_heads=n_heads, v_head_dim=head_dim, bias=bias)
        self.q_norm = nn.RMSNorm(head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=norm_eps) if qk_norm else None
        self.rope = RotaryEmbedding(width=head_dim, max_seq_len=max_seq_len, theta=rope_theta)

    @property
    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape per token of each cached tensor."""
        H, K = self.n_heads, self.head_dim
        return {"k_a": (self.k_rank, H), "k_b": (self.k_rank, K), "v_a": (self.v_rank, H), "v_b": (self.v_rank, K)}

    @property
    def cache_formula(self) -> int:
        """Cached elements per token: (R_k + R_v)(H + K) (section 3.3 of the paper)."""
        return (self.k_rank + self.v_rank) * (self.n_heads + self.head_dim)

    @property
    def products_per_token(self) -> int:
        """Multiplications of one token that no weight takes part in: its outer products, of keys to be normed once more."""
        ranks = self.q_rank + self.k_rank + self.v_rank + (0 if self.k_norm is None else self.k_rank)
        return ranks * self.n_heads * self.head_dim

    @property
    def numbers_absorbed(self) -> int:
        """Of one query, head and cached token: products with each factor and two sums, or weights spread over factors."""
        return max(self.k_rank + 2, self.v_rank + 1)

    def fan_in_factors(self, variance: float) -> dict[str, float]:
        """Of both factors of a product: a sum of R of them over R has their variances' product over R."""
        ranks = {"q": self.q_rank, "k": self.k_rank, "v": self.v_rank}
        return {f"{name}_{half}_proj": (rank / variance) ** 0.25 for name, rank in ranks.items() for half in "ab"}

    def absorbs(self, new_tokens: int) -> bool:
        """Whether a call of so many tokens a row through a cache takes the absorbed path."""
        if self.decode == "auto":
            return new_tokens <= self.absorbs_up_to and not (self.training and self.dropout)
        return self.decode == "absorbed"

    def kernel_for(self, dtype: torch.dtype, device: torch.device, window: int | None = None) -> str:
        """What computes the absorbed path: torch whatever is asked."""
        return "torch"

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
        T = x_BTD.shape[1]
        place = place_without_cache(T, valid_BT, causal=self.causal) if cache is None else cache.place(T, valid_BT)
        tables = place.tables(self.rope, T, positions_BT)
        shapes = {"q_a": (self.q_rank, self.n_heads), "q_b": (self.q_rank, self.head_dim)} | self.cache_shapes
        factors = {name: self.get_submodule(f"{name}_proj")(x_BTD).unflatten(-1, shape) for name, shape in shapes.items()}
        q_a_BTRH, q_b_BTRK = factors.pop("q_a"), factors.pop("q_b")
        if self.q_norm is None or self.k_norm is None:
            q_BTHK = _heads(q_a_BTRH, rotate(q_b_BTRK, tables))
        else:
            q_BTHK = rotate(normed(self.q_norm, _heads(q_a_BTRH, q_b_BTRK)), tables)
            factors["k_a"], factors["k_b"] = _normed_factors(self.k_norm, factors["k_a"], factors["k_b"])
        factors["k_b"] = rotate(factors["k_b"], tables)
        seen = factors if cache is None else cache.append(valid_BT, **factors)
        k_a, k_b, v_a, v_b = (seen[name].to(q_BTHK.dtype) for name in factors)
        if cache is not None and self.absorbs(T):
            out_BTHK = self._attend_absorbed(q_BTHK, k_a, k_b, v_a, v_b, place, weights_out)
        else:
            out_BTHK = attend_as(self, q_BTHK, _heads(k_a, k_b), _heads(v_a, v_b), place, weights_out)
        return project_out(self, out_BTHK, x_BTD)

    def _attend_absorbed(
        self,
        q_BTHK: Tensor,
        k_a_BSRH: Tensor,
        k_b_BSRK: Tensor,
        v_a_BSRH: Tensor,
        v_b_BSRK: Tensor,
        place: Placement,
        weights_out: list[Tensor] | None,
    ) -> Tensor:
        """Attention over the factors themselves; logits and softmax in float32 at least."""
        B, T, H, K = q_BTHK.shape
        weights_BTHS = _logits(q_BTHK, k_a_BSRH, k_b_BSRK, self.scale, place).softmax(dim=-1)
        if weights_out is not None:
            weights_out.append(place.by_token(weights_BTHS.transpose(1, 2)))
        # M = S * R: a token's factors one after another.
        spread_BTHSR = weights_BTHS.to(v_b_BSRK.dtype).unsqueeze(-1) * v_a_BSRH.permute(0, 3, 1, 2).unsqueeze(1)
        out_BMK = spread_BTHSR.flatten(3).flatten(1, 2) @ v_b_BSRK.flatten(1, 2)
        return out_BMK.view(B, T, H, K) / self.v_rank


def _heads(a_BSRH: Tensor, b_BSRK: Tensor) -> Tensor:
    """(1/R) sum_r a_r outer b_r, (B, S, H, K)."""
    return a_BSRH.transpose(-1, -2) @ b_BSRK / a_BSRH.shape[-2]


def _logits(q_BTHK: Tensor, k_a_BSRH: Tensor, k_b_BSRK: Tensor, scale: float, place: Placement) -> Tensor:
    """scale q . k of the keys that a query may see, (B, T, H, S), in float32 at least; -inf of the others.

    In memory they stand token by token, as the factors do: these meet where they lie, one rank after another.
    """
    B, T, H, K = q_BTHK.shape
    S, R = k_b_BSRK.shape[1:3]
    dots_BMN = wide_product(k_b_BSRK.flatten(1, 2), q_BTHK.reshape(B, T * H, K).transpose(1, 2))  # M = S * R, N = T * H
    dots_BSRTH = dots_BMN.view(B, S, R, T, H)
    logits_BSTH = place.bias_BTS(T, dots_BMN).transpose(1, 2).unsqueeze(-1)
    for rank in range(R):
        logits_BSTH = torch.addcmul(logits_BSTH, dots_BSRTH[:, :, rank], k_a_BSRH[:, :, rank, None], value=scale / R)
    return logits_BSTH.permute(0, 2, 3, 1)


def _normed_factors(norm: nn.RMSNorm, a_BTRH: Tensor, b_BTRK: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of the normed heads: a by each head's root mean square, b times the gain."""
    heads_BTHK = _heads(a_BTRH, b_BTRK).to(norm.weight.dtype)
    assert norm.eps is not None
    inverse_BTH = (heads_BTHK.square().mean(dim=-1) + norm.eps).rsqrt()
    return (a_BTRH * inverse_BTH.unsqueeze(-2)).to(a_BTRH.dtype), (b_BTRK * norm.weight).to(b_BTRK.dtype)
