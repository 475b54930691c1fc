"""What a Step promises: the token mean, the clipped gradient, the honest speed, and no update by a bad gradient."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from harness.training.loop import NonFiniteError, Step, train
from harness.training.optimizer import Optimizer, build_optimizer
from harness.training.parallel import OneProcess
from harness.training.step import EagerStep
from tests.support.tiny_model import TinyModel, optimizer_config, tiny_batches, tiny_model

CPU = torch.device("cpu")


def _train(
    model: nn.Module,
    *,
    optimizer: Optimizer | None = None,
    schedule: Callable[[int], float] = lambda step: 1.0,
    first_step: int = 1,
    last_step: int = 3,
    micro_batch_size: int = 6,
    grad_clip: float = 1.0,
    precision: torch.dtype = torch.float32,
    compile: bool = False,
) -> Iterator[Step]:
    step = EagerStep(
        OneProcess(model),  # type: ignore[arg-type]
        optimizer or build_optimizer(model, optimizer_config()),
        micro_batch_size=micro_batch_size,
        grad_clip=grad_clip,
        precision=precision,
        compile=compile,
        device=CPU,
    )
    return train(step, tiny_batches(first_step), schedule=schedule, first_step=first_step, last_step=last_step)


def _sgd(model: nn.Module) -> Optimizer:
    """With rate 1 and no momentum an update is exactly minus the gradient that was used."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return Optimizer([torch.optim.SGD(list(model.parameters()), lr=1.0)], names)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 6, 100])
def test_micro_batches_of_any_size_make_the_same_step(micro_batch_size: int) -> None:
    """4 of 6 rows leaves a last piece of 2: a mean of means would weigh its rows double."""
    whole, split = tiny_model(dropout=0.0).double(), tiny_model(dropout=0.0).double()
    for a, b in zip(_train(whole), _train(split, micro_batch_size=micro_batch_size), strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-9)
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_the_logged_loss_is_the_token_mean_of_the_whole_step_before_its_update() -> None:
    model, reference = tiny_model(dropout=0.0), tiny_model(dropout=0.0)
    step = next(_train(model, micro_batch_size=2))
    batch = next(tiny_batches(1))
    assert step.loss == pytest.approx(reference.loss(batch[:, :-1], batch[:, 1:]).item(), rel=1e-6)


def test_steps_are_numbered_from_one_with_their_tokens_and_rates() -> None:
    steps = list(_train(tiny_model(), schedule=lambda step: step / 10, first_step=4, last_step=6))
    assert [step.number for step in steps] == [4, 5, 6]
    assert [step.tokens for step in steps] == [4 * 54, 5 * 54, 6 * 54]
    assert [step.lr for step in steps] == [pytest.approx(0.01 * n / 10) for n in (4, 5, 6)]


def test_clipping_bounds_the_update_and_the_norm_is_reported_unclipped() -> None:
    norms = {}
    for clip in (0.0, 0.05):
        model = tiny_model(dropout=0.0)
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        step = next(_train(model, optimizer=_sgd(model), grad_clip=clip))
        moved = (nn.utils.parameters_to_vector(model.parameters()) - before).norm().item()
        norms[clip] = step.grad_norm
        assert step.grad_norm > 0.1
        assert moved == pytest.approx(step.grad_norm if clip == 0.0 else clip, rel=1e-3)
    assert norms[0.0] == norms[0.05]


class _Spoiled(TinyModel):
    """At call `at` the loss is nan, or finite with a gradient that is not (the square root at 0)."""

    def __init__(self, at: int, *, in_the_gradient: bool) -> None:
        super().__init__(dropout=0.0)
        self.at, self.in_the_gradient, self.calls = at, in_the_gradient, 0

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        self.calls += 1
        loss = super().loss(inputs_BT, targets_BT)
        if self.calls != self.at:
            return loss
        return loss + (loss * 0.0).sqrt() if self.in_the_gradient else loss * math.nan


@pytest.mark.parametrize("in_the_gradient", [False, True])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_weights_change(in_the_gradient: bool) -> None:
    model = _Spoiled(at=6, in_the_gradient=in_the_gradient)  # the second of two micro-batches in step 3
    steps = _train(model, micro_batch_size=3, last_step=9)
    for step in itertools.islice(steps, 2):
        assert math.isfinite(step.loss)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(NonFiniteError, match=r"step 3: .*nan.*lower optimizer.lr"):
        next(steps)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_consumers_time_is_not_counted_as_training() -> None:
    steps, tokens = [], 54
    for step in _train(tiny_model(), last_step=4):
        steps.append(step)
        time.sleep(0.5)
    assert steps[-1].seconds < 0.5
    assert steps[-1].tokens_per_second > tokens / 0.5
    assert [step.seconds for step in steps] == sorted(step.seconds for step in steps)


def test_the_first_steps_compilation_is_left_out_of_the_speed() -> None:
    class SlowStart(TinyModel):
        started = False

        def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
            if not self.started:
                time.sleep(1.0)
                self.started = True
            return super().loss(inputs_BT, targets_BT)

    first, second, third = _train(SlowStart())
    assert first.tokens_per_second < 54
    assert second.tokens_per_second > 54 / 0.5 and third.tokens_per_second > 54 / 0.5
    assert third.seconds > 1.0


def test_a_consumer_that_leaves_the_model_in_eval_mode_does_not_switch_dropout_off() -> None:
    losses = []
    for evaluates in (False, True):
        model = tiny_model(dropout=0.5)
        torch.manual_seed(1)
        run = []
        for step in _train(model):
            run.append(step.loss)
            if evaluates:
                model.eval()
        losses.append(run)
    assert losses[0] == losses[1]


def test_bfloat16_computes_in_bfloat16_and_keeps_the_weights_in_float32() -> None:
    half, full = tiny_model(dropout=0.0), tiny_model(dropout=0.0)
    a, b = next(_train(half, precision=torch.bfloat16)), next(_train(full))
    assert a.loss != b.loss and a.loss == pytest.approx(b.loss, rel=2e-2)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}


@pytest.mark.slow
def test_a_compiled_step_equals_the_eager_one() -> None:
    compiled, eager = tiny_model(dropout=0.0), tiny_model(dropout=0.0)
    pairs = zip(_train(compiled, compile=True, micro_batch_size=4), _train(eager, micro_batch_size=4), strict=True)
    for a, b in pairs:
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
