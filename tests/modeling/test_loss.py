"""The cross-entropy of a linear head: chunked and whole give one value and one gradient, and chunks keep memory small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling.attention.contract import relative_error
from modeling.kernels.cross_entropy import mask_padding
from modeling.loss import mean_nats, token_nats

N, D, C, VOCAB = 21, 8, 64, 50
CHUNKS = [1, 7, 16, 21, 100]  # dividing 21, not dividing it, all of it, more than it


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returned, by dtype; the dtypes that were multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[torch.dtype, int] = {}
        self.multiplied: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket == torch.ops.aten.mm:
            self.multiplied |= {args[0].dtype, args[1].dtype}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                elements = leaf.untyped_storage().nbytes() // leaf.dtype.itemsize
                self.elements[leaf.dtype] = max(self.elements.get(leaf.dtype, 0), elements)
        return out


def inputs(scale: float = 1.0, vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, head weights (logits of about `scale`) and targets, among them the first and the last token."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(N, D, generator=generator)
    weight_CD = torch.randn(C, D, generator=generator) * scale / D**0.5
    targets_N = torch.randint(vocab, (N,), generator=generator)
    targets_N[0], targets_N[1] = 0, vocab - 1
    return x_ND.requires_grad_(), weight_CD.requires_grad_(), targets_N


def exact(x_ND: Tensor, weight_CD: Tensor, targets_N: Tensor, vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients in float64, on the unpadded vocabulary, by torch's own cross-entropy."""
    x, weight = x_ND.detach().double().requires_grad_(), weight_CD.detach().double().requires_grad_()
    loss = F.cross_entropy(x @ weight[:vocab].T, targets_N)
    grad_x, grad_weight = torch.autograd.grad(loss, (x, weight))
    return loss.detach(), grad_x, grad_weight


@pytest.mark.parametrize("vocab", [VOCAB, C], ids=["padded", "unpadded"])
@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["", "large logits"])
@pytest.mark.parametrize("chunk", [None, *CHUNKS])
def test_loss_and_gradients_are_torchs_cross_entropy(chunk: int | None, scale: float, vocab: int) -> None:
    x, weight, targets = inputs(scale, vocab)
    wanted, wanted_x, wanted_weight = exact(x, weight, targets, vocab)
    loss = mean_nats(x, weight, targets, vocab_size=vocab, chunk_tokens=chunk)
    got_x, got_weight = torch.autograd.grad(loss, (x, weight))
    assert loss.dtype == torch.float32 and got_x.dtype == got_weight.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert relative_error(got_x, wanted_x) < 2e-6
    assert relative_error(got_weight, wanted_weight) < 2e-6
    if vocab < C:
        assert got_weight[vocab:].abs().max() == 0


@pytest.mark.parametrize("chunk", [None, *CHUNKS])
def test_targets_that_are_not_scored_count_nowhere(chunk: int | None) -> None:
    x, weight, targets = inputs()
    targets[[0, 5, 6, 20]] = -100
    wanted, wanted_x, wanted_weight = exact(x, weight, targets)
    loss = mean_nats(x, weight, targets, vocab_size=VOCAB, chunk_tokens=chunk)
    got_x, got_weight = torch.autograd.grad(loss, (x, weight))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert relative_error(got_x, wanted_x) < 2e-6 and relative_error(got_weight, wanted_weight) < 2e-6
    assert got_x[[0, 5, 6, 20]].abs().max() == 0
    nothing = torch.full_like(targets, -100)
    assert mean_nats(x, weight, nothing, vocab_size=VOCAB, chunk_tokens=chunk).isnan()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_gradients_agree_with_finite_differences(chunk: int) -> None:
    """The slope of torch's float64 loss along a random direction, which no autograd formula enters."""
    x, weight, targets = inputs()
    loss = mean_nats(x, weight, targets, vocab_size=VOCAB, chunk_tokens=chunk)
    grads = torch.autograd.grad(loss, (x, weight))
    directions = [torch.randn(g.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for g in grads]

    def along(step: float) -> float:
        moved = [p.detach().double() + step * d for p, d in zip((x, weight), directions, strict=True)]
        return F.cross_entropy(moved[0] @ moved[1][:VOCAB].T, targets).item()

    slope = (along(1e-5) - along(-1e-5)) / 2e-5
    assert sum((g * d).sum().item() for g, d in zip(grads, directions, strict=True)) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("chunk", [None, 8])
def test_a_factor_on_the_loss_is_a_factor_on_the_gradients_and_backward_calls_add_up(chunk: int | None) -> None:
    x, weight, targets = inputs()
    once = torch.autograd.grad(mean_nats(x, weight, targets, vocab_size=VOCAB, chunk_tokens=chunk), (x, weight))
    for factor in (0.25, 0.5):
        (factor * mean_nats(x, weight, targets, vocab_size=VOCAB, chunk_tokens=chunk)).backward()
    assert x.grad is not None and weight.grad is not None
    assert relative_error(x.grad, 0.75 * once[0]) < 1e-6
    assert relative_error(weight.grad, 0.75 * once[1]) < 1e-6


def test_micro_batches_of_unequal_size_make_up_the_gradient_of_the_batch() -> None:
    x, weight, targets = inputs()
    _, wanted_x, wanted_weight = exact(x, weight, targets)
    for rows in (slice(0, 16), slice(16, N)):
        share = len(targets[rows]) / N
        (share * mean_nats(x[rows], weight, targets[rows], vocab_size=VOCAB, chunk_tokens=5)).backward()
    assert x.grad is not None and weight.grad is not None
    assert relative_error(x.grad, wanted_x) < 2e-6
    assert relative_error(weight.grad, wanted_weight) < 2e-6


@pytest.mark.parametrize("chunk", [None, 8])
def test_bfloat16_autocast_stays_close_to_float64(chunk: int | None) -> None:
    x, weight, targets = inputs()
    wanted, wanted_x, wanted_weight = exact(x, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mean_nats(x, weight, targets, vocab_size=VOCAB, chunk_tokens=chunk)
    loss.backward()
    assert loss.dtype == torch.float32
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-3)
    assert relative_error(x.grad, wanted_x) < 1e-2
    assert relative_error(weight.grad, wanted_weight) < 1e-2


@pytest.mark.parametrize("chunk", [None, 8])
def test_autocast_multiplies_in_bfloat16_alone(chunk: int | None) -> None:
    x, weight, targets = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16), Largest() as mode:
        loss = mean_nats(x, weight, targets, vocab_size=VOCAB, chunk_tokens=chunk)
    with mode:
        loss.backward()
    assert mode.multiplied == {torch.bfloat16}


@pytest.mark.parametrize("chunk", CHUNKS)
def test_each_tokens_nats_are_torchs_and_have_no_gradient(chunk: int) -> None:
    x, weight, targets = inputs()
    nats = token_nats(x, weight, targets, vocab_size=VOCAB, chunk_tokens=chunk)
    wanted = F.cross_entropy(x.double() @ weight[:VOCAB].double().T, targets, reduction="none")
    assert nats.shape == (N,) and nats.dtype == torch.float32 and not nats.requires_grad
    assert relative_error(nats, wanted) < 1e-6


def test_padding_columns_are_masked_and_nothing_else() -> None:
    logits = torch.randn(3, 5, C, generator=torch.Generator().manual_seed(0))
    masked = mask_padding(logits, VOCAB)
    assert torch.equal(masked[..., :VOCAB], logits[..., :VOCAB])
    assert (masked[..., VOCAB:] == float("-inf")).all()
    assert torch.equal(mask_padding(logits, C), logits)


# --- memory ----------------------------------------------------------------------------------------------------------


def largest(chunk: int | None, dtype: torch.dtype) -> dict[torch.dtype, int]:
    """Of forward and backward with 1000 tokens, 4 dimensions and 2000 columns."""
    x, weight = (torch.randn(rows, 4, dtype=dtype, requires_grad=True) for rows in (1000, 2000))
    with Largest() as mode:
        mean_nats(x, weight, torch.arange(1000), vocab_size=1990, chunk_tokens=chunk).backward()
    return mode.elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunked_loss_never_holds_all_logits(dtype: torch.dtype) -> None:
    for chunk in (10, 100):
        seen = largest(chunk, dtype)
        assert max(seen.values()) == chunk * 2000, seen  # one chunk of logits, and the weights' gradient is smaller
    whole = largest(None, dtype)
    assert whole[torch.float32] == 1000 * 2000  # what would be found if it did


def test_scoring_never_holds_all_logits() -> None:
    x, weight = torch.randn(1000, 4), torch.randn(2000, 4)
    with Largest() as mode:
        token_nats(x, weight, torch.arange(1000), vocab_size=1990, chunk_tokens=100)
    assert max(mode.elements.values()) == 100 * 2000
