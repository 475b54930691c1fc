"""What a captured step promises: the same training as the eager one, the same refusals, and a fallback that says why."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from harness.errors import UserError
from harness.training.loop import Step, train
from harness.training.nonfinite import Guard, NonFiniteError
from harness.training.optimizer import build_optimizer, choose_recipe
from harness.training.parallel import OneProcess
from harness.training.step import WARM_UP, CapturedStep, EagerStep, select_capture
from modeling.cuda_graphs import Graph
from tests.support.graphs import Again
from tests.support.tiny_model import TinyModel, optimizer_config, tiny_batches, tiny_model

CPU = torch.device("cpu")


def _step(kind: type[EagerStep], model: TinyModel, **more: Callable[[Callable[[], None]], Graph]) -> EagerStep:
    return kind(
        OneProcess(model),
        build_optimizer(model, optimizer_config()),
        micro_batch_size=4,
        grad_clip=1.0,
        precision=torch.float32,
        compile=False,
        device=CPU,
        **more,
    )


def _losses(step: EagerStep, steps: int, *, skipped: tuple[int, ...] = ()) -> list[tuple[float, float]]:
    figures = []
    for number, batch in enumerate(itertools.islice(tiny_batches(1), steps), start=1):
        step.start(batch)
        figures.append(step.read())
        if number not in skipped:
            step.update()
        step.end()
    return figures


@pytest.mark.parametrize("skipped", [(), (2, 5)])
def test_a_captured_step_trains_as_the_eager_one(skipped: tuple[int, ...]) -> None:
    """Replays take each step's own batch, and a step without an update leaves no gradient behind."""
    graphs: list[Again] = []

    def capture(launch: Callable[[], None]) -> Again:
        graphs.append(Again(launch))
        return graphs[-1]

    eager, captured = tiny_model(dropout=0.0), tiny_model(dropout=0.0)
    step = _step(CapturedStep, captured, capture=capture)
    assert _losses(step, 8, skipped=skipped) == _losses(_step(EagerStep, eager), 8, skipped=skipped)
    assert step.is_captured and step.remark is None
    # Eager while it warms up; the update is a graph of its own, not replayed where a step is skipped.
    assert [graph.replays for graph in graphs] == [8 - WARM_UP, 8 - WARM_UP - sum(n > WARM_UP for n in skipped)]
    assert all(torch.equal(a, b) for a, b in zip(eager.parameters(), captured.parameters(), strict=True))


def test_what_cannot_be_captured_runs_eagerly_and_says_why_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(launch: Callable[[], None]) -> Graph:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(
        "harness.training.step.CudaGraphs", lambda device: type("Graphs", (), {"capture": staticmethod(refuse)})
    )
    eager, captured = tiny_model(dropout=0.0), tiny_model(dropout=0.0)
    steps = list(_train(captured, capture=True))
    assert [step.loss for step in steps] == [step.loss for step in _train(eager, capture=False)]
    assert not any(step.captured for step in steps)
    remark = "the step is not captured, it runs eagerly: operation not permitted when stream is capturing"
    assert [step.remark for step in steps] == [None] * WARM_UP + [remark] + [None] * (len(steps) - WARM_UP - 1)


def _train(model: nn.Module, *, capture: bool, device: torch.device = CPU, **more: object) -> Iterator[Step]:
    batches = (batch.to(device) for batch in tiny_batches(1))
    step = (CapturedStep if capture else EagerStep)(
        OneProcess(model),  # type: ignore[arg-type]
        build_optimizer(model, optimizer_config(), capturable=device.type == "cuda"),
        micro_batch_size=4,
        grad_clip=1.0,
        precision=torch.float32,
        compile=False,
        device=device,
    )
    return train(step, batches, schedule=lambda step: 1 / step, first_step=1, last_step=8, **more)


def test_capture_is_chosen_where_nothing_forbids_it() -> None:
    adamw, muon = (choose_recipe(optimizer_config(name)).can_be_captured for name in ("adamw", "muon"))
    cuda = torch.device("cuda")
    assert select_capture("auto", cuda, processes=1, update_can_be=adamw)
    assert select_capture("on", cuda, processes=1, update_can_be=adamw)
    assert not select_capture("off", cuda, processes=1, update_can_be=adamw)
    hindered = [(CPU, 1, adamw, "cpu"), (cuda, 2, adamw, "2 processes"), (cuda, 1, muon, "optimizer")]
    for device, processes, update, why in hindered:
        assert not select_capture("auto", device, processes=processes, update_can_be=update)
        with pytest.raises(UserError, match=f"capture=on .*{why}.*capture=auto"):
            select_capture("on", device, processes=processes, update_can_be=update)


def test_rates_that_lie_on_the_device_are_those_of_the_schedule() -> None:
    """A checkpoint's settings name the peak as it was configured, not as float32 rounds it."""
    optimizer = build_optimizer(tiny_model(), optimizer_config(), capturable=True)
    assert isinstance(optimizer._parts[0].param_groups[0]["lr"], Tensor)
    assert optimizer.set_lr(0.5) == 0.005
    assert [group["lr"].item() for group in optimizer._parts[0].param_groups] == [pytest.approx(0.005)] * 2
    assert {group["peak_lr"] for group in optimizer.settings()} == {0.01}
    assert not isinstance(build_optimizer(tiny_model(), optimizer_config())._parts[0].param_groups[0]["lr"], Tensor)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_captured_and_eager_training_are_the_same_bit_for_bit(dropout: float) -> None:
    cuda, runs = torch.device("cuda"), []
    torch.use_deterministic_algorithms(True)
    try:
        for capture in (False, True):
            model = tiny_model(dropout=dropout).to(cuda)
            torch.manual_seed(1)
            steps = list(_train(model, capture=capture, device=cuda))
            assert steps[-1].captured is capture
            runs.append(([(s.loss, s.grad_norm, s.lr) for s in steps], [p.detach().cpu() for p in model.parameters()]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


class _ReadsBack(TinyModel):
    """Reads a value to the host in its forward pass, which a graph cannot hold."""

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        loss = super().loss(inputs_BT, targets_BT)
        return loss * (1.0 if math.isfinite(loss.item()) else 2.0)


@pytest.mark.gpu
def test_a_model_that_reads_back_trains_eagerly_on_a_gpu() -> None:
    cuda, losses = torch.device("cuda"), []
    for model, capture in ((tiny_model(dropout=0.1), False), (_ReadsBack(dropout=0.1), True)):
        model.load_state_dict(tiny_model(dropout=0.1).state_dict())
        torch.manual_seed(1)
        steps = list(_train(model.to(cuda), capture=capture, device=cuda))
        losses.append([step.loss for step in steps])
    assert losses[0] == losses[1] and not steps[-1].captured
    assert [step.remark is not None for step in steps] == [False] * WARM_UP + [True] + [False] * (7 - WARM_UP)


class _SpoiledAt(TinyModel):
    """A buffer that a test sets decides on the device whether the loss is a number."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.register_buffer("factor", torch.ones(()))

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return super().loss(inputs_BT, targets_BT) * self.factor


@pytest.mark.gpu
@pytest.mark.parametrize("skip", [False, True])
def test_no_bad_number_of_a_replayed_step_reaches_the_weights(skip: bool) -> None:
    cuda = torch.device("cuda")
    model = _SpoiledAt().to(cuda)
    steps = _train(model, capture=True, device=cuda, guard=Guard(skip=skip))
    for step in itertools.islice(steps, WARM_UP + 2):
        assert math.isfinite(step.loss)
    model.get_buffer("factor").fill_(math.nan)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    if skip:
        assert next(steps).skipped is not None
    else:
        with pytest.raises(NonFiniteError, match=f"step {WARM_UP + 3}: "):
            next(steps)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    if skip:
        model.get_buffer("factor").fill_(1.0)
        assert math.isfinite(next(steps).loss) and math.isfinite(next(steps).loss)
        assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
