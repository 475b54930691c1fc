"""The gated delta rule by flash-linear-attention's kernels (Yang and Zhang 2024, github.com/fla-org/flash-linear-attention).

They compute delta_rule.py's function from tensors that lie as ours do: q and k (B, T, H, K), v (B, T, H, V), the logarithm of
the decay and the writing strength (B, T, H), a state (B, H, K, V) in float32 before and after. More tokens, and what needs a
gradient, go through `chunk_gated_delta_rule`, in chunks of 64; one token through `fused_recurrent_gated_delta_rule`, which has
no backward pass. Products are of 16 bits there, sums of 32, where ours are float32 throughout.

Their functions keep a compiler out, so to one a call is an operator. It cannot hand on what theirs keep for the backward pass,
which therefore computes the forward pass again where training is compiled.

Letters: B batch, T tokens, H heads, K key width, V value width.
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modeling.kernels.decode_kernels import DELTA_RULES, check_dtype


def delta_rule_by_fla(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay_BTH: Tensor, beta_BTH: Tensor, state_BHKV: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """As `delta_rule`, for any T: (out_BTHV in the type of v, the state afterwards in float32).

    q, k and v in bfloat16 or float16, the others in float32. Raises Refusal for another type.
    """
    check_dtype("fla", q_BTHK.dtype, DELTA_RULES)
    run = _operator if torch.compiler.is_compiling() else _run
    return run(q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, beta_BTH, state_BHKV, scale)


@functools.cache
def _functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    return chunk_gated_delta_rule, fused_recurrent_gated_delta_rule


def _run(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    in_chunks, by_token = _functions()
    rule = in_chunks if q.shape[1] > 1 or torch.is_grad_enabled() else by_token
    return rule(q, k, v, g=log_decay, beta=beta, scale=scale, initial_state=state, output_final_state=True)


@torch.library.custom_op("delta_rule::fla", mutates_args=())
def _operator(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return _run(q, k, v, log_decay, beta, state, scale)


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


@torch.library.custom_op("delta_rule::fla_gradients", mutates_args=())
def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float,
    grad_out: Tensor,
    grad_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v, log_decay, beta, state)]
        q, k, v, log_decay, beta, state = inputs
        grads: Any = torch.autograd.grad(_run(q, k, v, log_decay, beta, state, scale), inputs, (grad_out, grad_state))
    return grads


@_gradients.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, log_decay, beta, state))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(*ctx.saved_tensors, ctx.scale, grad_out, grad_state), None


_operator.register_autograd(_backward, setup_context=_keep)
