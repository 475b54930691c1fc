"""Where the kernels in Triton, and in its language Gluon, can run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Read once, without importing it: torch.compile traces what asks.
_TRITON = importlib.util.find_spec("triton")
HAS_TRITON = _TRITON is not None
_FOLDERS = (_TRITON.submodule_search_locations if _TRITON is not None else None) or ()
HAS_GLUON = any(Path(folder, "experimental", "gluon", "nvidia", "hopper.py").is_file() for folder in _FOLDERS)


def runs_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tensors of this type on this device are computed by Triton where nobody chose: on NVIDIA's cards alone."""
    return device.type == "cuda" and torch.version.hip is None and HAS_TRITON and dtype in TRITON_DTYPES


def runs_gluon(device: torch.device, capability: int) -> bool:
    """Whether kernels in Gluon for NVIDIA's cards of this major compute capability are computed by this one."""
    return HAS_GLUON and torch.cuda.get_device_properties(device).major == capability
