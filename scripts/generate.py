"""Write text with a trained run, printing as it goes: python scripts/generate.py run=runs/NAME prompt="Once upon".

run             a run's folder or name; without one, the newest finished run
checkpoint      last (best: the one that validated best)
prompt          the text to continue (empty: a fresh document)
max_new_tokens  128        temperature  0.8 (0: greedy, else 0.001 or more)
top_k           null       top_p        null
seed            0          device       auto
attention.backend  auto    attention.decode  auto (expand | absorbed)    attention.kernel  torch (triton)
cache.dtype     float32 (bfloat16 | float16 | int8 | fp8)    cache.window  null    cache.sinks  0
step            auto (eager | compile | graph)    runs_dir  runs
"""

# ruff: noqa: E402
from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.bootstrap import ROOT, enter_environment

enter_environment()

from harness.command_line import newest_run, parse_options, run_script
from harness.config import did_you_mean, find_run, user_path
from harness.errors import UserError


@dataclass
class AttentionOptions:
    backend: str = "auto"
    decode: str = "auto"
    kernel: str = "torch"


@dataclass
class CacheOptions:
    dtype: str = "float32"
    window: int | None = None
    sinks: int = 0


@dataclass
class GenerateOptions:
    run: str | None = None
    checkpoint: str = "last"
    prompt: str = ""
    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    device: str = "auto"
    step: str = "auto"
    runs_dir: str = str(ROOT / "runs")
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)


def main(arguments: list[str]) -> int:
    options = parse_options(GenerateOptions, arguments)
    check(options)
    runs_dir = user_path(options.runs_dir)
    run = find_run(options.run, runs_dir) if options.run is not None else newest_run(runs_dir)

    import torch

    from harness.session import decode_path, load_trained
    from harness.training.device import select_device
    from modeling.attention.cache import DTYPES
    from modeling.generation import generate

    if options.cache.dtype not in DTYPES:
        raise UserError(
            f"cache.dtype={options.cache.dtype} is unknown; {did_you_mean(options.cache.dtype, list(DTYPES))}"
        )

    device = select_device(options.device)
    trained = load_trained(
        run, device=device, precision=torch.float32, execution=vars(options.attention), which=options.checkpoint
    )
    tokens = trained.tokenizer.encode(options.prompt) or [trained.tokenizer.end_of_text]
    print(f"{run.name}: {decode_path(trained.model)}", file=sys.stderr)
    shown = ""
    written: list[int] = []
    print(options.prompt, end="", flush=True)
    try:
        for next_token in generate(
            trained.model, [tokens], max_new_tokens=options.max_new_tokens, temperature=options.temperature,
            top_k=options.top_k, top_p=options.top_p, cache_dtype=DTYPES[options.cache.dtype],
            window=options.cache.window, sinks=options.cache.sinks, step=options.step,
            generator=torch.Generator(device).manual_seed(options.seed),
        ):  # fmt: skip
            written.append(int(next_token))
            if written[-1] == trained.tokenizer.end_of_text:
                break
            text = trained.tokenizer.decode(written)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may take several tokens
                print(text[len(shown) :], end="", flush=True)
                shown = text
    except ValueError as error:
        raise UserError(str(error)) from None
    print()
    return 0


def check(options: GenerateOptions) -> None:
    """Raises UserError for what can be refused before a run is loaded."""
    if abs(options.seed) >= 2**63:
        raise UserError(f"seed={options.seed} is too large for torch's generator; choose a seed below 2^63")


if __name__ == "__main__":
    run_script(main, description=__doc__)
