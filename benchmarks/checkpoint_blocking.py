"""How long writing a checkpoint stops training: python benchmarks/checkpoint_blocking.py [key=value ...].

Both ways write the same bytes: waiting for them, and beside training (checkpoints.background). `blocked` is the time until
training goes on; a step beside the writing thread may be slower than one alone, so both are shown.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import enter_environment

enter_environment()

import functools
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch

from benchmarks.measuring import ModelOptions, endless_steps
from harness.config.build import build_model
from harness.config.compose import load_train_config
from harness.decode.speed import machine_name, synchronise
from harness.entry.cli import parse_options, run_script
from harness.runs.load import pin_execution
from harness.training.checkpoint import Snapshot, snapshot
from harness.training.checkpoint_writer import CheckpointWriter
from harness.training.device import keep_freed_memory, loss_chunk_tokens, select_device, select_precision
from harness.training.optimizer import build_optimizer
from harness.training.parallel import OneProcess
from harness.training.step import EagerStep


@dataclass
class BlockingOptions(ModelOptions):
    batch_size: Annotated[int, "sequences a step"] = 1
    length: Annotated[int, "tokens of a sequence"] = 128
    rounds: Annotated[int, "checkpoints of each kind"] = 5
    steps: Annotated[int, "timed while nothing is written"] = 4
    folder: Annotated[str | None, "where to write; null: a temporary folder"] = None


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
    shape = (options.batch_size, options.length + 1)
    step = EagerStep(
        OneProcess(model),
        optimizer,
        micro_batch_size=options.batch_size,
        grad_clip=1.0,
        precision=precision,
        compile=False,
        device=device,
    )
    steps = endless_steps(step, (torch.randint(options.vocab_size, shape, device=device) for _ in itertools.count()))
    next(steps)

    def step_seconds() -> float:
        started = time.perf_counter()
        next(steps)
        return time.perf_counter() - started

    alone = [step_seconds() for _ in range(options.steps)]
    take = functools.partial(snapshot, model, optimizer)
    folder = Path(options.folder or tempfile.mkdtemp()) / "checkpoints"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.model}, {parameters:,} parameters, {take({'step': 0}).size / 1e9:.2f} GB a checkpoint")
    print(f"{machine_name(device)}, torch {torch.__version__}")
    print(f"a step alone                    {median_and_range(alone)}")
    try:
        for background in (False, True):
            writer = CheckpointWriter(folder, keep=2, background=background)
            # The first one makes the memory that the others use again.
            saved = [timed_save(writer, take, number, step_seconds, device) for number in range(options.rounds + 1)][1:]
            writer.close()
            name = "beside training" if background else "waiting for it"
            print(f"{name:<15} blocked         {median_and_range([each.blocked for each in saved])}")
            if background:
                print(f"                until on disk   {median_and_range([each.whole for each in saved])}")
                if beside := [seconds for each in saved for seconds in each.beside]:
                    print(f"                a step meanwhile {median_and_range(beside)[1:]}")
    finally:
        shutil.rmtree(folder if options.folder else folder.parent)
    return 0


@dataclass(frozen=True)
class Saved:
    """Seconds of one checkpoint: until training goes on, until it is on disk, and those of the steps meanwhile."""

    blocked: float
    whole: float
    beside: list[float]


def timed_save(
    writer: CheckpointWriter,
    take: Callable[[dict[str, int]], Snapshot],
    number: int,
    step_seconds: Callable[[], float],
    device: torch.device,
) -> Saved:
    """Write a checkpoint of step `number`, and train while that goes on."""
    synchronise(device)
    started = time.perf_counter()
    writer.save(take({"step": number}))
    blocked, beside = time.perf_counter() - started, []
    while writer.busy:
        beside.append(step_seconds())
    whole = time.perf_counter() - started
    writer.wait()
    return Saved(blocked, whole, beside[:-1])  # the last step may have outlasted the writing


def median_and_range(seconds: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(seconds):8.3f} s  ({min(seconds):.3f} to {max(seconds):.3f})"


if __name__ == "__main__":
    run_script(main, description=__doc__, options=BlockingOptions)
