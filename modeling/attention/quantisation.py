"""Eight-bit storage with one scale per vector: symmetric int8 and fp8 (e4m3), as the KV cache uses them.

The last dimension shares a scale. Scales are bfloat16 and rounded upwards, and entries are divided by the scale that
is stored, so that the scale itself adds no error and nothing saturates.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # magnitude that each type holds
SCALE = torch.bfloat16


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(payload of x's shape in `dtype`, scale of x's shape without its last dimension in SCALE).

    int8: within half a step of each element; a step is the stored scale, 0.3 to 1.2 % above amax / 127, so half of one is
    at most 0.506 amax / 127. What is read back in bfloat16 is rounded once more.
    """
    largest = LARGEST[dtype]
    peak = x.abs().amax(dim=-1).float() / largest
    # bfloat16 has 8 significant bits: 2^-7 relative makes up for rounding down; the floor keeps 0 / 0 away.
    scale = (peak * (1 + 2**-7)).to(SCALE).clamp(min=torch.finfo(SCALE).tiny)
    scaled = x.float() / scale.float().unsqueeze(-1)
    if dtype == torch.int8:
        scaled = scaled.round()
    return scaled.clamp(-largest, largest).to(dtype), scale


def dequantise(payload: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that (payload, scale) stand for."""
    return payload.to(dtype) * scale.to(dtype).unsqueeze(-1)
