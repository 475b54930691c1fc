"""Cross-entropy of a linear head without the whole batch's logits in memory.

Letters: N tokens, D d_model, C vocabulary (padded columns included).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from modeling.kernels.cross_entropy import mask_padding, nats_and_gradient, nats_of

IGNORED = -100  # torch's own: a target that is not scored


def token_nats(x_ND: Tensor, weight_CD: Tensor, targets_N: Tensor, *, vocab_size: int, chunk_tokens: int) -> Tensor:
    """Each token's cross-entropy in nats, float32 of shape (N,); logits of chunk_tokens tokens at a time. No gradient."""
    with torch.no_grad():
        nats = [
            nats_of(F.linear(x, weight_CD), targets, vocab_size=vocab_size)
            for x, targets in zip(x_ND.split(chunk_tokens), targets_N.split(chunk_tokens), strict=True)
        ]
    return torch.cat(nats)


def token_nats_beside(
    x_2ND: tuple[Tensor, Tensor], weight_CD: Tensor, targets_N: Tensor, *, vocab_size: int, chunk_tokens: int
) -> Tensor:
    """Of two sets of activations each token's cross-entropies p and q, and KL(q || p): (3, N) in nats, float32.

    KL sums q (log q - log p) over the vocabulary. Logits of chunk_tokens tokens at a time, twice. No gradient.
    """
    columns = []
    with torch.no_grad():
        for p, q, targets in zip(*(x_ND.split(chunk_tokens) for x_ND in x_2ND), targets_N.split(chunk_tokens), strict=True):
            logits = [F.linear(x, weight_CD) for x in (p, q)]
            log_p, log_q = (each[:, :vocab_size].float().log_softmax(dim=-1) for each in logits)
            nats = [nats_of(each, targets, vocab_size=vocab_size) for each in logits]
            columns.append(torch.stack((*nats, (log_q.exp() * (log_q - log_p)).sum(dim=-1))))
    return torch.cat(columns, dim=1)


def mean_nats(x_ND: Tensor, weight_CD: Tensor, targets_N: Tensor, *, vocab_size: int, chunk_tokens: int | None) -> Tensor:
    """Mean cross-entropy in nats, differentiable.

    Targets of IGNORED count neither in the sum nor in the mean. chunk_tokens=None holds all N x C logits in float32. A number
    holds that many rows at a time and computes both gradients in the forward pass, chunk by chunk: the same three products, a
    fraction of the memory.
    """
    if chunk_tokens is None:
        logits_NC = mask_padding(F.linear(x_ND, weight_CD).float(), vocab_size)
        return F.cross_entropy(logits_NC, targets_N)
    if torch.is_autocast_enabled(x_ND.device.type):
        dtype = torch.get_autocast_dtype(x_ND.device.type)
        x_ND, weight_CD = x_ND.to(dtype), weight_CD.to(dtype)
    return _ChunkedMeanNats.apply(x_ND, weight_CD, targets_N, vocab_size, chunk_tokens)


class _ChunkedMeanNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_CD: Tensor, targets_N: Tensor, vocab_size: int, chunk_tokens: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        counts_N = targets_N != IGNORED
        scored = counts_N.sum()  # on the device, which is asked for no number
        grad_x_ND = torch.empty_like(x_ND)
        grad_weight_CD = torch.zeros_like(weight_CD, dtype=torch.float32)
        N = x_ND.shape[0]
        for start in range(0, N, chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            x, counts_n = x_ND[rows], counts_N[rows]
            nats_n, grad = nats_and_gradient(
                x @ weight_CD.T, targets_N[rows].where(counts_n, 0), counts_n / scored, vocab_size=vocab_size
            )
            total += nats_n.where(counts_n, 0.0).sum()
            torch.matmul(grad, weight_CD, out=grad_x_ND[rows])
            if grad.dtype == grad_weight_CD.dtype:  # without a second C x D, a tenth of the loss at 50,304 columns
                torch.addmm(grad_weight_CD, grad.T, x, out=grad_weight_CD)
            else:
                grad_weight_CD += grad.T @ x
        ctx.save_for_backward(grad_x_ND, grad_weight_CD.to(weight_CD.dtype))
        return total / scored

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_ND, grad_weight_CD = ctx.saved_tensors
        return grad_x_ND * grad, grad_weight_CD * grad, None, None, None
