"""Norms inside attention."""

from __future__ import annotations

from torch import Tensor, nn


def normed(norm: nn.RMSNorm | None, x: Tensor) -> Tensor:
    """In the gain's dtype where there is one (under autocast that is float32, where projections give bfloat16); x for None."""
    if norm is None:
        return x
    gain: Tensor | None = norm.weight
    return norm(x if gain is None else x.to(gain.dtype)).to(x.dtype)
