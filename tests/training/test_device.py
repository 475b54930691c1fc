"""Choices of device, precision and size are made once, said in words when impossible, and depend on nothing else."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness.errors import UserError
from harness.training import device as device_module
from harness.training.device import (
    auto_micro_batch_size,
    memory_bytes,
    peak_flops,
    peak_memory_bytes,
    seed_everything,
    select_compile,
    select_device,
    select_precision,
    set_deterministic,
)

CPU = torch.device("cpu")


def test_auto_takes_what_is_there_and_a_missing_device_is_refused() -> None:
    assert select_device("cpu") == CPU
    if torch.cuda.is_available():
        assert select_device("auto").type == "cuda"
    elif not torch.backends.mps.is_available():
        assert select_device("auto") == CPU
    for name, present in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not present:
            with pytest.raises(UserError, match=f"device={name} is not available here: choose one of .*cpu"):
                select_device(name)


def test_precision_is_bfloat16_only_where_the_processor_multiplies_it_or_it_is_asked_for() -> None:
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert select_precision("auto", CPU) == (torch.bfloat16 if native else torch.float32)
    assert select_precision("bfloat16", CPU) == torch.bfloat16
    assert select_precision("float32", CPU) == torch.float32


def test_compilation_is_off_on_a_cpu_unless_asked_for() -> None:
    assert [select_compile(name, CPU) for name in ("auto", "on", "off")] == [False, True, False]
    assert select_compile("auto", torch.device("cuda"))


def test_one_seed_sets_every_generator() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_everything(3)
    first = draw()
    seed_everything(4)
    other = draw()
    seed_everything(3)
    assert draw() == first
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_the_deterministic_switch_goes_both_ways() -> None:
    try:
        set_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_peak_speed_is_known_by_full_name_only_and_for_bfloat16() -> None:
    assert peak_flops(CPU, torch.bfloat16) is None
    assert device_module.BF16_FLOPS["NVIDIA H200"] == 989.4e12
    assert "NVIDIA H200 MIG 1g.18gb" not in device_module.BF16_FLOPS


def test_peak_memory_is_that_of_this_process() -> None:
    assert 50e6 < peak_memory_bytes(CPU) < memory_bytes(CPU)


SMALL = {"model": SimpleNamespace(max_seq_len=256, d_model=128, n_layers=4), "vocab_size": 4096, "parameters": 1_300_000}
GPT2 = {"model": SimpleNamespace(max_seq_len=1024, d_model=768, n_layers=12), "vocab_size": 50304, "parameters": 124_000_000}


def test_micro_batches_keep_to_the_token_limit_in_equal_pieces() -> None:
    def size(batch_size: int) -> int:
        return auto_micro_batch_size(batch_size, **SMALL, precision=torch.float32, device=CPU)

    limit = device_module.CPU_MICRO_BATCH_TOKENS // 256
    for batch_size in range(1, 70):
        chosen = size(batch_size)
        assert 1 <= chosen <= limit
        pieces = -(-batch_size // chosen)
        assert pieces == -(-batch_size // limit), "no more pieces than needed"
        assert batch_size - (pieces - 1) * chosen > chosen - pieces, "the last piece is as large as it can be"


def test_micro_batches_shrink_with_the_memory_down_to_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    sizes = []
    for gigabytes in (141, 80, 24, 8, 2, 0.1):
        monkeypatch.setattr(device_module, "memory_bytes", lambda device, gb=gigabytes: int(gb * 1e9))
        sizes.append(auto_micro_batch_size(480, **GPT2, precision=torch.bfloat16, device=cuda))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] * 1024 > 50_000, "a large GPU is used"
    assert sizes[-1] == 1, "there is always a size"
