"""Cross-entropy of a linear head without the whole batch's logits in memory.

Letters: N tokens, D d_model, C vocabulary (padded columns included).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # torch's own: a target that is not scored


def mask_padding(logits_NC: Tensor, vocab_size: int) -> Tensor:
    """Logits of the columns that pad the vocabulary become -inf: they can be neither predicted nor sampled."""
    if logits_NC.shape[-1] == vocab_size:
        return logits_NC
    padding_C = torch.arange(logits_NC.shape[-1], device=logits_NC.device) >= vocab_size
    return logits_NC.masked_fill(padding_C, float("-inf"))


def token_nats(x_ND: Tensor, weight_CD: Tensor, targets_N: Tensor, *, vocab_size: int, chunk_tokens: int) -> Tensor:
    """Each token's cross-entropy in nats, float32 of shape (N,); logits of chunk_tokens tokens at a time. No gradient."""
    with torch.no_grad():
        nats = [
            F.cross_entropy(mask_padding(F.linear(x, weight_CD).float(), vocab_size), targets, reduction="none")
            for x, targets in zip(x_ND.split(chunk_tokens), targets_N.split(chunk_tokens), strict=True)
        ]
    return torch.cat(nats)


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
            counts_n1 = counts_N[rows].unsqueeze(1)
            x, target_n1 = x_ND[rows], targets_N[rows].unsqueeze(1).where(counts_n1, 0)
            logits = mask_padding((x @ weight_CD.T).float(), vocab_size)
            picked = logits.gather(1, target_n1)
            log_total = logits.logsumexp(dim=1, keepdim=True)
            total += (log_total - picked).where(counts_n1, 0.0).sum()
            grad = logits.sub_(log_total).exp_()  # the softmax, in the logits' own memory
            grad.scatter_add_(1, target_n1, torch.full_like(picked, -1.0))
            grad = grad.mul_(counts_n1 / scored).to(x.dtype)
            torch.matmul(grad, weight_CD, out=grad_x_ND[rows])
            grad_weight_CD += grad.T @ x
        ctx.save_for_backward(grad_x_ND, grad_weight_CD.to(weight_CD.dtype))
        return total / scored

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_ND, grad_weight_CD = ctx.saved_tensors
        return grad_x_ND * grad, grad_weight_CD * grad, None, None, None
