"""Norms inside attention."""

from __future__ import annotations

from torch import Tensor, nn


def widely_normed(norm: nn.Module, x: Tensor) -> Tensor:
    """In the gain's dtype where there is one, and so is the result: under autocast float32, where projections give bfloat16."""
    gain: Tensor | None = getattr(norm, "weight", None)
    normed_x: Tensor = norm(x if gain is None else x.to(gain.dtype))
    return normed_x


def normed(norm: nn.RMSNorm | None, x: Tensor) -> Tensor:
    """The same, in the dtype of x; x for None."""
    return x if norm is None else widely_normed(norm, x).to(x.dtype)
