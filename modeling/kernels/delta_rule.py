"""The gated delta rule (Yang et al. 2025, arXiv 2412.06464): a state in place of a cache, by token or by chunks.

For each head, with a decay a_t in (0, 1] and a writing strength b_t in (0, 1), a state S of K x V starts at 0 and

    S_t = a_t S_(t-1) + k_t outer (b_t (v_t - a_t S_(t-1)^T k_t)),      o_t = scale S_t^T q_t

which is equation 10 with S transposed. `delta_rule` takes chunks of C tokens at once (section 3.3 and appendix A, which extend
equations 8 and 9, the WY form of arXiv 2406.06484). With g_t the sum of log a from the chunk's first token to t, what the chunk
writes is U = (I + A)^-1 (b v - b exp(g) k S_0) with A_ij = b_i (k_i . k_j) exp(g_i - g_j) for j < i, and then

    o_i = scale (exp(g_i) S_0^T q_i + sum over j <= i of (q_i . k_j) exp(g_i - g_j) U_j),
    S_C = exp(g_C) S_0 + sum over j of exp(g_C - g_j) k_j outer U_j

U is linear in S_0, so S_C = M S_0 + N with M (K x K) and N (K x V) of the chunk alone. These are computed for all chunks at
once, as is what reads the states; one after another only the states themselves are (`carry`).

A token with log a = 0 and b = 0 changes nothing: so pads are left out. Letters: B batch, T tokens, H heads, K key width,
V value width, C tokens of a chunk, N chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def carry(kept_NXKK: Tensor, added_NXKV: Tensor, first_XKV: Tensor) -> tuple[Tensor, Tensor]:
    """(S_0 .. S_(N-1), S_N) of S_(n+1) = M_n S_n + N_n, for X heads of all rows. Differentiable."""
    run = _operator if torch.compiler.is_compiling() else _one_after_another
    return run(kept_NXKK, added_NXKV, first_XKV)


def _one_after_another(kept_NXKK: Tensor, added_NXKV: Tensor, first_XKV: Tensor) -> tuple[Tensor, Tensor]:
    states = [first_XKV]
    for kept_XKK, added_XKV in zip(kept_NXKK.unbind(), added_NXKV.unbind(), strict=True):
        states.append(torch.baddbmm(added_XKV, kept_XKK, states[-1]))
    return torch.stack(states[:-1]), states[-1]


# To a compiler it is one operation, and one backwards, however many chunks there are. Called directly it would load the
# compiler, and eagerly nothing is gained by it.
_operator = torch.library.custom_op("delta_rule::carry", _one_after_another, mutates_args=())


@_operator.register_fake
def _(kept_NXKK: Tensor, added_NXKV: Tensor, first_XKV: Tensor) -> tuple[Tensor, Tensor]:
    return added_NXKV.new_empty(added_NXKV.shape), first_XKV.new_empty(first_XKV.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[0])


def _backward(ctx: Any, grad_NXKV: Tensor, grad_XKV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dS_n = M_n^T dS_(n+1) + what reaches S_n directly: the same recurrence, from the end."""
    kept_NXKK, states_NXKV = ctx.saved_tensors
    later_NXKV, first_XKV = _operator(kept_NXKK.mT.flip(0), grad_NXKV.flip(0), grad_XKV)
    later_NXKV = later_NXKV.flip(0)
    return later_NXKV @ states_NXKV.mT, later_NXKV, first_XKV


_operator.register_autograd(_backward, setup_context=_keep)


def delta_rule_step(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, log_decay_BH: Tensor, beta_BH: Tensor, state_BHKV: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """One token: (out_BHV, the state afterwards)."""
    decayed_BHKV = state_BHKV * log_decay_BH.exp()[..., None, None]
    written_BHV = beta_BH[..., None] * (v_BHV - torch.einsum("bhkv,bhk->bhv", decayed_BHKV, k_BHK))
    state_BHKV = decayed_BHKV + k_BHK[..., :, None] * written_BHV[..., None, :]
    return scale * torch.einsum("bhkv,bhk->bhv", state_BHKV, q_BHK), state_BHKV


def delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    state_BHKV: Tensor,
    *,
    scale: float,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """All T tokens by chunks, the same function: (out_BTHV, the state afterwards). In float32 or float64, as given."""
    T = q_BTHK.shape[1]
    C = min(chunk, T)
    pad = -T % C

    def chunks(x: Tensor) -> Tensor:
        """(B, T, H, ...) -> (N, B, H, C, ...); what fills the last chunk changes nothing."""
        x = F.pad(x.transpose(1, 2), (*(0, 0) * (x.dim() - 3), 0, pad))
        return x.unflatten(2, (-1, C)).movedim(2, 0)

    q, k, v, beta = chunks(q_BTHK), chunks(k_BTHK), chunks(v_BTHV), chunks(beta_BTH)
    g = chunks(log_decay_BTH).cumsum(dim=-1)
    lower = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    # Differences above the diagonal are positive and may overflow: they are left out before exp.
    decay = (g[..., :, None] - g[..., None, :]).masked_fill(~lower, float("-inf")).exp()
    within = (beta[..., None] * (k @ k.transpose(-1, -2)) * decay).tril(-1)
    system = torch.eye(C, dtype=q.dtype, device=q.device) + within
    sides = torch.cat((beta[..., None] * v, (beta * g.exp())[..., None] * k), dim=-1)
    own, of_state = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True).split(
        (v.shape[-1], k.shape[-1]), dim=-1
    )
    scores = (q @ k.transpose(-1, -2)) * decay
    q_in, k_out = q * g.exp()[..., None], (k * (g[..., -1:] - g).exp()[..., None]).transpose(-1, -2)
    kept = g[..., -1].exp()[..., None, None] * torch.eye(k.shape[-1], dtype=q.dtype, device=q.device) - k_out @ of_state
    added = k_out @ own
    before, state = carry(kept.flatten(1, 2), added.flatten(1, 2), state_BHKV.flatten(0, 1))
    before, state_BHKV = before.view_as(added), state.view_as(state_BHKV)
    out = q_in @ before + scores @ (own - of_state @ before)
    out_BHTV = out.movedim(0, 2).flatten(2, 3)[:, :, :T]
    return scale * out_BHTV.transpose(1, 2), state_BHKV
