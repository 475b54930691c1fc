"""Norms inside attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def widely_normed(norm: nn.Module, x: Tensor) -> Tensor:
    """In the gain's dtype where there is one, and so is the result: under autocast float32, where projections give bfloat16."""
    gain: Tensor | None = getattr(norm, "weight", None)
    normed_x: Tensor = norm(x if gain is None else x.to(gain.dtype))
    return normed_x


def normed(norm: nn.RMSNorm | None, x: Tensor) -> Tensor:
    """The same, in the dtype of x; x for None."""
    return x if norm is None else widely_normed(norm, x).to(x.dtype)


def normed_first(norm: nn.RMSNorm | None, x: Tensor) -> Tensor:
    """The same over the first dimensions of a head, as many as the norm is wide; those behind them stay as they are."""
    width = x.shape[-1] if norm is None else norm.normalized_shape[0]
    if width == x.shape[-1]:
        return normed(norm, x)
    return torch.cat((normed(norm, x[..., :width]), x[..., width:]), dim=-1)
