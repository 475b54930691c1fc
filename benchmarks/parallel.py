"""Training speed by the number of processes and how they share the model: python benchmarks/parallel.py [key=value ...].

Each line of the table is one torchrun of this file. The global batch at every step is the same, so the loss after the last
step is too, up to rounding. Tokens are random: speed does not depend on them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import enter_environment

enter_environment()

import itertools
import json
import os
import socket
import statistics
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from benchmarks.measuring import ModelOptions, endless_steps, leave_record, seconds_of
from harness.config.build import build_model
from harness.config.compose import load_train_config
from harness.config.schema import ParallelConfig, Switch
from harness.decode.speed import machine_name
from harness.entry.cli import parse_options, run_script, whole_numbers
from harness.errors import UserError
from harness.runs.load import pin_execution
from harness.training import device as hardware
from harness.training.loop import Step
from harness.training.optimizer import build_optimizer
from harness.training.parallel import Workers, open_workers, share_model
from harness.training.step import EagerStep
from modeling.flops import training_flops_per_token

ENGINES = {
    "ddp": ParallelConfig(name="ddp"),
    "fsdp": ParallelConfig(name="fsdp"),
    "fsdp_mixed": ParallelConfig(name="fsdp", mixed_precision=True),
}
FIGURES = "PARALLEL_BENCHMARK_FIGURES"  # where a process that torchrun started leaves its figures


@dataclass
class ParallelOptions(ModelOptions):
    model: Annotated[str, "a config of configs/model: gpt2 on GPUs, tiny on a CPU"] = "gpt2"
    processes: Annotated[str, "numbers of processes on this machine, separated by commas: one GPU each"] = "1,2"
    engines: Annotated[str, "of several processes; fsdp_mixed gathers the blocks in bfloat16"] = "ddp,fsdp,fsdp_mixed"
    batch_size: Annotated[int, "sequences per optimizer step, over all processes"] = 128
    micro_batch_size: Annotated[int | None, "null: automatic"] = None
    steps: Annotated[int, "timed in each round"] = 20
    rounds: int = 3
    checkpointing: Annotated[bool, "activation checkpointing"] = False
    compile: Annotated[Switch, "auto, on or off"] = "auto"
    out: Annotated[str | None, "a JSON file for the figures"] = None


def measure_rates(options: ParallelOptions, workers: Workers) -> dict[str, Any]:
    """Tokens per second of these processes together: median and range over the rounds."""
    device, world_size = workers.device, workers.world_size
    hardware.keep_freed_memory(device)
    precision = hardware.select_precision(options.precision, device)
    config = load_train_config(
        [
            f"model={options.model}",
            f"attention={options.attention}",
            f"model.activation_checkpointing={str(options.checkpointing).lower()}",
        ]
    )
    length, share = config.model.max_seq_len, options.batch_size // world_size
    hardware.seed_everything(0)
    model = build_model(config, options.vocab_size).to(device)
    flops = training_flops_per_token(model, length)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    micro = options.micro_batch_size or hardware.auto_micro_batch_size(
        share, config.model, vocab_size=options.vocab_size, parameters=parameters, precision=precision, device=device
    )
    kernel = pin_execution(model, config.attention, device=device, precision=precision)
    model.loss_chunk_tokens = hardware.loss_chunk_tokens(device)
    engine = share_model(model, workers, ENGINES[options.engines])
    hardware.reset_peak_memory(device)
    step = EagerStep(
        engine,
        build_optimizer(model, config.optimizer),
        micro_batch_size=micro,
        grad_clip=1.0,
        precision=precision,
        compile=hardware.select_compile(options.compile, device),
        device=device,
    )
    steps = endless_steps(step, itertools.cycle(batches(options, length, workers)))
    made: list[Step] = []
    first = seconds_of(lambda: made.append(next(steps)), 5, device)  # compilation, allocator, caches
    tokens = options.steps * options.batch_size * length
    rates = [tokens / seconds_of(lambda: made.append(next(steps)), options.steps, device) for _ in range(options.rounds)]
    peak = hardware.peak_flops(device, precision)
    rate = statistics.median(rates)
    return {
        "processes": world_size,
        "engine": options.engines if world_size > 1 else "-",
        "tokens_per_second": rate,
        "low": min(rates),
        "high": max(rates),
        "mfu": rate * flops / (peak * world_size) if peak else None,
        "peak_memory_bytes": hardware.peak_memory_bytes(device),
        "loss": made[-1].loss,
        "steps": made[-1].number,
        "micro_batch_size": micro,
        "seconds_to_fifth_step": first,
        "parameters": parameters,
        "kernel": kernel,
        "precision": str(precision).removeprefix("torch."),
        "torch": torch.__version__,
        "device": machine_name(device),
    }


def batches(options: ParallelOptions, length: int, workers: Workers) -> list[Tensor]:
    """This process's share of four batches of random tokens, the same for any number of processes."""
    generator, share = torch.Generator().manual_seed(0), options.batch_size // workers.world_size
    whole = [torch.randint(options.vocab_size, (options.batch_size, length + 1), generator=generator) for _ in range(4)]
    return [batch[workers.rank * share :][:share].to(workers.device) for batch in whole]


def run_torchrun(options: ParallelOptions, processes: int, engine: str) -> dict[str, Any] | None:
    """The figures of one torchrun of this file, None if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        arguments = [
            f"{key}={'null' if value is None else value}"
            for key, value in asdict(options).items()
            if key not in ("processes", "engines", "out")
        ]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        line = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={processes}",
            "--master-addr=127.0.0.1",
            f"--master-port={port}",
            __file__,
        ]
        environ = {**os.environ, FIGURES: str(figures)}
        status = subprocess.run([*line, *arguments, f"engines={engine}"], env=environ).returncode
        if status:
            print(f"{processes} processes, {engine}: failed with status {status}", file=sys.stderr)
            return None
        measured: dict[str, Any] = json.loads(figures.read_text())
    return measured


def main(arguments: list[str]) -> int:
    options = parse_options(ParallelOptions, arguments)
    for engine in options.engines.split(","):
        if engine not in ENGINES:
            raise UserError(f"engines={engine} is unknown; choose from {', '.join(ENGINES)}")
    if FIGURES in os.environ:
        with open_workers(options.device) as workers:
            measured = measure_rates(options, workers)
            if workers.is_first:
                Path(os.environ[FIGURES]).write_text(json.dumps(measured))
        return 0

    measured_all: list[dict[str, Any]] = []
    status = 0
    print(f"{'processes':<10}{'engine':<12}{'tokens/s':>12}{'range':>22}{'times one':>11}{'MFU':>8}{'GiB':>7}{'loss':>9}")
    for processes in whole_numbers("processes", options.processes):
        for engine in options.engines.split(",") if processes > 1 else ["ddp"]:
            figures = run_torchrun(options, processes, engine)
            if figures is None:
                status = 1
                continue
            measured_all.append(figures)
            print(row(figures, measured_all[0]), flush=True)
    if not measured_all:
        return status
    first = measured_all[0]
    print(
        f"\n{options.model}, {options.attention}, {first['parameters']:,} parameters, {options.batch_size} sequences a "
        f"step, {first['precision']}, {first['kernel']}, torch {first['torch']}, {first['device']}"
    )
    leave_record({"options": asdict(options), "figures": measured_all}, options.out)
    return status


def row(each: dict[str, Any], first: dict[str, Any]) -> str:
    """One line of the table."""
    between = f"{each['low']:,.0f}-{each['high']:,.0f}"
    times = each["tokens_per_second"] / first["tokens_per_second"]
    mfu = f"{each['mfu']:.1%}" if each["mfu"] else "-"
    return (
        f"{each['processes']:<10}{each['engine']:<12}{each['tokens_per_second']:>12,.0f}{between:>22}{times:>11.2f}"
        f"{mfu:>8}{each['peak_memory_bytes'] / 2**30:>7.1f}{each['loss']:>9.4f}"
    )


if __name__ == "__main__":
    run_script(main, description=__doc__, options=ParallelOptions)
