"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split layout as in Llama.

Dimension i is paired with i + P/2 and turned by position * theta^(-2i/P). Letters: B batch, T tokens, H heads,
P rotated width, F = P/2 frequencies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Cosine and sine tables of shape (max_seq_len, P/2), real, never below float32 whatever dtype the model is cast to.

    The frequencies are computed over the width that is rotated, so a narrow rotated part still spans the whole range.
    """

    cos_SF: Tensor
    sin_SF: Tensor

    def __init__(self, *, width: int, max_seq_len: int, theta: float) -> None:
        super().__init__()
        if width <= 0 or width % 2:
            raise ValueError(
                f"a rotated width of {width} cannot be paired; choose an even head_dim (qk_rope_head_dim if decoupled)"
            )
        if theta <= 0:
            raise ValueError(f"rope_theta={theta} must be positive; 10000 is usual")
        self.width, self.max_seq_len, self.theta = width, max_seq_len, theta
        self._build(torch.get_default_device(), torch.float32)

    def _build(self, device: torch.device, dtype: torch.dtype) -> None:
        frequency_F = self.theta ** (-torch.arange(0, self.width, 2, dtype=torch.float64, device=device) / self.width)
        angle_SF = torch.arange(self.max_seq_len, dtype=torch.float64, device=device)[:, None] * frequency_F
        self.register_buffer("cos_SF", angle_SF.cos().to(dtype), persistent=False)
        self.register_buffer("sin_SF", angle_SF.sin().to(dtype), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        # module.to(bfloat16) would round the tables (position 257 becomes 256): move them, but rebuild their values.
        super()._apply(fn, recurse)
        device = self.cos_SF.device
        dtype = torch.float64 if self.cos_SF.dtype == torch.float64 else torch.float32
        if device.type == "mps":  # no float64 there
            self._build(torch.device("cpu"), dtype)
            self.cos_SF, self.sin_SF = self.cos_SF.to(device), self.sin_SF.to(device)
        else:
            self._build(device, dtype)
        return self

    def tables(self, start: int, length: int, positions_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos, sin of shape (1 or B, T, 1, F): of positions_BT where given, else of start..start+length-1."""
        if positions_BT is not None:
            return self.cos_SF[positions_BT].unsqueeze(2), self.sin_SF[positions_BT].unsqueeze(2)
        if start + length > self.max_seq_len:
            raise ValueError(
                f"position {start + length - 1} is beyond the {self.max_seq_len} positions of this model; "
                f"raise model.max_seq_len"
            )
        rows = slice(start, start + length)
        return self.cos_SF[rows][None, :, None], self.sin_SF[rows][None, :, None]


def rotate(x_BTHP: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn every head's P dimensions by its token's angle, in float32 at least; dtype and shape are kept."""
    cos, sin = tables
    first, second = x_BTHP.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTHP.dtype)
