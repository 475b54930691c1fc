"""Where and how a run computes: device, precision, compilation, seeds, memory, micro-batch, peak speed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import random
import resource
import sys
from pathlib import Path

import numpy as np
import torch

from harness.config.schema import ModelConfig
from harness.errors import UserError

# Tokens whose logits are held at a time (modeling/loss.py): on a CPU few, for its caches; on a GPU so many that its matrix
# products are as fast as over all tokens (gpt2 on an H200: 551,000 tokens/s so, 550,600 whole, with 4.4 GiB more).
LOSS_CHUNK_TOKENS = {"cpu": 512, "cuda": 16384}

# Dense bf16 tensor-core FLOP/s (float32 accumulation, no sparsity) by the full name that the driver reports, from the
# makers' data sheets. Full names, because a slice (MIG) or a laptop part carries the name of its bigger sister inside.
BF16_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H800": 989.4e12,
    "NVIDIA H20": 148e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A10": 125e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "NVIDIA RTX 6000 Ada Generation": 364.2e12,
    "NVIDIA RTX A6000": 154.8e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "AMD Instinct MI300X": 1307.4e12,
}

CPU_MICRO_BATCH_TOKENS = 2048  # larger pieces fall out of the caches, smaller ones starve the matrix products
GPU_MICRO_BATCH_TOKENS = 65_536  # beyond this a step gains nothing from longer kernels


def select_device(name: str) -> torch.device:
    """auto | cpu | cuda | mps -> the device. Raises UserError if the machine lacks the one asked for."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in available.items() if present)
    if not available[name]:
        present = [kind for kind, is_present in available.items() if is_present]
        raise UserError(f"device={name} is not available here: choose one of {', '.join(present)}, or auto")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def select_precision(name: str, device: torch.device) -> torch.dtype:
    """auto | float32 | bfloat16 -> the autocast dtype. auto is bfloat16 only where the hardware multiplies it natively.

    Elsewhere bfloat16 works and is slow, 30 to 100 times on older CPUs, so it has to be asked for by name.
    """
    if name == "auto":
        return torch.bfloat16 if _has_native_bfloat16(device) else torch.float32
    return torch.float32 if name == "float32" else torch.bfloat16


def _has_native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def select_compile(name: str, device: torch.device) -> bool:
    """auto | on | off. auto compiles on CUDA only: a CPU spends its time in matrix products, which stay the same."""
    return name == "on" or (name == "auto" and device.type == "cuda")


def set_deterministic(on: bool) -> None:
    """Make every operation repeat bit for bit, or let torch choose. On CUDA call it before the first matrix product."""
    if on:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it once, when its handle is made
    if torch.are_deterministic_algorithms_enabled() != on:  # either value loads torch's compiler, which takes two seconds
        torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.benchmark = False


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, the device's included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generators(device: torch.device) -> list[torch.Tensor]:
    """The states of the generators that a training step draws from: a few microseconds, no synchronisation."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_generators(states: list[torch.Tensor], device: torch.device) -> None:
    """Back to what `generators` gave."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def reset_peak_memory(device: torch.device) -> None:
    """Start the count anew: of tensors on CUDA, else of the resident size, which Linux alone allows (proc(5), clear_refs)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Since the count began. CUDA: most bytes in tensors at a time. CPU and MPS: the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(device: torch.device, precision: torch.dtype) -> float | None:
    """The device's peak FLOP/s for model FLOPs utilisation; None where it is not known."""
    if device.type != "cuda" or precision != torch.bfloat16:
        return None
    return BF16_FLOPS.get(torch.cuda.get_device_name(device))


def keep_freed_memory(device: torch.device) -> None:
    """Have glibc keep freed blocks for the next step instead of returning them to the system (CPU training only).

    By default every large tensor is mapped anew and its pages are zeroed by the kernel: the same plain GPT trained 1.28
    times faster without that (docs/PERFORMANCE.md). Nothing happens where the C library is another.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL("libc.so.6")
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
    for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**28)):  # -1: never trim
        libc.mallopt(parameter, value)


def memory_bytes(device: torch.device) -> int:
    """The memory that the device has, in use or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def auto_micro_batch_size(
    batch_size: int, model: ModelConfig, *, vocab_size: int, parameters: int, precision: torch.dtype, device: torch.device
) -> int:
    """Sequences per forward pass: batch_size in the fewest equal pieces that fit, a function of these sizes alone.

    A piece fits if its tokens are at most CPU_ or GPU_MICRO_BATCH_TOKENS, and if what they keep for the backward pass
    takes at most half of the memory that is left beside 16 bytes a parameter (weight, gradient and AdamW's two). Kept
    per token, by estimate: 32 d_model numbers a layer in the compute precision, and the logits with their float32 copy
    and gradient. A piece is at least one sequence; the last piece is smaller where batch_size does not divide.
    """
    on_cpu = device.type == "cpu"
    width = torch.finfo(precision).bits // 8
    bytes_per_token = 32 * model.d_model * model.n_layers * width + vocab_size * (width + 8)
    memory = max(0, memory_bytes(device) - 16 * parameters) // 2
    tokens = min(CPU_MICRO_BATCH_TOKENS if on_cpu else GPU_MICRO_BATCH_TOKENS, memory // bytes_per_token)
    most = max(1, tokens // model.max_seq_len)
    pieces = -(-batch_size // most)
    return -(-batch_size // pieces)


def loss_chunk_tokens(device: torch.device) -> int:
    """How many tokens' logits the loss holds at a time on this device."""
    return LOSS_CHUNK_TOKENS.get(device.type, 1024)
