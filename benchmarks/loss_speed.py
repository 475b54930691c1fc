"""What the loss of a linear head costs, forward and backward, beside torch's:

    python benchmarks/loss_speed.py [key=value ...]

Forms: all logits at once, as one writes it (linear, then cross_entropy); ours in pieces (modeling/loss.py); and
torch.nn.functional.linear_cross_entropy, where torch has it (2.13), in pieces: torch.compile leaves it eager, and autocast
leaves it in the dtype of its inputs. Memory is the most above what inputs and gradients take. `error`: the largest
difference of a gradient from that of all logits in float32, over its largest entry.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import enter_environment

enter_environment()

import functools
import resource
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring import leave_record, seconds_of
from harness.config.schema import Device, Precision
from harness.decode.speed import machine_name
from harness.entry.cli import parse_options, run_script
from harness.training import device as hardware
from modeling.compiling import compile_each
from modeling.loss import mean_nats

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class LossSpeedOptions:
    tokens: Annotated[int, "in one piece of a batch"] = 4096
    d_model: int = 768
    vocab_size: Annotated[int, "columns of the head; 50304 are gpt2's, padded"] = 50304
    device: Annotated[Device, "auto, cpu, cuda or mps"] = "auto"
    precision: Annotated[Precision, "auto, float32 or bfloat16"] = "auto"
    steps: Annotated[int, "timed in each round"] = 3
    rounds: Annotated[int, "in each the forms take turns"] = 5
    out: Annotated[str | None, "a JSON file for the figures"] = None


def main(arguments: list[str]) -> int:
    options = parse_options(LossSpeedOptions, arguments)
    device = hardware.select_device(options.device)
    precision = hardware.select_precision(options.precision, device)
    torch.manual_seed(0)
    x_ND = torch.randn(options.tokens, options.d_model, device=device).requires_grad_()
    weight_CD = torch.nn.Parameter(0.02 * torch.randn(options.vocab_size, options.d_model, device=device))
    targets_N = torch.randint(options.vocab_size, (options.tokens,), device=device)
    inputs = x_ND, weight_CD, targets_N

    def step(loss_of: Loss, dtype: torch.dtype = precision) -> None:
        x_ND.grad = weight_CD.grad = None
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = loss_of(*inputs)
        loss.backward()

    def gradients() -> list[Tensor]:
        assert x_ND.grad is not None and weight_CD.grad is not None
        return [x_ND.grad.clone(), weight_CD.grad.clone()]

    forms = forms_of(options.vocab_size, device)
    step(forms["all logits"], torch.float32)
    exact = gradients()
    figures: dict[str, dict[str, float]] = {}
    for name, loss_of in forms.items():
        step(loss_of)  # compiles
        error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(gradients(), exact, strict=True))
        hardware.reset_peak_memory(device)
        before = memory_now(device)
        step(loss_of)
        figures[name] = {"bytes": hardware.peak_memory_bytes(device) - before, "error": error}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(options.rounds):
        for name, loss_of in forms.items():
            one_step = functools.partial(step, loss_of)
            seconds[name].append(seconds_of(one_step, options.steps, device) / options.steps)

    print(
        f"{options.tokens} tokens, d_model {options.d_model}, {options.vocab_size} columns, {precision}, "
        f"torch {torch.__version__}, {machine_name(device)}"
    )
    print(f"{'':<32}{'ms':>10}{'range':>20}{'of all logits':>15}{'MiB':>10}{'error':>10}")
    for name, each in seconds.items():
        mine = figures[name]
        mine["seconds"] = statistics.median(each)
        ratio = statistics.median(a / b for a, b in zip(each, seconds["all logits"], strict=True))
        print(
            f"{name:<32}{1e3 * mine['seconds']:>10,.2f}{f'{1e3 * min(each):,.2f}-{1e3 * max(each):,.2f}':>20}{ratio:>15.3f}"
            f"{mine['bytes'] / 2**20:>10,.0f}{mine['error']:>10.1e}"
        )
    leave_record({"options": vars(options), "device": machine_name(device), "figures": figures}, options.out)
    return 0


def forms_of(vocab_size: int, device: torch.device) -> dict[str, Loss]:
    """Each way to the same number: loss_of(x_ND, weight_CD, targets_N)."""
    chunk = hardware.loss_chunk_tokens(device)

    def all_logits(x_ND: Tensor, weight_CD: Tensor, targets_N: Tensor) -> Tensor:
        return mean_nats(x_ND, weight_CD, targets_N, vocab_size=vocab_size, chunk_tokens=None)

    def ours(x_ND: Tensor, weight_CD: Tensor, targets_N: Tensor) -> Tensor:
        return mean_nats(x_ND, weight_CD, targets_N, vocab_size=vocab_size, chunk_tokens=chunk)

    forms: dict[str, Loss] = {"all logits": all_logits, f"ours, {chunk} tokens a piece": ours}
    if hasattr(F, "linear_cross_entropy"):
        chosen = torch.nn.LinearCrossEntropyOptions()
        as_ours = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
        forms["torch's, its own pieces"] = functools.partial(F.linear_cross_entropy, options=chosen)
        forms[f"torch's, {chunk} tokens a piece"] = functools.partial(F.linear_cross_entropy, options=as_ours)
    if device.type == "cuda":
        forms |= {f"{name}, compiled": compile_each(form) for name, form in (*forms.items(),)[:2]}
    return forms


def memory_now(device: torch.device) -> int:
    """What peak_memory_bytes says while nothing is computed."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    return resident * resource.getpagesize()


if __name__ == "__main__":
    run_script(main, description=__doc__, options=LossSpeedOptions)
