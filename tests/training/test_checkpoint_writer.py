"""Checkpoints written beside training: the state at the time of asking, whole; errors come back; the best one stays."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from harness.errors import UserError
from harness.training.checkpoint import best_checkpoint, latest_checkpoint, load_checkpoint, snapshot
from harness.training.checkpoint_writer import CheckpointWriter
from harness.training.optimizer import Optimizer, build_optimizer
from tests.support.tiny_model import optimizer_config, save_checkpoint, tiny_batches, tiny_model


@pytest.fixture
def model() -> nn.Module:
    return tiny_model()


@pytest.fixture
def optimizer(model: nn.Module) -> Optimizer:
    return build_optimizer(model, optimizer_config())


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing stands still until the event is set."""
    go_on, save_file = threading.Event(), safetensors.torch.save_file

    def save(*arguments: Any, **options: Any) -> None:
        assert go_on.wait(30)
        save_file(*arguments, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", save)
    yield go_on
    go_on.set()


def _step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    batch = next(tiny_batches(number))
    model.loss(batch[:, :-1], batch[:, 1:]).backward()  # type: ignore[operator]
    optimizer.step()
    optimizer.zero_grad()


def _saved(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / name)


def test_what_is_written_is_the_state_when_it_was_asked_for_and_not_when_it_is_written(
    tmp_path: Path, model: nn.Module, optimizer: Optimizer, held: threading.Event
) -> None:
    _step(model, optimizer, 1)
    torch.manual_seed(3)
    held.set()
    plain = save_checkpoint(tmp_path / "plain", model=model, optimizer=optimizer, state={"step": 1})
    held.clear()
    writer = CheckpointWriter(tmp_path / "beside", keep=2, background=True)
    writer.save(snapshot(model, optimizer, {"step": 1}))
    for number in (2, 3):
        _step(model, optimizer, number)
        torch.rand(3)
        writer.check()
    assert latest_checkpoint(tmp_path / "beside") is None, "training went on while it was held up"
    held.set()
    writer.wait()
    beside = latest_checkpoint(tmp_path / "beside")
    assert beside is not None
    for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert (beside.path / file).read_bytes() == (plain / file).read_bytes()
    writer.close()


def test_the_next_save_waits_for_the_one_before_and_its_copy_is_not_written_over(
    tmp_path: Path, model: nn.Module, optimizer: Optimizer, held: threading.Event
) -> None:
    writer = CheckpointWriter(tmp_path, keep=3, background=True)
    weights = []
    for number in (1, 2, 3):
        _step(model, optimizer, number)
        weights.append(model.state_dict()["norm.weight"].clone())
        threading.Timer(0.05, held.set).start()
        writer.save(snapshot(model, optimizer, {"step": number}))
    writer.wait()
    writer.close()
    for number, expected in enumerate(weights, start=1):
        assert torch.equal(_saved(tmp_path / f"step-{number:08}")["norm.weight"], expected)


@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_is_full_when_the_files_are_flushed_is_an_error_and_the_older_checkpoint_stays(
    tmp_path: Path, model: nn.Module, optimizer: Optimizer, background: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CheckpointWriter(tmp_path, keep=2, background=background)
    writer.save(snapshot(model, optimizer, {"step": 1}))
    writer.wait()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            writer.save(snapshot(model, optimizer, {"step": 2}))
            writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    writer.save(snapshot(model, optimizer, {"step": 3}))  # there is room again
    writer.wait()
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_what_went_wrong_beside_training_is_raised_once_at_the_next_look(
    tmp_path: Path, model: nn.Module, optimizer: Optimizer
) -> None:
    (tmp_path / "file").write_text("no folder")
    writer = CheckpointWriter(tmp_path / "file", keep=2, background=True)
    writer.save(snapshot(model, optimizer, {"step": 1}))
    with pytest.raises(FileExistsError):
        while True:
            writer.check()
    writer.check()
    writer.close()


def test_the_best_one_is_kept_whatever_comes_after_it_and_is_never_the_newest(
    tmp_path: Path, model: nn.Module, optimizer: Optimizer
) -> None:
    writer = CheckpointWriter(tmp_path, keep=2, background=True)
    for number in range(1, 6):
        _step(model, optimizer, number)
        writer.save(snapshot(model, optimizer, {"step": number}), is_best=number in (1, 2))
    writer.wait()
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step-00000004", "step-00000005"]
    best = best_checkpoint(tmp_path)
    assert best is not None and best.path == tmp_path / "best" and best.state == {"step": 2}
    load_checkpoint(best, model=tiny_model(1), optimizer=None)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and newest.path.name == "step-00000005"
    best.weights.write_bytes(b"half")
    with pytest.raises(UserError, match=r"best is damaged .*take checkpoint=last"):
        best_checkpoint(tmp_path)
    assert best_checkpoint(tmp_path / "absent") is None


def test_a_file_system_without_second_names_gets_a_copy(
    tmp_path: Path, model: nn.Module, optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    writer = CheckpointWriter(tmp_path, keep=1, background=False)
    writer.save(snapshot(model, optimizer, {"step": 1}), is_best=True)
    best = best_checkpoint(tmp_path)
    assert best is not None and best.state == {"step": 1}
