"""What the benchmarks share: options, optimizer steps without an end, their clock and their record.

No command, as the others of this folder are: python benchmarks/train_speed.py, loss_speed.py and so on.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import enter_environment

enter_environment()

import functools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from harness.config.schema import Device, Precision
from harness.decode.speed import synchronise
from harness.entry.cli import run_script
from harness.errors import UserError
from harness.runs.provenance import commit
from harness.training.loop import train


@dataclass
class ModelOptions:
    """Which model is measured, and where."""

    model: Annotated[str, "a config of configs/model"] = "gpt2"
    attention: Annotated[str, "a variant"] = "mha"
    vocab_size: int = 50257
    device: Annotated[Device, "auto, cpu, cuda or mps"] = "auto"
    precision: Annotated[Precision, "auto, float32 or bfloat16"] = "auto"


# The harness's loop as train_model.py runs it, at the optimizer's own rates.
endless_steps = functools.partial(train, schedule=lambda step: 1.0, first_step=1, last_step=10**9)


def seconds_of(step: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds that so many steps take, the device's work included."""
    synchronise(device)
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronise(device)
    return time.perf_counter() - started


def leave_record(record: Mapping[str, Any], out: str | None) -> None:
    """One JSON line with the commit, printed, and kept in a file where one is asked for."""
    line = json.dumps({**record, "commit": commit()})
    if out is not None:
        Path(out).write_text(line + "\n", encoding="utf-8")
    print(line)


def main(arguments: list[str]) -> int:
    raise UserError("benchmarks/measuring.py measures nothing: start one of those that it serves, see --help")


if __name__ == "__main__":
    run_script(main, description=__doc__)
