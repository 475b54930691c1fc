"""How long writing a checkpoint stops training: python benchmarks/checkpoint_blocking.py [key=value ...].

  model       gpt2       a config of configs/model     attention   mha     vocab_size  50257
  batch_size  1          sequences a step              length      128     tokens of a sequence
  rounds      5          checkpoints of each kind      steps       4       timed while nothing is written
  device      auto       precision   auto              folder      null    where to write (null: a temporary folder)

Both ways write the same bytes: waiting for them, and beside training (checkpoints.background). `blocked` is the time until
training goes on; a step beside the writing thread may be slower than one alone, so both are shown.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import enter_environment

enter_environment()

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.config.build import build_model
from harness.config.compose import load_train_config
from harness.config.schema import Device, Precision
from harness.entry.cli import parse_options, run_script
from harness.runs.load import pin_execution
from harness.training.checkpoint import snapshot
from harness.training.device import keep_freed_memory, loss_chunk_tokens, select_device, select_precision
from harness.training.loop import train
from harness.training.optimizer import build_optimizer
from harness.training.parallel import OneProcess
from harness.training.step import EagerStep
from harness.training.writer import CheckpointWriter


@dataclass
class BlockingOptions:
    model: str = "gpt2"
    attention: str = "mha"
    vocab_size: int = 50257
    batch_size: int = 1
    length: int = 128
    rounds: int = 5
    steps: int = 4
    device: Device = "auto"
    precision: Precision = "auto"
    folder: str | None = None


def main(arguments: list[str]) -> int:
    options = parse_options(BlockingOptions, arguments)
    config = load_train_config([f"model={options.model}", f"attention={options.attention}"])
    device = select_device(options.device)
    precision = select_precision(options.precision, device)
    keep_freed_memory(device)
    model = build_model(config, options.vocab_size).to(device)
    pin_execution(model, config.attention, device=device, precision=precision)
    model.loss_chunk_tokens = loss_chunk_tokens(device)
    optimizer = build_optimizer(model, config.optimizer)

    def batches() -> Iterator[Tensor]:
        while True:
            yield torch.randint(options.vocab_size, (options.batch_size, options.length + 1), device=device)

    step = EagerStep(
        OneProcess(model),
        optimizer,
        micro_batch_size=options.batch_size,
        grad_clip=1.0,
        precision=precision,
        compile=False,
        device=device,
    )
    steps = train(step, batches(), schedule=lambda step: 1e-3, first_step=1, last_step=10**9)
    next(steps)

    def step_seconds() -> float:
        started = time.perf_counter()
        next(steps)
        return time.perf_counter() - started

    alone = [step_seconds() for _ in range(options.steps)]
    folder = Path(options.folder or tempfile.mkdtemp()) / "checkpoints"
    size = snapshot(model, optimizer, {"step": 0}).size
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.model}, {parameters:,} parameters, {size / 1e9:.2f} GB a checkpoint")
    print(f"{device.type}, torch {torch.__version__}")
    print(f"a step alone                    {shown(alone)}")
    try:
        for background in (False, True):
            writer = CheckpointWriter(folder, keep=2, background=background)
            blocked, whole, beside = [], [], []
            for number in range(1, options.rounds + 2):
                synchronise(device)
                started = time.perf_counter()
                writer.save(snapshot(model, optimizer, {"step": number}))
                stopped = time.perf_counter() - started
                beside_now = []
                while writer.busy:
                    beside_now.append(step_seconds())
                whole_now = time.perf_counter() - started
                writer.wait()
                if number > 1:  # the first one makes the memory that the others use again
                    blocked.append(stopped)
                    whole.append(whole_now)
                    beside += beside_now[:-1]  # the last one may have outlasted the writing
            writer.close()
            name = "beside training" if background else "waiting for it"
            print(f"{name:<15} blocked         {shown(blocked)}")
            if background:
                print(f"                until on disk   {shown(whole)}")
                if beside:
                    print(f"                a step meanwhile {shown(beside)[1:]}")
    finally:
        shutil.rmtree(folder if options.folder else folder.parent)
    return 0


def shown(seconds: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(seconds):8.3f} s  ({min(seconds):.3f} to {max(seconds):.3f})"


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    run_script(main, description=__doc__)
