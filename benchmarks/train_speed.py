"""Training speed of every variant against a plain GPT in the same run: python benchmarks/train_speed.py [key=value ...].

The plain GPT (class PlainGPT) is the same block with the same parameter count, written with torch's own modules and
trained by the shortest loop there is: same batches, optimizer, precision, compilation and allocator settings. Tokens are
random: speed does not depend on them. Figures are medians over rounds with the range. Any other key=value is an override of
every variant's configuration (attention.fused_down_projections=true, model.d_model=384, ...).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import enter_environment

enter_environment()

import gc
import importlib.util
import itertools
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.measuring import ModelOptions, endless_steps, leave_record, seconds_of
from harness.config.build import build_model
from harness.config.compose import load_train_config, options_of
from harness.config.schema import Switch, TrainConfig
from harness.decode.speed import machine_name
from harness.entry.cli import options_and_overrides, run_script
from harness.errors import UserError
from harness.runs.load import pin_execution
from harness.training import device as hardware
from harness.training.optimizer import build_optimizer, choose_recipe
from harness.training.parallel import OneProcess
from harness.training.step import CapturedStep, EagerStep, select_capture
from modeling.attention import names_kernel
from modeling.compiling import compile_each
from modeling.flops import training_flops_per_token
from modeling.gpt import GPT
from modeling.kernels.decode_kernels import DELTA_RULES


@dataclass
class SpeedOptions(ModelOptions):
    model: Annotated[str, "a config of configs/model: tiny on a CPU, gpt2 on a GPU"] = "tiny"
    attention: Annotated[str, "variants, separated by commas, or all"] = "mha"
    vocab_size: int = 4096
    batch_size: Annotated[int, "sequences per optimizer step"] = 16
    micro_batch_size: Annotated[int | None, "null: automatic"] = None
    steps: Annotated[int, "timed in each round"] = 10
    rounds: Annotated[int, "in each plain and ours take turns"] = 5
    compile: Annotated[Switch, "auto, on or off"] = "auto"
    capture: Annotated[Switch, "auto, on or off; ours only: the plain GPT stays as one writes it"] = "auto"
    backend: Annotated[str, "the attention kernel; several, separated by commas"] = "auto"
    kernel: Annotated[str, "attention.kernel of variants with layers that train by it; others choose themselves"] = "auto"
    peer: Annotated[
        str | None, "nanoGPT's model.py, which you bring: one more baseline of the model's shape, in the same turns"
    ] = None
    profile: Annotated[int, "so many kernels (on a CPU operations) of each row, the longest first, and what kinds take"] = 0
    out: Annotated[str | None, "a JSON file for the figures"] = None


# Kernels and operations by their names: the first that fits.
KINDS = {
    "attention": r"flash|fmha|sdpa|scaled_dot_product",
    "products": r"gemm|nvjet|cutlass|aten::b?mm$|aten::addb?mm$",
    "loss": r"^_rows",
    "Triton": r"^triton_",
    "other": r"",
}


@dataclass(frozen=True)
class StepTime:
    """One row of the table; tokens per second over the rounds."""

    name: str
    kernel: str
    parameters: int
    median: float
    low: float
    high: float
    of_plain: float  # median over the rounds of this one / plain in the same round
    of_peer: float | None
    mfu: float | None
    peak_memory_bytes: int
    seconds_to_first_step: float


class PlainBlock(nn.Module):
    """Pre-norm attention with half-split RoPE and SwiGLU, nothing to choose."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        model = config.model
        self.n_heads, self.head_dim = model.n_heads, model.head_dim
        inner = model.n_heads * model.head_dim
        self.norm1, self.norm2 = (nn.RMSNorm(model.d_model, eps=model.norm_eps) for _ in range(2))
        self.q, self.k, self.v = (nn.Linear(model.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, model.d_model, bias=False)
        self.gate, self.up = (nn.Linear(model.d_model, model.mlp_hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(model.mlp_hidden, model.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        h = self.norm1(x)
        q, k, v = (m(h).view(B, T, self.n_heads, self.head_dim).transpose(1, 2) for m in (self.q, self.k, self.v))
        q, k = (torch.cat((a * cos - b * sin, b * cos + a * sin), -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1)))
        out = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True)
        x = x + self.o(out.transpose(1, 2).reshape(B, T, -1))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class PlainGPT(nn.Module):
    """A GPT as one writes it in an afternoon: MHA, tied head, whole logits."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TrainConfig, vocab_size: int) -> None:
        super().__init__()
        model = config.model
        self.embedding = nn.Embedding(-(-vocab_size // 64) * 64, model.d_model)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(model.n_layers))
        self.norm = nn.RMSNorm(model.d_model, eps=model.norm_eps)
        angle = torch.outer(torch.arange(model.max_seq_len), 10000.0 ** (-torch.arange(0, model.head_dim, 2) / model.head_dim))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(inputs)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Peer(nn.Module):
    """nanoGPT's model in a config's shape, from its model.py."""

    def __init__(self, path: Path, config: TrainConfig, vocab_size: int) -> None:
        super().__init__()
        spec = importlib.util.spec_from_file_location("peer", path)
        if spec is None or spec.loader is None or not path.is_file():
            raise UserError(f"peer={path} is no Python file: give the path of nanoGPT's model.py")
        theirs = sys.modules["peer"] = importlib.util.module_from_spec(spec)  # torch.compile looks it up by its name
        spec.loader.exec_module(theirs)
        model = config.model
        shape = theirs.GPTConfig(
            block_size=model.max_seq_len,
            vocab_size=-(-vocab_size // 64) * 64,
            n_layer=model.n_layers,
            n_head=model.n_heads,
            n_embd=model.d_model,
            dropout=0.0,
            bias=False,
        )
        self.theirs = theirs.GPT(shape)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        _, loss = self.theirs(inputs, targets.contiguous())
        assert isinstance(loss, Tensor)
        return loss


@dataclass(frozen=True)
class Conditions:
    """What all models of a table are trained under."""

    options: SpeedOptions
    length: int  # tokens of a sequence
    device: torch.device
    precision: torch.dtype
    compiled: bool
    micro: int
    fixed: list[Tensor]  # the batches, in turn

    @property
    def batches(self) -> Iterator[Tensor]:
        return itertools.cycle(self.fixed)


def baseline_steps(model: PlainGPT | Peer, under: Conditions) -> Callable[[], None]:
    """A function that makes one optimizer step in the shortest way."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    loss_of = compile_each(model.loss) if under.compiled else model.loss
    device, precision, batches = under.device, under.precision, under.batches

    def step() -> None:
        batch = next(batches)
        for part in batch.split(under.micro):
            with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
                loss = loss_of(part[:, :-1], part[:, 1:]) * (len(part) / len(batch))
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_steps(config: TrainConfig, backend: str, under: Conditions) -> tuple[GPT, str, Callable[[], object]]:
    """The harness's model and loop as train_model.py runs them, its kernel, and a function that makes one optimizer step."""
    device = under.device
    model = build_model(config, under.options.vocab_size).to(device)
    chosen = {"backend": backend}
    if names_kernel(model.attentions, under.options.kernel):
        chosen["kernel"] = under.options.kernel
    kernel = pin_execution(model, config.attention | chosen, device=device, precision=under.precision, trains=True)
    model.loss_chunk_tokens = hardware.loss_chunk_tokens(device)
    recipe = choose_recipe(config.optimizer)
    captured = select_capture(under.options.capture, device, processes=1, update_can_be=recipe.can_be_captured)
    step = (CapturedStep if captured else EagerStep)(
        OneProcess(model),
        build_optimizer(model, config.optimizer, recipe=recipe, capturable=device.type == "cuda"),
        micro_batch_size=under.micro,
        grad_clip=1.0,
        precision=under.precision,
        compile=under.compiled,
        device=device,
    )
    return model, kernel, endless_steps(step, under.batches).__next__


def main(arguments: list[str]) -> int:
    options, overrides = options_and_overrides(SpeedOptions, arguments)
    if options.kernel not in ("auto", "torch", *DELTA_RULES):
        raise UserError(f"kernel={options.kernel} trains no layer; choose auto, torch, {' or '.join(DELTA_RULES)}")
    device = hardware.select_device(options.device)
    hardware.keep_freed_memory(device)
    precision = hardware.select_precision(options.precision, device)
    compiled = hardware.select_compile(options.compile, device)
    if compiled:
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # a row that ran eagerly would be another's
    names = options_of("attention") if options.attention == "all" else options.attention.split(",")
    pairs = list(itertools.product(names, options.backend.split(",")))

    base = load_train_config([f"model={options.model}", *(each for each in overrides if each.startswith("model."))])
    baselines: dict[str, PlainGPT | Peer] = {"plain": PlainGPT(base, options.vocab_size).to(device)}
    if options.peer is not None:
        baselines["peer"] = Peer(Path(options.peer), base, options.vocab_size).to(device)
    micro = options.micro_batch_size or hardware.auto_micro_batch_size(
        options.batch_size,
        base.model,
        vocab_size=options.vocab_size,
        parameters=parameters_of(baselines["plain"]),
        precision=precision,
        device=device,
    )
    generator = torch.Generator(device).manual_seed(0)
    shape = (options.batch_size, base.model.max_seq_len + 1)
    fixed = [torch.randint(options.vocab_size, shape, generator=generator, device=device) for _ in range(4)]
    under = Conditions(options, base.model.max_seq_len, device, precision, compiled, micro, fixed)
    steps: dict[str, Callable[[], object]] = {who: baseline_steps(model, under) for who, model in baselines.items()}
    rounds: list[dict[str, float]] = []
    figures: list[StepTime] = []
    bar = tqdm(total=len(pairs) * (options.rounds + 1), disable=None)
    for name, backend in pairs:
        config = load_train_config([f"model={options.model}", f"attention={name}", *overrides])
        hardware.reset_peak_memory(device)
        ours, kernel, steps["ours"] = our_steps(config, backend, under)
        first = sum(seconds_of(step, 5, device) for step in steps.values())  # compilation, capture, allocator, caches
        bar.update()
        tokens = options.steps * options.batch_size * under.length
        for _ in range(options.rounds):  # in turns: what slows the machine down for a while slows all of them
            rounds.append({who: tokens / seconds_of(step, options.steps, device) for who, step in steps.items()})
            bar.update()
        flops = training_flops_per_token(ours, under.length)
        figures.append(step_time(name, kernel, ours, rounds[-options.rounds :], flops, under, first))
        bar.write(row(figures[-1]))
        if options.profile:
            shown = steps if name == names[0] else {"ours": steps["ours"]}
            for who, step in shown.items():
                bar.write(profile_of(name if who == "ours" else who, step, under))
        del ours, steps["ours"]
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    bar.close()
    flops = training_flops_per_token(build_model(base, options.vocab_size), under.length)
    for who, model in reversed(baselines.items()):
        own = [each | {"ours": each[who]} for each in rounds]
        figures.insert(0, step_time(who, "torch's choice", model, own, flops, under, 0.0))
    print_report(figures, under)
    return 0


def profile_of(name: str, step: Callable[[], object], under: Conditions, steps: int = 3) -> str:
    """Milliseconds of a step by kind of kernel, and the longest kernels; on a CPU of operations, without what they call."""
    from torch.profiler import ProfilerActivity, profile

    on_cuda = under.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as found:
        seconds_of(step, steps, under.device)
    times = {}  # of each name: milliseconds and calls a step
    for event in found.key_averages():
        taken = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if taken and (event.device_type == torch.autograd.DeviceType.CUDA) == on_cuda:
            times[event.key] = taken / 1e3 / steps, event.count / steps
    sums = dict.fromkeys(KINDS, (0.0, 0.0))
    for key, (taken, calls) in times.items():
        kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, key))
        sums[kind] = sums[kind][0] + taken, sums[kind][1] + calls
    lines = [
        f"\n{name}, ms a step (calls):" + ",".join(f" {kind} {ms:.3f} ({calls:.0f})" for kind, (ms, calls) in sums.items())
    ]
    longest = sorted(times.items(), key=lambda each: -each[1][0])[: under.options.profile]
    lines += [f"{ms:>10.3f} {calls:>6.0f}  {key[:120]}" for key, (ms, calls) in longest]
    return "\n".join(lines)


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def row(f: StepTime) -> str:
    """One line of the table."""
    return (
        f"{f.name:<16}{f.kernel:<16}{f.parameters:>12,}{f.median:>12,.0f}{f'{f.low:,.0f}-{f.high:,.0f}':>22}"
        f"{f.of_plain:>10.3f}"
        f"{f'{f.of_peer:.3f}' if f.of_peer else '-':>9}{f'{f.mfu:.1%}' if f.mfu else '-':>8}{f.peak_memory_bytes / 2**30:>7.1f}"
    )


def step_time(
    name: str, kernel: str, model: nn.Module, rounds: list[dict[str, float]], flops: int, under: Conditions, first: float
) -> StepTime:
    """Medians and ranges of the rounds, in each of which "ours" is the model's rate."""
    rates = [each["ours"] for each in rounds]
    rate, peak = statistics.median(rates), hardware.peak_flops(under.device, under.precision)
    return StepTime(
        name=name,
        kernel=kernel,
        parameters=parameters_of(model),
        median=rate,
        low=min(rates),
        high=max(rates),
        of_plain=statistics.median(each["ours"] / each["plain"] for each in rounds),
        of_peer=statistics.median(each["ours"] / each["peer"] for each in rounds) if "peer" in rounds[0] else None,
        mfu=rate * flops / peak if peak else None,
        peak_memory_bytes=hardware.peak_memory_bytes(under.device),
        seconds_to_first_step=first,
    )


def print_report(figures: list[StepTime], under: Conditions) -> None:
    """A table for people, then one JSON line."""
    options, machine = under.options, machine_name(under.device)
    print(
        f"{options.model}, {options.batch_size} sequences a step in pieces of {under.micro}, vocabulary {options.vocab_size}, "
        f"{under.precision}, {'compiled' if under.compiled else 'eager'}, torch {torch.__version__}, {machine}"
    )
    print(
        f"{'':<16}{'kernel':<16}{'parameters':>12}{'tokens/s':>12}{'range':>22}"
        f"{'of plain':>10}{'of peer':>9}{'MFU':>8}{'GiB':>7}"
    )
    for each in figures:
        print(row(each))
    record = {
        "options": asdict(options),
        "device": machine,
        "precision": str(under.precision),
        "compiled": under.compiled,
        "micro_batch_size": under.micro,
        "torch": torch.__version__,
        "figures": [asdict(f) for f in figures],
    }
    leave_record(record, options.out)


if __name__ == "__main__":
    run_script(main, description=__doc__, options=SpeedOptions)
