"""Several processes, as far as one can see them: decisions, refusals, what shares weights. Real ones: tests/entry."""

from __future__ import annotations

import copy
import dataclasses
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from harness.config.build import build_model
from harness.config.compose import load_train_config
from harness.config.schema import ParallelConfig
from harness.errors import UserError
from harness.training.parallel import (
    RESTART_PATIENCE,
    TORCHRUN,
    OneProcess,
    Workers,
    check_parallel,
    compile_parts,
    gathered,
    open_workers,
    sharded_like,
    share_model,
    sharing_groups,
)
from tests.support.tiny_model import optimizer_config, tiny_model


def workers(rank: int = 0, world_size: int = 2) -> Workers:
    return Workers(rank, world_size, torch.device("cpu"), 0, None)


def test_without_torchrun_a_process_is_alone_and_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    with open_workers("cpu") as alone:
        assert (alone.rank, alone.world_size, alone.is_first, alone.patience) == (0, 1, True, 0.0)
        assert alone.first(lambda: "done") == "done"
        assert alone.any(True) and not alone.any(False)
        assert type(share_model(tiny_model(), alone, ParallelConfig())) is OneProcess  # type: ignore[arg-type]


def test_one_process_that_torchrun_restarted_waits_for_the_lock_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {name: "0" for name in TORCHRUN} | {"WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "2"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with open_workers("cpu") as alone:
        assert (alone.world_size, alone.restarts, alone.patience) == (1, 2, RESTART_PATIENCE)


def refused(
    *,
    world_size: int = 2,
    batch_size: int = 8,
    precision: torch.dtype = torch.float32,
    optimizer: str = "adamw",
    overwrite: bool = False,
    may_restart: bool = False,
    **fields: object,
) -> None:
    config: Any = SimpleNamespace(
        parallel=dataclasses.replace(ParallelConfig(), **fields),
        optimizer=optimizer_config(optimizer),
        batch_size=batch_size,
        overwrite=overwrite,
    )
    check_parallel(config, dataclasses.replace(workers(world_size=world_size), may_restart=may_restart), precision)


def test_what_several_processes_cannot_train_is_refused_and_one_process_trains_it() -> None:
    refused(name="ddp", optimizer="muon")
    refused(name="fsdp", mixed_precision=True, precision=torch.bfloat16)
    mistakes: list[tuple[str, dict]] = [
        ("batch_size=7 cannot be shared by 2 processes: make it a multiple", {"batch_size": 7}),
        ("optimizer=muon .* set parallel=ddp or optimizer=adamw", {"name": "fsdp", "optimizer": "muon"}),
        ("parallel.mixed_precision=true .* set precision=bfloat16", {"name": "fsdp", "mixed_precision": True}),
    ]
    for sentence, mistake in mistakes:
        with pytest.raises(UserError, match=sentence):
            refused(**mistake)
        refused(world_size=1, **mistake)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_restart_would_overwrite_what_it_is_there_to_keep_so_the_two_are_refused_together(world_size: int) -> None:
    refused(world_size=world_size, overwrite=True)
    refused(world_size=world_size, may_restart=True)
    with pytest.raises(UserError, match=r"overwrite=true would delete, at each restart, .* leave one of the two out"):
        refused(world_size=world_size, overwrite=True, may_restart=True)


def test_generators_of_the_processes_differ_and_are_a_function_of_seed_step_and_rank() -> None:
    def drawn(rank: int, step: int) -> tuple[float, float]:
        torch.manual_seed(0)
        random.seed(0)
        workers(rank).seed_apart(seed=0, step=step)
        return torch.rand(()).item(), random.random()

    assert drawn(1, 5) == drawn(1, 5)
    assert len({drawn(rank, step) for rank in (0, 1, 2) for step in (5, 6)}) == 1 + 4  # the first keeps what it has


def test_blocks_that_share_weights_stand_together() -> None:
    one, two, three, four = (nn.ModuleList([nn.Linear(2, 2)]) for _ in range(4))
    three.append(two[0])
    assert sharing_groups([one, two, three, four]) == [[one], [two, three], [four]]
    assert sharing_groups([one]) == [[one]]


def test_whole_tensors_are_left_as_they_are() -> None:
    tensor = torch.ones(3)
    assert gathered({"a": tensor}, keep=True)["a"] is tensor
    assert gathered({"a": tensor}, keep=False) == {}
    assert sharded_like(tensor, torch.zeros(3)) is tensor


@pytest.mark.slow
def test_compiled_parts_compute_the_same_and_evaluation_is_not_compiled() -> None:
    from torch._dynamo.utils import counters

    config = load_train_config(
        [
            "dataset=stdlib",
            "attention=mla",
            "model.d_model=32",
            "model.n_layers=3",
            "model.n_heads=2",
            "model.head_dim=16",
            "model.mlp_hidden=64",
        ]
    )
    torch.manual_seed(0)
    plain = build_model(config, vocab_size=50)
    compiled = copy.deepcopy(plain)
    compile_parts(compiled)
    tokens_BT = torch.randint(50, (2, 17))
    counters.clear()
    compiled.eval().loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
    assert counters["stats"]["unique_graphs"] == 0
    losses = [model.train().loss(tokens_BT[:, :-1], tokens_BT[:, 1:]) for model in (plain, compiled)]
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]  # one for all blocks, one for the head
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for expected, parameter in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, atol=1e-5, rtol=1e-3)
