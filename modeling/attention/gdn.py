"""Gated DeltaNet (Yang et al. 2025, arXiv 2412.06464; the layer of figure 1, as in transformers' Qwen3-Next).

A layer of linear attention: all that it has read stands in one matrix a head, the state, which does not grow.

    q, k, v = silu(conv(x W_Q)), silu(conv(x W_K)), silu(conv(x W_V))    conv: each channel over the newest W tokens
    q, k    = q / |q|, k / |k|                                           by head
    b       = sigmoid(x W_b),    a = exp(-exp(a_log) softplus(x W_a + dt_bias))                 writing strength, decay
    S       = a S + k outer (b (v - a S^T k)),    o = S^T q / sqrt(K)    the gated delta rule, equation 10
    y       = (g o / rms(o) * silu(x W_G)) W_O                           the norm by head, its gain g shared by all

The equation is numbered as at ICLR 2025, and its S is ours transposed; 1 / sqrt(K) is the authors' code's, the parameters of a
are Mamba-2's, which the paper names without printing them.

A value head h reads query and key head h // (H / G), H value heads for G heads of queries and keys. Nothing is rotated: order
is in the decay and the convolution. The rule in chunks (training, prompts) and by token (decoding) is in
modeling/kernels/delta_rule.py; beside it, chunks of 16 bits in Triton (attention.kernel=triton, and auto where it can) in
delta_rule_triton.py, and another library's kernels (attention.kernel=fla) in delta_rule_fla.py.

Letters: B batch, T new tokens, S those and the tail, D d_model, H value heads, G heads of queries and keys, K their width, V
width of a value, W width of the convolution, C its channels, 2 G K + H V.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.attention.cache import Cache, real_first
from modeling.attention.norms import widely_normed
from modeling.kernels.decode_kernels import DELTA_RULES, check_dtype, lacks_heads, select_rule
from modeling.kernels.delta_rule import CHUNK, delta_rule, delta_rule_step
from modeling.kernels.delta_rule_fla import delta_rule_by_fla
from modeling.refusal import Refusal

DT_RANGE = (1e-3, 1e-1)  # of softplus(dt_bias) at first
RATE_RANGE = (1e-2, 16.0)  # of exp(a_log) at first
NORM_EPS = 1e-6  # of the length of queries and keys, squared


class GatedDeltaNet(nn.Module):
    """A state of K x V for each of n_v_heads heads, and the last conv_width - 1 inputs of the convolution.

    n_k_heads: heads of queries and keys, which n_v_heads / n_k_heads value heads each share. head_dim: K; v_head_dim: V. The
    model's own n_heads and max_seq_len say nothing of such a layer.

    Initial values are those of the authors' code (fla-org/flash-linear-attention, which are Mamba-2's): exp(a_log) uniform in
    0.01 .. 16, softplus(dt_bias) log-uniform in 0.001 .. 0.1; GPT draws the rest. transformers' class sets dt_bias to 1, with
    which a new state forgets all within a token or two (docs/LOG.md).

    Names elsewhere: q_proj, k_proj, v_proj and gate_proj are rows of Qwen3-Next's in_proj_qkvz, beta_proj and decay_proj of its
    in_proj_ba, o_norm and o_proj its norm and out_proj (Qwen3.5's: harness/hf/weights.py); beta_proj, decay_proj and gate_proj
    the authors' b_proj, a_proj and g_proj.
    Raises Refusal for sizes that do not fit together.
    """

    decode_paths = ("auto",)
    cached_as = "a state, changed by every token"
    wide_states = ("state",)  # sums over all tokens so far

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        max_seq_len: int,
        causal: bool,
        bias: bool,
        norm_eps: float,
        n_k_heads: int,
        n_v_heads: int,
        head_dim: int,
        v_head_dim: int,
        conv_width: int,
    ) -> None:
        super().__init__()
        for name, size in (("n_k_heads", n_k_heads), ("head_dim", head_dim), ("v_head_dim", v_head_dim)):
            if size < 1:
                raise Refusal(f"{name}={size} leaves nothing of the state: choose 1 or more")
        if n_v_heads < 1 or n_v_heads % n_k_heads:
            raise Refusal(
                f"n_v_heads={n_v_heads} do not share n_k_heads={n_k_heads} heads of queries and keys evenly: choose a multiple "
                f"of {n_k_heads}"
            )
        if conv_width < 2:
            raise Refusal(f"conv_width={conv_width} sees no token but the newest: choose 2 or more, such as 4")
        if not causal:
            raise Refusal("a state knows the tokens before alone: with model.causal=false choose another mechanism")
        G, H, K, V = n_k_heads, n_v_heads, head_dim, v_head_dim
        self.n_k_heads, self.n_v_heads, self.head_dim, self.v_head_dim, self.conv_width = G, H, K, V, conv_width
        self.n_heads, self.n_kv_heads, self.qk_width = H, G, K
        self.channels = 2 * G * K + H * V
        self.positions, self.has_positions = "none", False
        self.causal, self.dropout, self.scale = causal, 0.0, K**-0.5
        self.backend, self.decode, self.kernel = "auto", "auto", "auto"

        self.q_proj = nn.Linear(d_model, G * K, bias=bias)
        self.k_proj = nn.Linear(d_model, G * K, bias=bias)
        self.v_proj = nn.Linear(d_model, H * V, bias=bias)
        self.gate_proj = nn.Linear(d_model, H * V, bias=bias)
        self.beta_proj = nn.Linear(d_model, H, bias=bias)
        self.decay_proj = nn.Linear(d_model, H, bias=False)  # whose bias is dt_bias
        self.conv = nn.Conv1d(self.channels, self.channels, conv_width, groups=self.channels, bias=False)  # its weights alone
        self.a_log = nn.Parameter(torch.empty(H).uniform_(*RATE_RANGE).log_())
        step = torch.empty(H).uniform_(*map(math.log, DT_RANGE)).exp_()
        self.dt_bias = nn.Parameter(step.expm1_().log_())  # softplus undone
        self.o_norm = nn.RMSNorm(V, eps=norm_eps)
        self.o_proj = nn.Linear(H * V, d_model, bias=bias)

    @property
    def kernels(self) -> dict[str, str | None]:
        """What else than torch computes its every call, each with why it is not for this layer, or None."""
        return {name: lacks_heads(name, self.head_dim, self.v_head_dim) for name in DELTA_RULES}

    def rule_kernel(self, dtype: torch.dtype, device: torch.device) -> str:
        """What computes the rule of more than one token with products of this type."""
        return select_rule(self.kernel, device=device, dtype=dtype, K=self.head_dim, V=self.v_head_dim)

    @property
    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        """Nothing is cached of a token."""
        return {}

    @property
    def cache_formula(self) -> int:
        """Nothing is cached of a token."""
        return 0

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of what a row has one of: the state, and the newest inputs of the convolution, oldest first."""
        return {"state": (self.n_v_heads, self.head_dim, self.v_head_dim), "tail": (self.conv_width - 1, self.channels)}

    @property
    def state_formula(self) -> tuple[int, int]:
        """Elements of the state, H K V, and of the tail, (W - 1) (2 G K + H V)."""
        G, H, K, V = self.n_k_heads, self.n_v_heads, self.head_dim, self.v_head_dim
        return H * K * V, (self.conv_width - 1) * (2 * G * K + H * V)

    def products_at(self, context: int) -> int:
        """Multiplications of one token of so many in which no weight takes part, as chunks are computed (delta_rule.py).

        With the state 3 K V a head: read for what is written, read by the query, written; and K (K + K V / C) for handing it on
        from one chunk of C tokens to the next. Within a chunk k . k, q . k, the system's solution, undiscounted as the causal
        square is, and the query's sum over what was written.
        """
        K, V, C = self.head_dim, self.v_head_dim, min(CHUNK, context)
        return self.n_v_heads * (3 * K * V + K * K + K * K * V // C + C * (2 * K + (K + V) + V))

    def forward(
        self,
        x_BTD: Tensor,
        cache: Cache | None = None,
        positions_BT: Tensor | None = None,
        *,
        valid_BT: Tensor | None = None,
        weights_out: list[Tensor] | None = None,
    ) -> Tensor:
        """x_BTD -> x_BTD; the arguments are explained in modeling/attention/protocol.py. There are no weights to give out."""
        B, T, _ = x_BTD.shape
        if cache is not None:
            cache.check_room(T)  # before anything is computed
        # Real tokens first: pads then stand behind all that the convolution and the rule read, and change nothing.
        order_BT1 = None if valid_BT is None or T == 1 else real_first(valid_BT)[..., None]
        if order_BT1 is not None:
            x_BTD = x_BTD.take_along_dim(order_BT1, dim=1)
        inputs_BTC = torch.cat((self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)), dim=-1)
        if cache is None:
            tail_BWC = inputs_BTC.new_zeros(B, self.conv_width - 1, self.channels)
            state_BHKV = x_BTD.new_zeros(B, *self.state_shapes["state"])
        else:
            tail_BWC, state_BHKV = cache.states["tail"], cache.states["state"]
            inputs_BTC = inputs_BTC.to(tail_BWC.dtype)  # as every later call finds them
        seen_BSC = torch.cat((tail_BWC, inputs_BTC), dim=1)
        q_BTGK, k_BTGK, v_BTHV = self._convolved(seen_BSC.to(x_BTD.dtype), T)
        log_decay_BTH, beta_BTH = self._gates(x_BTD, valid_BT)
        out_BTHV, state_BHKV = self._rule(q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, beta_BTH, state_BHKV)
        if cache is not None:
            cache.keep(T, valid_BT, state=state_BHKV, tail=self._newest(seen_BSC, valid_BT))
        gate_BTHV = F.silu(self.gate_proj(x_BTD)).unflatten(-1, (self.n_v_heads, self.v_head_dim))
        out_BTHV = (widely_normed(self.o_norm, out_BTHV) * gate_BTHV).to(x_BTD.dtype)
        y_BTD = self.o_proj(out_BTHV.flatten(2))
        return y_BTD if order_BT1 is None else y_BTD.take_along_dim(order_BT1.argsort(dim=1), dim=1)

    def _convolved(self, seen_BSC: Tensor, T: int) -> tuple[Tensor, Tensor, Tensor]:
        """(q_BTGK, k_BTGK, v_BTHV) of the T newest tokens, before q and k get unit length."""
        # W products of whole tensors: torch's own convolution of single channels takes as long on a CPU, and is not fused.
        first_C, *others = self.conv.weight[:, 0].unbind(dim=-1)
        mixed_BTC = first_C * seen_BSC[:, :T]
        for place, tap_C in enumerate(others, start=1):
            mixed_BTC = mixed_BTC + tap_C * seen_BSC[:, place : place + T]
        mixed_BTC = F.silu(mixed_BTC)
        keys = self.n_k_heads * self.head_dim
        q, k, v = mixed_BTC.split((keys, keys, self.n_v_heads * self.v_head_dim), dim=-1)
        heads = (self.n_k_heads, self.head_dim)
        return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, (self.n_v_heads, self.v_head_dim))

    def _gates(self, x_BTD: Tensor, valid_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """(log a, b), each (B, T, H), in float32 at least: 0 at the pads behind a row's real tokens."""
        steps_BTH, beta_BTH = self.decay_proj(x_BTD), self.beta_proj(x_BTD)
        dtype = torch.promote_types(steps_BTH.dtype, torch.float32)
        log_decay_BTH = -self.a_log.to(dtype).exp() * F.softplus(steps_BTH.to(dtype) + self.dt_bias.to(dtype))
        beta_BTH = beta_BTH.to(dtype).sigmoid()
        if valid_BT is None:
            return log_decay_BTH, beta_BTH
        places_T = torch.arange(valid_BT.shape[1], device=valid_BT.device)
        is_pad_BT1 = (places_T >= valid_BT.sum(dim=1, keepdim=True))[..., None]
        return log_decay_BTH.masked_fill(is_pad_BT1, 0.0), beta_BTH.masked_fill(is_pad_BT1, 0.0)

    def _rule(
        self, q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, log_decay_BTH: Tensor, beta_BTH: Tensor, state_BHKV: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(out_BTHV, the state afterwards), in float32 at least: a state is a sum over all tokens."""
        dtype, device = log_decay_BTH.dtype, q_BTGK.device.type
        products = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q_BTGK.dtype
        q_BTGK, k_BTGK = (
            x * (x.square().sum(dim=-1, keepdim=True) + NORM_EPS).rsqrt() for x in (q_BTGK.to(dtype), k_BTGK.to(dtype))
        )
        v_BTHV, state_BHKV = v_BTHV.to(dtype), state_BHKV.to(dtype)
        with torch.autocast(device, enabled=False):  # which would round the operands
            if q_BTGK.shape[1] > 1 and self.rule_kernel(products, q_BTGK.device) == "triton":
                check_dtype("triton", products, DELTA_RULES)
                from modeling.kernels.delta_rule_triton import delta_rule_by_triton

                q, k, v = (x.to(products) for x in (q_BTGK, k_BTGK, v_BTHV))
                return delta_rule_by_triton(q, k, v, log_decay_BTH, beta_BTH, state_BHKV, scale=self.scale)
            repeats = self.n_v_heads // self.n_k_heads
            q_BTHK, k_BTHK = (x.repeat_interleave(repeats, dim=2) for x in (q_BTGK, k_BTGK))
            if self.kernel == "fla":
                q, k, v = (x.to(products) for x in (q_BTHK, k_BTHK, v_BTHV))
                return delta_rule_by_fla(q, k, v, log_decay_BTH, beta_BTH, state_BHKV, scale=self.scale)
            if q_BTHK.shape[1] > 1:
                return delta_rule(q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, beta_BTH, state_BHKV, scale=self.scale)
            q_BHK, k_BHK, v_BHV, log_decay_BH, beta_BH = (
                x.squeeze(1) for x in (q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, beta_BTH)
            )
            out_BHV, state_BHKV = delta_rule_step(q_BHK, k_BHK, v_BHV, log_decay_BH, beta_BH, state_BHKV, scale=self.scale)
            return out_BHV[:, None], state_BHKV

    def _newest(self, seen_BSC: Tensor, valid_BT: Tensor | None) -> Tensor:
        """The last conv_width - 1 inputs of each row, pads left out."""
        if valid_BT is None:
            return seen_BSC[:, -(self.conv_width - 1) :]
        places_W = torch.arange(self.conv_width - 1, device=seen_BSC.device)
        return seen_BSC.take_along_dim((valid_BT.sum(dim=1, keepdim=True) + places_W)[..., None], dim=1)
