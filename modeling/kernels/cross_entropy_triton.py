"""The cross-entropy of cross_entropy.py in Triton: one program reads a row of logits for its maximum and sum.

That is an online softmax (Milakov and Gimelshein, arXiv 1805.02867); a second pass over the row puts the gradient in the place
of the logits. Nothing else is written and no program waits for another: results repeat bit for bit.

Letters: N tokens, C columns.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's compiler gives the parameters of its kernels their types at each launch.

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 2048, 4  # columns a time; of nine pairs the fastest for 50,304 columns on an H200 (docs/PERFORMANCE.md)


@triton.jit
def _rows(logits, targets, factors, nats, stride, columns, vocab_size, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    picked = tl.load(logits + target).to(tl.float32)
    top = float("-inf")
    total = 0.0
    for start in range(0, vocab_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(logits + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
        above = tl.maximum(top, tl.max(z))
        total = total * tl.exp(top - above) + tl.sum(tl.exp(z - above))
        top = above
    log_total = top + tl.log(total)
    tl.store(nats + row, log_total - picked)
    if GRADIENT:
        factor = tl.load(factors + row)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(logits + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
            grad = factor * (tl.exp(z - log_total) - tl.where(column == target, 1.0, 0.0))
            tl.store(logits + column, grad.to(logits.dtype.element_ty), mask=column < columns)


def _launch(logits_NC: Tensor, targets_N: Tensor, factors_N: Tensor | None, vocab_size: int) -> Tensor:
    assert logits_NC.stride(1) == 1 and targets_N.is_contiguous() and (factors_N is None or factors_N.is_contiguous())
    N, C = logits_NC.shape
    nats_N = torch.empty(N, dtype=torch.float32, device=logits_NC.device)
    with torch.cuda.device(logits_NC.device) if logits_NC.is_cuda else contextlib.nullcontext():
        _rows[(N,)](
            logits_NC,
            targets_N,
            factors_N,
            nats_N,
            logits_NC.stride(0),
            C,
            vocab_size,
            GRADIENT=factors_N is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return nats_N


@torch.library.custom_op("cross_entropy::nats", mutates_args=())
def nats(logits_NC: Tensor, targets_N: Tensor, vocab_size: int) -> Tensor:
    """Each row's cross-entropy in nats, float32 of shape (N,). logits_NC: bfloat16, float16 or float32, rows contiguous."""
    return _launch(logits_NC, targets_N, None, vocab_size)


@torch.library.custom_op("cross_entropy::nats_and_gradient", mutates_args=("logits_NC",))
def nats_and_gradient_(logits_NC: Tensor, targets_N: Tensor, factors_N: Tensor, vocab_size: int) -> Tensor:
    """The same, and the gradient times the row's factor (float32) in the place of the logits."""
    return _launch(logits_NC, targets_N, factors_N, vocab_size)


@nats.register_fake
def _(logits_NC: Tensor, targets_N: Tensor, vocab_size: int) -> Tensor:
    return torch.empty_like(targets_N, dtype=torch.float32)


@nats_and_gradient_.register_fake
def _(logits_NC: Tensor, targets_N: Tensor, factors_N: Tensor, vocab_size: int) -> Tensor:
    return torch.empty_like(targets_N, dtype=torch.float32)
