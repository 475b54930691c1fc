"""Check an attention variant against the contract: python scripts/check_attention.py attention=NAME [key=value ...].

The overrides are train_model.py's (attention, model, and their fields); attention=gqa,mla or all checks several, a table each.
A table says what holds; status 1 if one fails.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import ROOT, enter_environment

enter_environment()

from harness.config.compose import load_train_config, options_of
from harness.entry.cli import run_script
from harness.errors import UserError

if TYPE_CHECKING:
    from harness.config.schema import TrainConfig
    from modeling.gpt import GPT

MODELING = ROOT / "modeling"


def main(arguments: list[str]) -> int:
    named = [argument.removeprefix("attention=") for argument in arguments if argument.startswith("attention=")]
    names = options_of("attention") if named[-1:] == ["all"] else (named or [""])[-1].split(",")
    if len(names) == 1:
        return check_variant(arguments)
    rest = [argument for argument in arguments if not argument.startswith("attention=")]
    failed = []
    for name in names:
        try:
            failed += [name] * check_variant([f"attention={name}", *rest])
        except UserError as error:  # sizes that fit the others
            print(f"attention={name} is not checked: {error}")
            failed.append(name)
        print(flush=True)
    print(f"{len(names) - len(failed)} of {len(names)} variants hold{': not ' if failed else ''}{', '.join(failed)}")
    return 1 if failed else 0


def check_variant(arguments: list[str]) -> int:
    """One variant's table; 1 if a check fails. Raises UserError for what cannot be checked."""
    config = load_train_config(arguments)

    from harness.config.build import build_layers, layers_that_differ, model_shapes
    from harness.evaluation.model_facts import model_facts
    from modeling.attention.contract import CHECKS

    # torch.compile logs the traceback of what it fails on: its first line stands in the table.
    logging.getLogger("torch").setLevel(logging.CRITICAL)

    lines: list[str] = []
    checked = 1  # layers

    def it_builds_into_a_model() -> None:
        nonlocal checked
        model = model_shapes(config, vocab_size=64)  # sizes that do not fit are said in one sentence
        check_execution(model, config)
        checked = layers_that_differ(config)
        if checked > 1:
            lines.append(f"layers      the first {checked} of {config.model.n_layers} differ, and are checked together")
        with contextlib.suppress(UserError):  # cache and formula disagree: a row of the table says so
            lines.append(model_facts(model, config).cache_line)

    started = time.perf_counter()
    unbuilt = mistake(it_builds_into_a_model)
    print(
        f"attention={config.attention['name']} ({config.attention['mechanism']}), {config.model.n_heads} heads, "
        f"d_model {config.model.d_model}"
    )
    print("".join(f"{line}\n" for line in lines), end="")
    failures, rows = 0, len(CHECKS)
    if unbuilt is not None:  # a row of its own: the checks build layers without the model around them
        print_row(it_builds_into_a_model.__name__, time.perf_counter() - started, unbuilt)
        failures, rows = 1, rows + 1
    for check in CHECKS:
        started = time.perf_counter()
        found = mistake(functools.partial(check, functools.partial(build_layers, config, checked)))
        print_row(check.__name__, time.perf_counter() - started, found)
        failures += found is not None
    print(f"{rows - failures} of {rows} hold")
    return 1 if failures else 0


def check_execution(model: GPT, config: TrainConfig) -> None:
    """Raises UserError for what cannot compute the checks: a kernel is no part of a variant, and no reason to fail one."""
    import torch

    from harness.runs.load import pin_execution

    if (kernel := config.attention["kernel"]) not in ("auto", "torch"):
        raise UserError(
            f"attention.kernel={kernel} cannot compute the checks, which are made on a CPU, with windows and in float64 too; "
            "take attention.kernel=torch"
        )
    pin_execution(model, config.attention, device=torch.device("cpu"), precision=torch.float32)


def mistake(check: Callable[[], None]) -> str | None:
    """What a check finds wrong, in one line; None where it holds. Raises UserError for sizes that do not fit."""
    try:
        check()
    except UserError:
        raise
    except Exception as error:  # the user's own class may fail in any way
        line = next(iter(str(error).strip().splitlines()), "")[:200]
        if isinstance(error, AssertionError) and line:
            return line
        frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        ours = [f" ({file.relative_to(ROOT)}:{number})" for file, number in frames if file.is_relative_to(MODELING)]
        return f"{type(error).__name__}: {line}{ours[-1] if ours else ''}"
    return None


def print_row(name: str, seconds: float, found: str | None) -> None:
    verdict, remark = ("pass", "") if found is None else ("FAIL", f"  {found}")
    print(f"  {verdict}  {name.replace('_', ' '):<48}{seconds:5.1f} s{remark}", flush=True)


if __name__ == "__main__":
    run_script(main, description=__doc__, groups=("attention", "model"))
