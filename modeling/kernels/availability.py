"""Where the kernels in Triton can run."""

from __future__ import annotations

import importlib.util

import torch

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HAS_TRITON = importlib.util.find_spec("triton") is not None  # read once: torch.compile traces what asks


def runs_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tensors of this type on this device are computed by Triton where nobody chose: on NVIDIA's cards alone."""
    return device.type == "cuda" and torch.version.hip is None and HAS_TRITON and dtype in TRITON_DTYPES
