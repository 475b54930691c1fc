"""Write text with a trained run, printing as it goes: python scripts/generate.py run=runs/NAME prompt="Once upon"."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import ROOT, enter_environment

enter_environment()

from harness.config.schema import CacheDtype, Device
from harness.entry.cli import chosen_run, parse_options, run_script
from harness.errors import UserError, as_user_error, tell
from modeling.cache_formats import FORMS


@dataclass
class AttentionOptions:
    backend: Annotated[str, "the attention kernel"] = "auto"
    decode: Annotated[str, "auto, expand or absorbed: how latents are read back from a cache"] = "auto"
    kernel: Annotated[str, "of one new token, or states: auto, torch or another of modeling/kernels/decode_kernels.py"] = "auto"


@dataclass
class GenerateCacheOptions:
    dtype: Annotated[CacheDtype, FORMS] = "float32"
    window: Annotated[int | None, "newest positions that a query sees, its own included; null: all"] = None
    sinks: Annotated[int, "first positions that stay visible beside a window"] = 0


@dataclass
class GenerateOptions:
    run: Annotated[str | None, "a run's folder or name; null: the newest finished run"] = None
    checkpoint: Annotated[str, "last, or best: the one that validated best"] = "last"
    prompt: Annotated[str, "the text to continue; empty: a fresh document"] = ""
    max_new_tokens: int = 128
    temperature: Annotated[float, "0: greedy, else 0.001 or more"] = 0.8
    top_k: Annotated[int | None, "only among so many likeliest tokens"] = None
    top_p: Annotated[float | None, "only among the likeliest tokens that together have so much probability"] = None
    seed: int = 0
    device: Annotated[Device, "auto, cpu, cuda or mps"] = "auto"
    step: Annotated[str, "auto, eager, compile or graph"] = "auto"
    runs_dir: Annotated[str, "where runs are looked for"] = str(ROOT / "runs")
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    cache: GenerateCacheOptions = field(default_factory=GenerateCacheOptions)


def main(arguments: list[str]) -> int:
    options = parse_options(GenerateOptions, arguments)
    if abs(options.seed) >= 2**63:
        raise UserError(f"seed={options.seed} is too large for torch's generator; choose a seed below 2^63")
    run = chosen_run(options.run, options.runs_dir)

    import torch

    from harness.runs.load import decode_path, load_trained
    from harness.training.device import select_device
    from modeling.attention.quantisation import cache_format
    from modeling.generation import generate

    device = select_device(options.device)
    trained = load_trained(
        run, device=device, precision=torch.float32, execution=vars(options.attention), which=options.checkpoint
    )
    tokens = trained.tokenizer.encode_prompt(options.prompt) or [trained.tokenizer.opening]
    kept = cache_format(options.cache.dtype)
    stream = generate(
        trained.model,
        [tokens],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        cache_dtype=kept,
        window=options.cache.window,
        sinks=options.cache.sinks,
        step=options.step,
        generator=torch.Generator(device).manual_seed(options.seed),
    )
    with as_user_error():
        first = list(itertools.islice(stream, 2))  # whatever cannot be done is found out by then
    tell(f"{run.name}: {decode_path(trained.model, cache=kept, window=options.cache.window)}")
    print(options.prompt, end="", flush=True)
    shown = ""
    written: list[int] = []
    for next_token in itertools.chain(first, stream):
        written.append(int(next_token))
        if written[-1] in trained.tokenizer.stops:
            break
        # A character may take several tokens: the last one is shown when it is whole, and never by half.
        text = trained.tokenizer.decode(written).rstrip("\N{REPLACEMENT CHARACTER}")
        print(text[len(shown) :], end="", flush=True)
        shown = max(shown, text, key=len)
    print()
    return 0


if __name__ == "__main__":
    run_script(main, description=__doc__, options=GenerateOptions, only_prints=True, verbatim=True)
