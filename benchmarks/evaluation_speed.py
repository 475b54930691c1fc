"""What evaluation costs, eager, captured and compiled: python benchmarks/evaluation_speed.py [key=value ...].

Tokens are random: speed does not depend on them. `first` is the first pass with all that it compiles, warms up and captures.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import enter_environment

enter_environment()

import statistics
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch

from benchmarks.measuring import ModelOptions
from harness.config.build import build_model
from harness.config.compose import load_train_config
from harness.decode.speed import machine_name
from harness.entry.cli import parse_options, run_script
from harness.evaluation.evaluate import evaluate_model
from harness.evaluation.losses import CapturedLosses, TokenLosses
from harness.evaluation.perplexity import Scoring
from harness.runs.load import pin_execution
from harness.training.device import select_device, select_precision
from modeling.compiling import compile_each


@dataclass
class EvaluationSpeedOptions(ModelOptions):
    model: Annotated[str, "configs of configs/model, separated by commas"] = "mini"
    attention: Annotated[str, "variants, separated by commas"] = "mha"
    vocab_size: int = 4096
    batch_size: Annotated[int, "windows a call"] = 32
    windows: Annotated[int, "half of each is scored, as eval_model.py does"] = 320
    rounds: Annotated[int, "in each the forms take turns"] = 5


def main(argv: list[str]) -> int:
    options = parse_options(EvaluationSpeedOptions, argv)
    device = select_device(options.device)
    precision = select_precision(options.precision, device)
    machine, windows = machine_name(device), f"{options.windows} windows, {options.batch_size} a call"
    print(f"{machine}, {precision}, torch {torch.__version__}, {windows}")
    print(f"{'':<32}{'scored tokens/s':>16}{'range':>26}{'of eager':>10}{'first, s':>10}{'loss':>10}")
    for model in options.model.split(","):
        for attention in options.attention.split(","):
            measure_forms(model, attention, options, device, precision)
    return 0


def measure_forms(
    name: str, attention: str, options: EvaluationSpeedOptions, device: torch.device, precision: torch.dtype
) -> None:
    """One model in every form, a row each."""
    config = load_train_config([f"model={name}", f"attention={attention}"])
    model = build_model(config, options.vocab_size).to(device).eval()
    pin_execution(model, config.attention, device=device, precision=precision)
    computed: dict[str, Any] = {"precision": precision, "device": device}
    compiled = build_model(config, options.vocab_size).to(device).eval()
    compiled.load_state_dict(model.state_dict())
    pin_execution(compiled, config.attention, device=device, precision=precision)
    compiled.token_losses = compile_each(compiled.token_losses)  # type: ignore[method-assign]
    forms = {"eager": TokenLosses(model, **computed), "compiled": TokenLosses(compiled, **computed)}
    if device.type == "cuda":
        forms["captured"] = CapturedLosses(model, **computed)
        forms["compiled and captured"] = CapturedLosses(compiled, **computed)

    length = (options.windows + 1) * model.max_seq_len // 2
    tokens = np.random.default_rng(0).integers(0, options.vocab_size - 1, length).astype(np.uint16)
    one = np.array([length])
    split = SimpleNamespace(tokens=tokens, document_starts=np.array([0, length]), document_bytes=one, document_words=one)

    texts = SimpleNamespace(end_of_text=options.vocab_size - 1, begins=(), decode=lambda ids: "x" * len(ids))

    def scored(losses: TokenLosses) -> tuple[float, float]:
        """Seconds and loss."""
        started = time.perf_counter()
        result = evaluate_model(losses, split, texts, Scoring(0.5, options.batch_size))
        return time.perf_counter() - started, result.loss

    first = {form: scored(losses) for form, losses in forms.items()}
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(options.rounds):
        for form, losses in forms.items():
            seconds[form].append(scored(losses)[0])
    for form, each in seconds.items():
        rates = sorted(length / one_pass for one_pass in each)
        ratio = statistics.median(eager / this for eager, this in zip(seconds["eager"], each, strict=True))
        print(
            f"{name + ' ' + attention + ', ' + form:<32}{statistics.median(rates):>16,.0f}"
            f"{f'{rates[0]:,.0f}-{rates[-1]:,.0f}':>26}{ratio:>10.2f}{first[form][0]:>10.2f}{first[form][1]:>10.5f}",
            flush=True,
        )


if __name__ == "__main__":
    run_script(main, description=__doc__, options=EvaluationSpeedOptions)
