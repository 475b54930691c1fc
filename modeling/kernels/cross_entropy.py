"""Softmax cross-entropy of logits that are there, and its gradient by them: in torch, or a row at a time in Triton.

    nats_n = log(sum over c of exp z_nc) - z_n,target,    d nats_n / d z_nc = softmax(z_n)_c - [c = target]

Columns from vocab_size on pad the vocabulary: they count as -inf, and their gradient is 0. Letters: N tokens, C columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.kernels.availability import runs_triton


def mask_padding(logits_NC: Tensor, vocab_size: int) -> Tensor:
    """Logits of the columns that pad the vocabulary become -inf: they can be neither predicted nor sampled."""
    if logits_NC.shape[-1] == vocab_size:
        return logits_NC
    padding_C = torch.arange(logits_NC.shape[-1], device=logits_NC.device) >= vocab_size
    return logits_NC.masked_fill(padding_C, float("-inf"))


def nats_of(logits_NC: Tensor, targets_N: Tensor, *, vocab_size: int) -> Tensor:
    """Each row's cross-entropy in nats, float32 of shape (N,), without gradient."""
    if runs_triton(logits_NC.device, logits_NC.dtype):
        from modeling.kernels.cross_entropy_triton import nats

        return nats(logits_NC, targets_N, vocab_size)
    return F.cross_entropy(mask_padding(logits_NC.float(), vocab_size), targets_N, reduction="none")


def nats_and_gradient(logits_NC: Tensor, targets_N: Tensor, factors_N: Tensor, *, vocab_size: int) -> tuple[Tensor, Tensor]:
    """(nats_N in float32, grad_NC in the logits' dtype): each row's cross-entropy, and its gradient times the row's factor.

    The gradient may take the place of the logits, which are not to be read again. factors_N is float32.
    """
    if runs_triton(logits_NC.device, logits_NC.dtype):
        from modeling.kernels.cross_entropy_triton import nats_and_gradient_

        return nats_and_gradient_(logits_NC, targets_N, factors_N, vocab_size), logits_NC
    logits, targets_N1 = mask_padding(logits_NC.float(), vocab_size), targets_N.unsqueeze(1)
    factors_N1, picked_N1 = factors_N.unsqueeze(1), logits.gather(1, targets_N1)
    largest_N1 = logits.amax(dim=1, keepdim=True)
    grad = logits.sub_(largest_N1).exp_()  # in the logits' own memory; exp, most of the time on a CPU, is taken once
    total_N1 = grad.sum(dim=1, keepdim=True)
    grad.mul_(factors_N1 / total_N1).scatter_add_(1, targets_N1, -factors_N1)
    return (largest_N1 + total_N1.log() - picked_N1).squeeze(1), grad.to(logits_NC.dtype)
