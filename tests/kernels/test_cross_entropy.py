"""Cross-entropy and its gradient by the logits, in torch and in Triton, against torch's own in float64.

Without a GPU the Triton kernel runs in Triton's interpreter: in one subprocess (this file as a program), because
TRITON_INTERPRET must be set before triton is imported and nothing else in the session may see it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.kernels.cross_entropy import nats_and_gradient, nats_of
from modeling.loss import mean_nats, token_nats

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install -r requirements-kernels.txt"
)
# Rounding of the gradient to the logits' type; nats are float32 in all of them.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# rows, columns, vocabulary, size of the logits
SHAPES = (
    (7, 64, 50, 1.0),
    (7, 64, 64, 100.0),
    (5, 1, 1, 1.0),
    (3, 2048, 2048, 10.0),
    (3, 4224, 4100, 10.0),
    (2, 2112, 1999, 1e4),
)

Kernel = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def in_torch(logits: Tensor, targets: Tensor, factors: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    assert not logits.is_cuda, "there the kernel would be chosen"
    return nats_and_gradient(logits, targets, factors, vocab_size=vocab_size)


def in_triton(logits: Tensor, targets: Tensor, factors: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    from modeling.kernels.cross_entropy_triton import nats, nats_and_gradient_

    alone = nats(logits, targets, vocab_size)
    both = nats_and_gradient_(logits, targets, factors, vocab_size)
    assert torch.equal(alone, both) or alone.isnan().any(), "the nats do not depend on whether there is a gradient"
    return both, logits


def errors(kernel: Kernel, shape: tuple[int, int, int, float], dtype: torch.dtype, device: str) -> tuple[float, float]:
    """||result - exact|| / ||exact|| of nats and gradient. Every second column of the memory belongs to somebody else."""
    rows, columns, vocab_size, size = shape
    generator = torch.Generator().manual_seed(1)
    memory = torch.randn(rows, 2 * columns, generator=generator) * size
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    targets[0], targets[-1] = 0, vocab_size - 1
    factors = torch.rand(rows, generator=generator)
    memory = memory.to(device, dtype)
    logits, before = memory[:, :columns], memory[:, columns:].clone()

    exact = logits[:, :vocab_size].detach().double().cpu().requires_grad_()
    exact_nats = F.cross_entropy(exact, targets, reduction="none")
    (exact_nats * factors.double()).sum().backward()
    nats, grad = kernel(logits, targets.to(device), factors.to(device), vocab_size)
    assert nats.dtype == torch.float32 and grad.dtype == dtype and not grad[:, vocab_size:].any()
    assert torch.equal(memory[:, columns:], before), "it wrote outside its rows"
    assert exact.grad is not None
    scale = max(float(exact_nats.detach().norm()), 1.0), max(float(exact.grad.norm()), 1e-3)
    return (
        float((nats.double().cpu() - exact_nats.detach()).norm()) / scale[0],
        float((grad[:, :vocab_size].double().cpu() - exact.grad).norm()) / scale[1],
    )


def nan_is_seen(kernel: Kernel, device: str) -> bool:
    logits = torch.zeros(3, 40, device=device)
    logits[1, 7] = float("nan")
    nats, grad = kernel(logits, torch.zeros(3, dtype=torch.long, device=device), torch.ones(3, device=device), 40)
    return nats.isnan().tolist() == [False, True, False] and bool(grad[1].isnan().all()) and not grad[::2].isnan().any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torchs_form_equals_float64(shape: tuple[int, int, int, float], dtype: torch.dtype) -> None:
    assert max(errors(in_torch, shape, dtype, "cpu")) < TOLERANCE[dtype]
    assert nan_is_seen(in_torch, "cpu")


@needs_triton
def test_tritons_form_equals_float64_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.test_cross_entropy"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 2 * len(SHAPES) + 1 and found.pop("nan")
    for name, error in found.items():
        assert error < (1e-6 if "float32" in name else 1e-3), name


def interpreted() -> dict[str, float]:
    found: dict[str, float] = {"nan": nan_is_seen(in_triton, "cpu")}
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float16):
            found[f"{shape} {dtype}"] = max(errors(in_triton, shape, dtype, "cpu"))
    return found


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", (*SHAPES, (4000, 50304, 50257, 10.0)), ids=str)
def test_tritons_form_equals_float64_on_a_gpu(shape: tuple[int, int, int, float], dtype: torch.dtype) -> None:
    first = errors(in_triton, shape, dtype, "cuda")
    assert max(first) < TOLERANCE[dtype] and first == errors(in_triton, shape, dtype, "cuda"), "it repeats bit for bit"
    assert nan_is_seen(in_triton, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_heads_loss_on_a_gpu_is_the_plain_one_and_holds_its_logits_once(compiled: bool) -> None:
    rows, width, columns, vocab_size = 8192, 64, 50304, 50257
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(rows, width, device="cuda", generator=generator).requires_grad_()
    weight = torch.randn(columns, width, device="cuda", generator=generator).mul_(0.1).requires_grad_()
    targets = torch.randint(vocab_size, (rows,), device="cuda", generator=generator)
    targets[::9] = -100

    def loss_of(chunk_tokens: int | None) -> Tensor:
        return mean_nats(x, weight, targets, vocab_size=vocab_size, chunk_tokens=chunk_tokens)

    plain = loss_of(None)
    exact = torch.autograd.grad(plain, (x, weight))
    chunked = torch.compile(loss_of, fullgraph=True, dynamic=False) if compiled else loss_of
    with torch.autocast("cuda", dtype=torch.bfloat16):
        torch.autograd.grad(chunked(rows), (x, weight))  # compilation, workspaces
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = chunked(rows)
        grads = torch.autograd.grad(loss, (x, weight))
    most = torch.cuda.max_memory_allocated() - before
    assert abs(float(loss) - float(plain)) < 2e-3
    for grad, expected in zip(grads, exact, strict=True):
        assert float((grad - expected).norm() / expected.norm()) < 1e-2
    assert most < 1.2 * 2 * rows * columns, "a second copy of the logits"
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        nats = token_nats(x, weight, targets.clamp(min=0), vocab_size=vocab_size, chunk_tokens=4096)
    assert abs(float(nats[targets >= 0].mean()) - float(plain)) < 2e-3
    assert torch.equal(
        nats[:5], nats_of((x[:5].bfloat16() @ weight.bfloat16().T), targets[:5].clamp(min=0), vocab_size=vocab_size)
    )


if __name__ == "__main__":
    print(json.dumps(interpreted()))
