"""The gated delta rule of delta_rule.py in Triton, forward and backward: products of 16 bits, sums and states of 32.

Of each chunk X = (I + A)^-1 is computed first, for all chunks at once: blocks of 16 by substitution, then two doublings, since
(I + A)^-1 of twice the size is X - X A' X with A' the part of A between the halves. Then one program takes a head from chunk to
chunk with its state in registers:

    Y = b (v - exp(g) k S_0),    U = X Y,    o and S_C as in delta_rule.py

and keeps S_0 of every chunk. Backwards one program takes a head from the last chunk to the first for dS and dY = X^T dU; then
all chunks at once give the other gradients, with U computed again and dA = -dY U^T. No program waits for another and none adds
to another's sum: results repeat bit for bit.

Letters: B batch, T tokens, H heads of values, G of queries and keys, K key width, V value width, C tokens of a chunk, N chunks.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's compiler gives the parameters of its kernels their types at each launch.

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from modeling.kernels.delta_rule import CHUNK

BLOCK = 16  # rows of a block that substitution inverts
# The fastest measured on an H200, for 64 x 512 tokens, G 8, H 16 and K = V = 64 (docs/LOG.md).
LAUNCHES = {
    "inverses": {"num_warps": 2, "num_stages": 1},
    "forward": {"num_warps": 4, "num_stages": 1},
    "states_back": {"num_warps": 4, "num_stages": 2},
    "chunks_back": {"num_warps": 4, "num_stages": 1},
}


@triton.jit
def _tokens(x, b, first, head, T, HEADS, W: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr):
    """Where the rows of a chunk of (B, T, HEADS, W) lie, and which of them there are."""
    t = first + tl.arange(0, C)
    w = tl.arange(0, WIDTH)
    at = ((b * T + t).to(tl.int64) * HEADS + head)[:, None] * W + w[None, :]
    return x + at, (t < T)[:, None] & (w < W)[None, :]


@triton.jit
def _inverses(
    k,
    g,
    beta,
    inverse,
    T,
    N,
    H,
    G,
    K: tl.constexpr,
    V: tl.constexpr,
    KW: tl.constexpr,
    VW: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    S: tl.constexpr,
):
    n, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    at, there = _tokens(k, b, n * C, h // (H // G), T, G, K, KW, C)
    keys = tl.load(at, mask=there, other=0.0)
    c = tl.arange(0, C)
    rows = ((b * N + n).to(tl.int64) * C + c) * H + h
    sums = tl.load(g + rows)
    strength = tl.load(beta + rows)
    decay = tl.exp(tl.where(c[:, None] > c[None, :], sums[:, None] - sums[None, :], -float("inf")))
    A = strength[:, None] * tl.dot(keys, tl.trans(keys), input_precision=PRECISION) * decay
    P: tl.constexpr = C // S
    p, s = tl.arange(0, P), tl.arange(0, S)
    on = (p[:, None] == p[None, :])[:, None, :, None]
    small = tl.sum(tl.where(on, tl.reshape(A, (P, S, P, S)), 0.0), axis=2)
    X = tl.zeros((P, S, S), tl.float32) + (s[:, None] == s[None, :]).to(tl.float32)[None, :, :]
    for row in range(1, S):
        here = (s == row)[None, :, None]
        a = tl.sum(tl.where(here, small, 0.0), axis=1)
        X -= tl.where(here, tl.sum(a[:, :, None] * X, axis=1)[:, None, :], 0.0)
    whole = tl.reshape(tl.where(on, X[:, :, None, :], 0.0), (C, C))
    size: tl.constexpr = S
    for level in tl.static_range(2):
        width = size * (level + 1)
        below = (c[:, None] // (2 * width) == c[None, :] // (2 * width)) & (c[:, None] // width != c[None, :] // width)
        step = tl.dot(tl.where(below, A, 0.0), whole, input_precision=PRECISION)
        whole -= tl.dot(whole, step, input_precision=PRECISION)
    out = inverse + (bh.to(tl.int64) * N + n) * C * C
    tl.store(out + c[:, None] * C + c[None, :], whole.to(inverse.dtype.element_ty))


@triton.jit
def _forward(
    q,
    k,
    v,
    g,
    beta,
    first,
    inverse,
    out,
    states,
    last,
    scale,
    T,
    N,
    H,
    G,
    K: tl.constexpr,
    V: tl.constexpr,
    KW: tl.constexpr,
    VW: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    bh = tl.program_id(0)
    b, h = bh // H, bh % H
    c, kk, vv = tl.arange(0, C), tl.arange(0, KW), tl.arange(0, VW)
    square = kk[:, None] * V + vv[None, :]
    inside = (kk < K)[:, None] & (vv < V)[None, :]
    S = tl.load(first + bh.to(tl.int64) * K * V + square, mask=inside, other=0.0)
    type = q.dtype.element_ty
    for n in range(N):
        tl.store(states + (bh.to(tl.int64) * N + n) * K * V + square, S.to(type), mask=inside)
        at, there = _tokens(k, b, n * C, h // (H // G), T, G, K, KW, C)
        keys = tl.load(at, mask=there, other=0.0)
        at, there = _tokens(q, b, n * C, h // (H // G), T, G, K, KW, C)
        queries = tl.load(at, mask=there, other=0.0)
        at, there = _tokens(v, b, n * C, h, T, H, V, VW, C)
        values = tl.load(at, mask=there, other=0.0)
        rows = ((b * N + n).to(tl.int64) * C + c) * H + h
        sums = tl.load(g + rows)
        end = tl.load(g + ((b * N + n).to(tl.int64) * C + C - 1) * H + h)
        strength = tl.load(beta + rows)
        X = tl.load(inverse + (bh.to(tl.int64) * N + n) * C * C + c[:, None] * C + c[None, :])
        e = tl.exp(sums)
        S16 = S.to(type)
        y = strength[:, None] * (values - e[:, None] * tl.dot(keys, S16, input_precision=PRECISION))
        u = tl.dot(X, y.to(type), input_precision=PRECISION).to(type)
        decay = tl.exp(tl.where(c[:, None] >= c[None, :], sums[:, None] - sums[None, :], -float("inf")))
        P = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * decay
        o = e[:, None] * tl.dot(queries, S16, input_precision=PRECISION)
        o += tl.dot(P.to(type), u, input_precision=PRECISION)
        S = tl.exp(end) * S + tl.dot(tl.trans((keys * tl.exp(end - sums)[:, None]).to(type)), u, input_precision=PRECISION)
        at, there = _tokens(out, b, n * C, h, T, H, V, VW, C)
        tl.store(at, (scale * o).to(type), mask=there)
    tl.store(last + bh.to(tl.int64) * K * V + square, S, mask=inside)


@triton.jit
def _states_back(
    q,
    k,
    g,
    beta,
    inverse,
    dout,
    dlast,
    dstates,
    dwritten,
    dfirst,
    scale,
    T,
    N,
    H,
    G,
    K: tl.constexpr,
    V: tl.constexpr,
    KW: tl.constexpr,
    VW: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of every chunk's last state, and of b (v - exp(g) S^T k), from the last chunk to the first."""
    bh = tl.program_id(0)
    b, h = bh // H, bh % H
    c, kk, vv = tl.arange(0, C), tl.arange(0, KW), tl.arange(0, VW)
    square = kk[:, None] * V + vv[None, :]
    inside = (kk < K)[:, None] & (vv < V)[None, :]
    dS = tl.load(dlast + bh.to(tl.int64) * K * V + square, mask=inside, other=0.0)
    type = q.dtype.element_ty
    for back in range(N):
        n = N - 1 - back
        tl.store(dstates + (bh.to(tl.int64) * N + n) * K * V + square, dS.to(type), mask=inside)
        at, there = _tokens(k, b, n * C, h // (H // G), T, G, K, KW, C)
        keys = tl.load(at, mask=there, other=0.0)
        at, there = _tokens(q, b, n * C, h // (H // G), T, G, K, KW, C)
        queries = tl.load(at, mask=there, other=0.0)
        at, there = _tokens(dout, b, n * C, h, T, H, V, VW, C)
        do = tl.load(at, mask=there, other=0.0)
        rows = ((b * N + n).to(tl.int64) * C + c) * H + h
        sums = tl.load(g + rows)
        end = tl.load(g + ((b * N + n).to(tl.int64) * C + C - 1) * H + h)
        strength = tl.load(beta + rows)
        X = tl.load(inverse + (bh.to(tl.int64) * N + n) * C * C + c[:, None] * C + c[None, :])
        e = tl.exp(sums)
        decay = tl.exp(tl.where(c[:, None] <= c[None, :], sums[None, :] - sums[:, None], -float("inf")))
        P = scale * tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * decay  # transposed: by key and query
        du = tl.dot(P.to(type), do, input_precision=PRECISION)
        du += tl.dot((keys * tl.exp(end - sums)[:, None]).to(type), dS.to(type), input_precision=PRECISION)
        dy = tl.dot(tl.trans(X), du.to(type), input_precision=PRECISION)
        at, there = _tokens(dwritten, b, n * C, h, T, H, V, VW, C)
        tl.store(at, dy.to(type), mask=there)
        dS = tl.exp(end) * dS + tl.dot(tl.trans((queries * (scale * e)[:, None]).to(type)), do, input_precision=PRECISION)
        dS -= tl.dot(tl.trans(keys), ((e * strength)[:, None] * dy).to(type), input_precision=PRECISION)
    tl.store(dfirst + bh.to(tl.int64) * K * V + square, dS, mask=inside)


@triton.jit
def _chunks_back(
    q,
    k,
    v,
    g,
    beta,
    inverse,
    states,
    dout,
    dstates,
    dwritten,
    dq,
    dk,
    dv,
    dg,
    dbeta,
    scale,
    T,
    N,
    H,
    G,
    K: tl.constexpr,
    V: tl.constexpr,
    KW: tl.constexpr,
    VW: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All other gradients, of a chunk alone."""
    n, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    c, kk, vv = tl.arange(0, C), tl.arange(0, KW), tl.arange(0, VW)
    square = kk[:, None] * V + vv[None, :]
    inside = (kk < K)[:, None] & (vv < V)[None, :]
    type = q.dtype.element_ty
    chunk = bh.to(tl.int64) * N + n
    rows = ((b * N + n).to(tl.int64) * C + c) * H + h
    sums = tl.load(g + rows)
    end = tl.load(g + ((b * N + n).to(tl.int64) * C + C - 1) * H + h)
    strength = tl.load(beta + rows)
    e, fade = tl.exp(sums), tl.exp(end - sums)
    at, there = _tokens(k, b, n * C, h // (H // G), T, G, K, KW, C)
    keys = tl.load(at, mask=there, other=0.0)
    S = tl.load(states + chunk * K * V + square, mask=inside, other=0.0)
    at, there = _tokens(v, b, n * C, h, T, H, V, VW, C)
    x = tl.load(at, mask=there, other=0.0) - e[:, None] * tl.dot(keys, S, input_precision=PRECISION)
    at, there = _tokens(dwritten, b, n * C, h, T, H, V, VW, C)
    dy = tl.load(at, mask=there, other=0.0)
    dstrength = tl.sum(dy * x, axis=1)
    X = tl.load(inverse + chunk * C * C + c[:, None] * C + c[None, :])
    u = tl.dot(X, (strength[:, None] * x).to(type), input_precision=PRECISION).to(type)
    dx = strength[:, None] * dy
    at, there = _tokens(dv, b, n * C, h, T, H, V, VW, C)
    tl.store(at, dx.to(type), mask=there)
    # Products with the state, before and after.
    dkeys = tl.dot((-e[:, None] * dx).to(type), tl.trans(S), input_precision=PRECISION)
    dsums = tl.sum(keys * dkeys, axis=1)
    dS = tl.load(dstates + chunk * K * V + square, mask=inside, other=0.0)
    kept = fade[:, None] * tl.dot(u, tl.trans(dS), input_precision=PRECISION)
    moved = tl.sum(keys * kept, axis=1)
    whole = tl.sum(tl.sum(S.to(tl.float32) * dS, axis=1), axis=0)
    dsums += tl.where(c == C - 1, tl.sum(moved, axis=0) + tl.exp(end) * whole, 0.0) - moved
    dkeys += kept
    at, there = _tokens(dout, b, n * C, h, T, H, V, VW, C)
    do = tl.load(at, mask=there, other=0.0)
    dqueries = (scale * e)[:, None] * tl.dot(do, tl.trans(S), input_precision=PRECISION)
    at, there = _tokens(q, b, n * C, h // (H // G), T, G, K, KW, C)
    queries = tl.load(at, mask=there, other=0.0)
    dsums += tl.sum(queries * dqueries, axis=1)
    # The scores.
    decay = scale * tl.exp(tl.where(c[:, None] >= c[None, :], sums[:, None] - sums[None, :], -float("inf")))
    dP = tl.dot(do, tl.trans(u), input_precision=PRECISION) * decay
    through = dP * tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    dsums += tl.sum(through, axis=1) - tl.sum(through, axis=0)
    dqueries += tl.dot(dP.to(type), keys, input_precision=PRECISION)
    at, there = _tokens(dq, b, n * C, h, T, H, K, KW, C)
    tl.store(at, dqueries.to(type), mask=there)
    dkeys += tl.dot(tl.trans(dP.to(type)), queries, input_precision=PRECISION)
    # The system.
    decay = tl.exp(tl.where(c[:, None] > c[None, :], sums[:, None] - sums[None, :], -float("inf")))
    dA = -tl.dot(dy, tl.trans(u), input_precision=PRECISION) * decay
    through = dA * tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
    dstrength += tl.sum(through, axis=1)
    through *= strength[:, None]
    dsums += tl.sum(through, axis=1) - tl.sum(through, axis=0)
    dkk = (dA * strength[:, None]).to(type)
    dkeys += tl.dot(dkk, keys, input_precision=PRECISION)
    dkeys += tl.dot(tl.trans(dkk), keys, input_precision=PRECISION)
    at, there = _tokens(dk, b, n * C, h, T, H, K, KW, C)
    tl.store(at, dkeys.to(type), mask=there)
    tl.store(dg + rows, dsums)
    tl.store(dbeta + rows, dstrength)


def delta_rule_by_triton(
    q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, log_decay_BTH: Tensor, beta_BTH: Tensor, state_BHKV: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """As `delta_rule`, for any T, value head h with head h // (H / G) of q and k: (out_BTHV, the state afterwards in float32).

    q, k and v of one type, bfloat16, float16 or float32, which the output has too; the others in float32. Other widths than
    K = V = 32 or 64 are not right on every GPU (docs/LOG.md).
    """
    pad = (0, 0, 0, -q_BTGK.shape[1] % CHUNK)  # what fills the last chunk changes nothing
    g_BTH = F.pad(log_decay_BTH, pad).unflatten(1, (-1, CHUNK)).cumsum(dim=2).flatten(1, 2)
    out_BTHV, state_BHKV, _, _ = _operator(q_BTGK, k_BTGK, v_BTHV, g_BTH, F.pad(beta_BTH, pad), state_BHKV, scale)
    return out_BTHV, state_BHKV


def _sizes(q: Tensor, v: Tensor, g: Tensor) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """(B, H, N, K, V), and the last arguments of a kernel."""
    (B, T, G, K), (H, V), N = q.shape, v.shape[2:], g.shape[1] // CHUNK
    wide = [max(16, triton.next_power_of_2(width)) for width in (K, V)]
    # The inverse gets more digits than the 16 bits it is stored in.
    return (B, H, N, K, V), (T, N, H, G, K, V, *wide, CHUNK, "ieee" if q.dtype == torch.float32 else "tf32")


def _launch(name: str, K: int, V: int) -> dict[str, int]:
    """Below 64 two warps: Triton then takes mma.sync, not wgmma, whose narrow products are wrong on Hopper (docs/LOG.md)."""
    return LAUNCHES[name] | ({"num_warps": 2} if min(K, V) < 64 else {})


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@torch.library.custom_op("delta_rule::triton", mutates_args=())
def _operator(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, first: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, the last state; for the backward pass: each chunk's X and S_0)."""
    q, k, v, g, beta, first = (x.contiguous() for x in (q, k, v, g, beta, first))
    (B, H, N, K, V), sizes = _sizes(q, v, g)
    inverse, states = q.new_empty(B * H, N, CHUNK, CHUNK), q.new_empty(B * H, N, K, V)
    out, last = torch.empty_like(v), torch.empty_like(first)
    with _on(q):
        _inverses[(N, B * H)](k, g, beta, inverse, *sizes, BLOCK, **_launch("inverses", K, V))
        _forward[(B * H,)](q, k, v, g, beta, first, inverse, out, states, last, scale, *sizes, **_launch("forward", K, V))
    return out, last, inverse, states


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, first: Tensor, scale: float) -> tuple[Tensor, ...]:
    (B, H, N, K, V), _ = _sizes(q, v, g)
    inverse, states = q.new_empty(B * H, N, CHUNK, CHUNK), q.new_empty(B * H, N, K, V)
    return v.new_empty(v.shape), first.new_empty(first.shape), inverse, states


@torch.library.custom_op("delta_rule::triton_gradients", mutates_args=())
def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    inverse: Tensor,
    states: Tensor,
    dout: Tensor,
    dlast: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of q and k for each head of values."""
    q, k, v, g, beta, dout, dlast = (x.contiguous() for x in (q, k, v, g, beta, dout, dlast))
    (B, H, N, K, V), sizes = _sizes(q, v, g)
    dq, dk = (q.new_empty(*q.shape[:2], H, K) for _ in range(2))
    dv, dg, dbeta, dfirst = (torch.empty_like(x) for x in (v, g, beta, dlast))
    dstates, dy = torch.empty_like(states), torch.empty_like(v)
    states_back, chunks_back = _launch("states_back", K, V), _launch("chunks_back", K, V)
    with _on(q):
        _states_back[(B * H,)](q, k, g, beta, inverse, dout, dlast, dstates, dy, dfirst, scale, *sizes, **states_back)
        _chunks_back[(N, B * H)](
            q, k, v, g, beta, inverse, states, dout, dstates, dy, dq, dk, dv, dg, dbeta, scale, *sizes, **chunks_back
        )
    return dq, dk, dv, dg, dbeta, dfirst


@_gradients.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *others: Any) -> tuple[Tensor, ...]:
    heads = (*v.shape[:3], q.shape[3])
    return q.new_empty(heads), q.new_empty(heads), *(x.new_empty(x.shape) for x in (v, g, beta, others[3]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output[2:])


def _backward(ctx: Any, dout: Tensor, dlast: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dq, dk, *others = _gradients(*ctx.saved_tensors, dout, dlast, ctx.scale)
    groups = (ctx.saved_tensors[0].shape[2], -1)
    shared = (x.unflatten(2, groups).sum(dim=3, dtype=torch.float32).to(x.dtype) for x in (dq, dk))
    return *shared, *others, None


_operator.register_autograd(_backward, setup_context=_keep)
