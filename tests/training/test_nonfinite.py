"""Steps without an update: when they are skipped, when training ends, and that the place of a bad number is named."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.training.loop import Step, train
from harness.training.nonfinite import FirstNonFinite, Guard, NonFiniteError, locate
from harness.training.optimizer import build_optimizer
from harness.training.parallel import OneProcess
from harness.training.step import EagerStep
from tests.support.tiny_model import TinyModel, optimizer_config, tiny_batches, tiny_model
from tests.support.variants import gpt_from

CPU = torch.device("cpu")


class _Spoiled(TinyModel):
    """In these calls of `loss` it is not a number, or as many times as large."""

    def __init__(self, factors: dict[int, float]) -> None:
        super().__init__(dropout=0.1)
        self.factors, self.calls = factors, 0

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        self.calls += 1
        return super().loss(inputs_BT, targets_BT) * self.factors.get(self.calls, 1.0)


def _train(model: nn.Module, *, guard: Guard, last_step: int = 8, first_step: int = 1, **more: Any) -> Iterator[Step]:
    step = EagerStep(
        OneProcess(model),
        more.get("optimizer") or build_optimizer(model, optimizer_config()),
        micro_batch_size=6,
        grad_clip=1.0,
        precision=torch.float32,
        compile=False,
        device=CPU,
    )
    steps = {"first_step": first_step, "last_step": last_step}
    return train(step, tiny_batches(first_step), schedule=lambda step: 1.0 - step / 100, **steps, guard=guard)


def _spoiled(factors: dict[int, float]) -> _Spoiled:
    torch.manual_seed(0)
    return _Spoiled(factors)


def test_a_skipped_step_leaves_weights_and_optimizer_alone_and_uses_up_its_batch_and_its_rate() -> None:
    model = _spoiled({3: math.nan})
    optimizer, guard = build_optimizer(model, optimizer_config()), Guard(skip=True)
    before: list[Tensor] = []
    steps = []
    for step in _train(model, guard=guard, optimizer=optimizer, last_step=4):
        state = [*(p.detach().clone() for p in model.parameters()), *(t.clone() for t in optimizer.state_dict().values())]
        if step.number == 3:
            assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
        before, steps = state, [*steps, step]
    assert [step.skipped is not None for step in steps] == [False, False, True, False]
    assert math.isnan(steps[2].loss) and math.isfinite(steps[3].loss)
    assert [step.tokens for step in steps] == [54, 108, 162, 216]
    assert [step.lr for step in steps] == [pytest.approx(0.01 * (1.0 - n / 100)) for n in (1, 2, 3, 4)]
    assert guard.skipped == 1


def test_without_anything_to_skip_a_guard_changes_nothing() -> None:
    plain, guarded = tiny_model(), tiny_model()
    torch.manual_seed(1)
    expected = [step.loss for step in _train(plain, guard=Guard())]
    torch.manual_seed(1)
    assert [step.loss for step in _train(guarded, guard=Guard(skip=True, sigma=50.0, window=2))] == expected
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), guarded.parameters(), strict=True))


def test_it_gives_up_after_so_many_skipped_steps_in_a_row_and_not_before() -> None:
    apart = {2: math.nan, 3: math.inf, 5: math.nan, 6: math.nan}
    guard = Guard(skip=True, limit=3)
    assert len(list(_train(_spoiled(apart), guard=guard))) == 8
    assert guard.skipped == 4
    in_a_row = _train(_spoiled({2: math.nan, 3: math.inf, 4: math.nan}), guard=Guard(skip=True, limit=3))
    seen = []
    with pytest.raises(NonFiniteError, match=r"step 4: .*nan.*3 steps in a row made no update \(skip_limit\)"):
        seen.extend(step.number for step in in_a_row)
    assert seen == [1, 2, 3]


def test_a_spike_is_skipped_and_one_that_is_no_spike_is_not() -> None:
    guard = Guard(sigma=6.0, window=4)
    steps = list(_train(_spoiled({6: 30.0, 7: 1.05}), guard=guard))
    (skipped,) = [step for step in steps if step.skipped is not None]
    assert skipped.number == 6
    assert skipped.skipped is not None and "more than 6 standard deviations above" in skipped.skipped
    early = list(_train(_spoiled({3: 30.0}), guard=Guard(sigma=6.0, window=4)))
    assert all(step.skipped is None for step in early), "before the window is full nothing is a spike"


def test_a_skipped_spike_does_not_count_among_the_last_steps() -> None:
    """Two spikes in a row: beside the first one the second would be none."""
    guard = Guard(sigma=6.0, window=4)
    steps = list(_train(_spoiled({6: 30.0, 7: 30.0}), guard=guard))
    assert [step.number for step in steps if step.skipped is not None] == [6, 7]


def test_bad_numbers_stop_a_run_that_skips_spikes_alone() -> None:
    with pytest.raises(NonFiniteError, match=r"step 3: .*stopped before the update"):
        list(_train(_spoiled({3: math.inf}), guard=Guard(sigma=6.0)))


def test_a_guard_that_was_saved_and_restored_decides_as_the_one_that_went_on() -> None:
    values = [(5.0, 1.0), (4.0, 1.25), (math.nan, 1.0), (4.5, 1.0), (9.0, 1.0), (4.25, 1.0), (4.0, 1.5), (4.0, 1.125)]

    def decide(guard: Guard, loss: float, norm: float) -> tuple[Any, Any]:
        reason = guard.judge(loss, norm)
        return reason, None if reason is None else guard.ending(loss, norm)

    options: dict[str, Any] = {"skip": True, "sigma": 2.0, "window": 3, "limit": 2}
    whole = Guard(**options)
    expected = [decide(whole, *value) for value in values]
    assert sum(reason is not None for reason, _ in expected) >= 3
    for cut in range(len(values)):
        first, second = Guard(**options), Guard(**options)
        decided = [decide(first, *value) for value in values[:cut]]
        second.restore(first.state())
        decided += [decide(second, *value) for value in values[cut:]]
        assert decided == expected and second.state() == whole.state()


def test_a_run_that_stopped_stands_where_the_step_before_left_it() -> None:
    """Weights and generators: what is saved then is what would have been saved after the step before."""
    spoiled, plain = _spoiled({4: math.nan}), _spoiled({})
    for model, last in ((spoiled, 8), (plain, 3)):
        torch.manual_seed(5)
        try:
            list(_train(model, guard=Guard(), last_step=last))
        except NonFiniteError as error:
            assert error.step == 4 and torch.equal(error.batch, next(tiny_batches(4)))
            drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(a, b) for a, b in zip(spoiled.parameters(), plain.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in spoiled.parameters())


# --- where -----------------------------------------------------------------------------------------------------------


def _locate(model: nn.Module, batch: Tensor, micro_batch_size: int = 2) -> FirstNonFinite | None:
    before = [parameter.detach().clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    place = locate(model, batch, micro_batch_size=micro_batch_size, precision=torch.float32, device=CPU)
    for a, b in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), state), "the generators have moved"
    assert all(parameter.grad is None for parameter in model.parameters())
    return place


@pytest.mark.parametrize("variant", ["mha", "mla", "mla_shared_latent"])
def test_the_module_whose_output_is_the_first_bad_one_is_named_with_its_rows(variant: str) -> None:
    model = gpt_from([f"attention={variant}", "model.dropout=0.1"], vocab_size=64).train()
    batch = torch.arange(4 * 9).reshape(4, 9) % 50
    assert _locate(model, batch) is None

    def spoil(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        bad_B = (seen[-1] == batch[3, 0]).any(dim=1)
        return output.masked_fill(bad_B[:, None, None], math.inf)

    seen: list[Tensor] = []
    model.embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.blocks[1].mlp.up_proj.register_forward_hook(spoil)
    assert _locate(model, batch) == FirstNonFinite("the output of blocks.1.mlp.up_proj", [3])


def test_a_parameter_that_is_bad_before_the_step_is_named() -> None:
    model = gpt_from(["attention=mha"], vocab_size=64).train()
    with torch.no_grad():
        model.blocks[1].mlp.up_proj.weight[3, 2] = math.nan
    batch = torch.arange(2 * 9).reshape(2, 9)
    assert _locate(model, batch) == FirstNonFinite("the parameter blocks.1.mlp.up_proj.weight, before the step", [0, 1])


def test_a_bad_loss_after_good_modules_and_a_bad_gradient_after_a_good_loss_are_told_apart() -> None:
    class Overflows(TinyModel):
        def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
            return super().loss(inputs_BT, targets_BT) * 1e38 * 1e38

    class Root(nn.Module):
        """The square root of nought: 0, with an infinite slope."""

        def forward(self, x: Tensor) -> Tensor:
            return x + (x * 0.0).sqrt()

    torch.manual_seed(0)
    batch = next(tiny_batches(1))
    place = _locate(Overflows(), batch, 6)
    assert place == FirstNonFinite("the loss, after modules whose outputs are all finite", [0, 1, 2, 3, 4, 5])
    model = TinyModel()
    model.norm = nn.Sequential(nn.RMSNorm(8), Root())
    assert _locate(model, batch, 6) == FirstNonFinite("the gradient of the output of norm.0", [0, 1, 2, 3, 4, 5])
