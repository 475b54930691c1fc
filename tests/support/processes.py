"""Runs of several processes: each starts this file, which trains one run after another in the same processes.

python tests/support/processes.py REQUEST.json ANSWERS.json, as under torchrun; the request is a list of
{"overrides": [...], "until": step or null}: a run with `until` is interrupted after that step. An "engine" in place of
overrides asks for what the engine of that name does with the gradients of a micro-batch.
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import pytest
import torch
from torch import Tensor

import train_model
from harness.config.build import build_model
from harness.config.compose import load_train_config
from harness.config.schema import ParallelConfig
from harness.runs import session
from harness.training.parallel import Workers, is_sharded, open_workers, share_model
from tests.support.forks import Forks


class Interrupted(BaseException):
    """As by a person's Ctrl-C."""


def torchrun(processes: int, script: Path, *arguments: str, options: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A command started in so many processes; its output is that of all of them."""
    line = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", *options]
    return subprocess.run(
        [*line, str(script), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def train_in(processes: int, folder: Path, requests: list[dict[str, Any]], forks: Forks) -> list[Any]:
    """Fulfil the requests in so many processes; one answer each."""
    request, answers = folder / f"request-{processes}.json", folder / f"answers-{processes}.json"
    request.write_text(json.dumps(requests))
    ended = forks.run(Path(__file__), str(request), str(answers), processes=processes)
    assert not any(ended.statuses), ended.errors
    result: list[Any] = json.loads(answers.read_text())
    return result


def train_until(overrides: list[str], until: int | None, workers: Workers) -> None:
    """Train a run, and interrupt it after a step if `until` names one."""
    with pytest.MonkeyPatch.context() as patched:
        loop = session.train

        def interrupted(*arguments: Any, **options: Any) -> Iterator[Any]:
            for step in loop(*arguments, **options):
                yield step
                if step.number == until:
                    raise Interrupted

        patched.setattr(session, "train", interrupted)
        try:
            train_model.train_run(load_train_config(overrides), workers, overrides)
        except Interrupted:
            assert until is not None


def micro_batch_gradients(name: str, workers: Workers) -> dict[str, bool]:
    """Whether gradients agree over the processes after the first and after the last of two micro-batches."""
    torch.manual_seed(0)
    config = load_train_config(
        [
            "dataset=stdlib",
            "model.d_model=32",
            "model.n_layers=1",
            "model.n_heads=2",
            "model.head_dim=16",
            "model.mlp_hidden=64",
            "model.max_seq_len=8",
        ]
    )
    model = build_model(config, vocab_size=16)
    engine = share_model(model, workers, ParallelConfig(name=name))
    assert engine is not None
    loss_of, parameter = engine.loss_of(False), next(model.parameters())
    seen = {}
    for last in (False, True):
        tokens_BT = torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(2 * workers.rank + last))
        with engine.micro_batch(last):
            loss_of(tokens_BT[:, :-1], tokens_BT[:, 1:]).backward()
        seen["last" if last else "first"] = _agrees(parameter.grad, workers)
    return seen


def _agrees(gradient: Tensor | None, workers: Workers) -> bool:
    if gradient is None:  # FSDP keeps it aside until it has been averaged
        return False
    whole = gradient.full_tensor() if is_sharded(gradient) else gradient
    own = whole.detach().double().numpy()
    mean = workers.total(own) / workers.world_size
    return bool(abs(mean - own).max() < 1e-9)


def main(request: Path, answers: Path) -> None:
    told: list[Any] = []
    with open_workers("cpu") as workers:
        assert workers.any(workers.rank == workers.world_size - 1) and not workers.any(False)
        for asked in json.loads(request.read_text()):
            if "engine" in asked:
                told.append(micro_batch_gradients(asked["engine"], workers))
            else:
                told.append(train_until(asked["overrides"], asked.get("until"), workers))
        if workers.is_first:
            answers.write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
